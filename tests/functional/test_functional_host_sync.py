"""Nothing on the training path waits for the device: no value is read back, no shape depends on values."""
import pytest
import torch

from benchmarks.gpu_checks import no_waiting
from kd_det.functional import boxes, dense, features, focal_global, logits, masks, queries, relations, structure

BATCH, CELLS = (64, 96), (8, 12)
BOXES = [torch.tensor([[8., 8., 40., 30.], [50., 10., 90., 60.]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
LEVELS = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.long)]


def feature(*shape):
    return torch.randn(*(shape or (2, 3, *CELLS)), generator=torch.Generator().manual_seed(0))


def box_masks():
    valid = masks.valid_cells([BATCH, (40, 56)], BATCH, CELLS)
    foreground = masks.box_foreground(BOXES, BATCH, CELLS, 'inverse_area', image_shapes=[BATCH, (40, 56)])
    return foreground, masks.normalized_background(foreground, valid), valid


def fgd(student):
    foreground, background, valid = box_masks()
    return sum(focal_global.fgd_loss(student, feature() + 1, foreground, background, student_relation=student,
                                 teacher_relation=feature(), valid=valid).values())


def fused_fgd(student):
    foreground, background, valid = box_masks()
    sums = focal_global.fgd_sums(student, feature() + 1, feature(3), feature(3), 0.5, valid)
    return sum(focal_global.fgd_loss_of_sums(sums, sums.student_pooled - sums.teacher_pooled, foreground, background,
                               valid=valid).values())


def level_masks(student):
    masks.assign_levels(BOXES, 2)
    priors = torch.cartesian_prod(torch.arange(8.), torch.arange(12.))[:, [1, 0, 1, 0]] * 8
    masks.near_anchor_foreground(BOXES, LEVELS, 1, priors + torch.tensor([-16., -16., 16., 16.]), CELLS)
    masks.prediction_quality(feature(2, 96, 3).sigmoid(), 50 * feature(2, 96, 4), 50 * feature(96, 2), BOXES, LABELS)
    masks.valuable_region([50 * feature(96, 4), 50 * feature(24, 4)], BOXES)
    masks.region_foreground(50 * feature(7, 5).abs().clamp(max=0.03), feature(7).abs(), 2, BATCH, CELLS)
    return sum(features.decoupled_imitation(student, feature() + 1, masks.level_foreground(BOXES, LEVELS, 8, CELLS)))


PATHS = dict(
    fgd=fgd,
    fused_fgd=fused_fgd,
    level_masks=level_masks,
    imitation=lambda s: features.masked_imitation(s, feature() + 1, box_masks()[0], distance='cosine',
                                                  normalizer='twice_mask'),
    channel_wise=lambda s: features.channel_wise_kl(s, feature() + 1, 1.0, box_masks()[2]),
    pearson=lambda s: features.pearson_distance(s, feature() + s.detach()**2, box_masks()[2]),
    structural=lambda s: structure.structural_distance(s, feature() + 1, box_masks()[2]),
    frequencies=lambda s: structure.frequency_imitation(s, feature() + s.detach()**2, feature(4, 2, 3),
                                                        box_masks()[2]),
    prompted=lambda s: sum(each.sum() for each in structure.prompted_feature(s, feature(4, 2, 3))),
    flow=lambda s: relations.flow_distance(relations.flow_matrix(s, s[:, :, ::2, ::2]), feature(2, 3, 3)),
    distances=lambda s: relations.distance_relation(s[0], feature()[0] + s[0].detach()**2),
    tokens=lambda s: relations.token_relations(s, feature() + 1, valid=box_masks()[2], tokens=30),
    angles=lambda s: relations.angle_relation(s[0, :, :, 0], s.detach()[0, :, :, 1]),
    dist=lambda s: relations.dist_loss(s[:, :, 0, 0], feature(2, 3)),
    soft=lambda s: logits.soft_target_kl(s[:, :, 0, 0], feature(2, 3), 2.0),
    standardized=lambda s: logits.soft_target_kl(*map(logits.standardized_logits, (s[:, :, 0, 0], feature(2, 3)))),
    quality=lambda s: logits.quality_bce(s[:, :, 0, 0], feature(2, 3)).sum(),
    treated=lambda s: logits.soft_target_kl(
        s[:, :, 0, 0] * logits.confidence_weights(logits.largest_probability(feature(2, 3), 'softmax'),
                                                  feature(2).abs())[:, None],
        logits.permute_others(feature(2, 3))),
    weighted=lambda s: logits.weighted_cross_entropy(s[:, :, 0, 0], feature(2, 3)).sum(),
    ranks=lambda s: logits.rank_mimicking(s[0, 0, 0], s.detach()[1, 1, 1], torch.arange(12) % 4 - 1, 3).sum(),
    bounded=lambda s: boxes.bounded_regression(s[0, 0, :, :4], feature(8, 4), feature(8, 4) + 1, 9.0).sum(),
    distribution=lambda s: boxes.distribution_kl(s[:, :, :4], feature(2, 3, 4, 12)).sum(),
    dense_quality=lambda s: dense.sum_quality_bce(s, feature() + 1, feature(2, 3, 8) > 0),
    dense_soft=lambda s: dense.sum_soft_target_kl(s, feature() + 1, boxes.find_nearest(
        50 * feature(2, 24, 4), BOXES, feature(2, 24) > 0).view(2, 3, 8)),
    dense_boxes=lambda s: dense.sum_giou_imitation(s[..., :4], feature()[..., :4] + 1, feature(2, 3, 8).abs()),
    dense_gap=lambda s: dense.sum_distribution_kl(s, feature() + 1,
                                                  logits.largest_gap(s, feature() + 1, 'sigmoid')[..., 0]),
    targets=lambda s: s.sum() * queries.noisy_targets(feature(2, 3, 4), torch.zeros(2, 3).long(), 2, 0.4, 0.5, 3,
                                                      step=4)[0].masked_fill(
        queries.hide_other_groups(feature(2, 3) > 0, 2).all(-1).view(2, 2, 3, 1), 0).sum(),
    giou=lambda s: boxes.giou_imitation(s[0, 0, :, :4], 5 * feature(8, 4)).sum(),
)


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS.keys())
def test_training_path_never_waits_for_the_device(path):
    student = feature().requires_grad_()
    with no_waiting('cpu'):
        path(student).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize('wait', [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(),
                                  lambda x: x.new_tensor([1.0]), lambda x: torch.tensor([1.0], device=x.device)])
def test_the_check_notices_waiting(wait):
    with pytest.raises(AssertionError, match='waits for the device'), no_waiting('cpu'):
        wait(feature(3))
