"""Feature losses: the formulas, what happens at the edges, and who gets a gradient."""
import pytest
import torch
import torch.nn.functional as F

from kd_det.functional import features, focal_global, masks, structure

BATCH, CELLS = (64, 96), (8, 12)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, *CELLS, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


@pytest.fixture
def mask():
    return torch.rand(2, *CELLS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def valid():
    """The second image covers the first 5 rows and 7 columns of cells."""
    return masks.valid_cells([BATCH, (40, 56)], BATCH, CELLS)


def box_masks(boxes, valid=None):
    foreground = masks.box_foreground(boxes, BATCH, CELLS, 'inverse_area')
    return foreground, masks.normalized_background(foreground, valid)


BOXES = [torch.tensor([[8., 8., 40., 30.], [50., 10., 90., 60.]]), torch.tensor([[4., 4., 40., 30.]])]

# Every loss of two features, as a function of them alone.
LOSSES = dict(
    imitation=features.masked_imitation,
    l1=lambda s, t: features.masked_imitation(s, t, distance='l1'),
    smooth_l1=lambda s, t: features.masked_imitation(s, t, distance='smooth_l1'),
    cosine=lambda s, t: features.masked_imitation(s, t, distance='cosine'),
    decoupled=lambda s, t: sum(features.decoupled_imitation(s, t, (s[:, 0] > 0).to(s))),
    attention=lambda s, t: focal_global.attention_distance(s, t, 0.5),
    generation=features.generation_distance,
    channel_wise=lambda s, t: features.channel_wise_kl(s, t, 2.0),
    pearson=features.pearson_distance,
    structural=structure.structural_distance,
    frequencies=lambda s, t: structure.frequency_imitation(s, t, torch.ones(3, 2, s.shape[1]).to(s)),
    fkd=lambda s, t: sum(features.fkd_loss(s, t, t[:, 0].abs(), s.mean((2, 3)), s.mean(1, keepdim=True)).values()),
    fgd=lambda s, t: sum(focal_global.fgd_loss(s, t, (s[:, 0] > 0).to(s), (s[:, 0] <= 0).to(s)).values()),
)
every_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_loss_is_positive_and_teaches_the_student_alone(loss, pair):
    student, teacher = pair
    value = loss(student, teacher)
    assert value.shape == () and value > 0
    value.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@every_loss
def test_loss_and_gradient_are_zero_when_student_equals_teacher(loss, pair):
    student, _ = pair
    value = loss(student, student.detach().clone())
    assert value == 0
    gradient, = torch.autograd.grad(value, student)
    assert gradient.abs().max() < 1e-12


@every_loss
@pytest.mark.parametrize('layout', [
    lambda each: each.mT.contiguous().mT, lambda each: each.contiguous(memory_format=torch.channels_last),
    lambda each: each.repeat_interleave(2, 3)[..., ::2],
    lambda each: each.transpose(0, 1).contiguous().transpose(0, 1)],
    ids=['transposed', 'channels_last', 'strided', 'batch_inside'])
def test_the_order_in_memory_does_not_matter(loss, layout, pair):
    student, teacher = (each.detach() for each in pair)
    found = []
    for make in (torch.clone, layout):
        learning = make(student).requires_grad_()
        # What was freed before shows in a gradient that was never written.
        junk = torch.full(student.shape, 7.7, dtype=student.dtype)
        del junk
        value = loss(learning, make(teacher))
        found.append((value, *torch.autograd.grad(value, learning)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@every_loss
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 1, 1, 1), (1, 1, 2, 3)])
@pytest.mark.parametrize('make', [torch.randn, torch.zeros], ids=['random', 'constant'])
def test_loss_is_finite_on_tiny_and_constant_features(loss, shape, make):
    student = make(shape).requires_grad_()
    for teacher in (torch.randn(shape), torch.zeros(shape)):
        value = loss(student, teacher)
        gradient, = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all()
        assert gradient.abs().max() < 1e6


@every_loss
def test_gradient_is_that_of_the_formula(loss, pair):
    student, teacher = (feature.detach()[:, :3, :2, :3].clone() for feature in pair)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize('loss', [features.masked_imitation, focal_global.attention_distance, features.channel_wise_kl,
                                  features.pearson_distance, focal_global.relation_distance,
                                  structure.structural_distance])
def test_shapes_that_differ_are_an_error(loss):
    options = (0.5, ) if loss in (focal_global.attention_distance, features.channel_wise_kl) else ()
    with pytest.raises(ValueError, match=r'student \(1, 2, 4, 4\) and teacher \(1, 3, 4, 4\) must have one shape'):
        loss(torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4), *options)


# Masked imitation

@pytest.mark.parametrize('distance, element', [
    ('mse', lambda d: d * d),
    ('l1', abs),
    ('smooth_l1', lambda d: 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5),
])
def test_masked_imitation_equals_the_loop(distance, element, pair, mask):
    student, teacher = (feature.detach() for feature in pair)
    channel_weight = torch.rand(2, 5, dtype=torch.float64)
    plain = weighted = 0
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, student.shape)).tolist():
        term = mask[n, i, j].item() * element((student[n, c, i, j] - teacher[n, c, i, j]).item())
        plain, weighted = plain + term, weighted + channel_weight[n, c].item() * term
    for form in (mask, mask[:, None], mask[:, None].expand_as(student)):
        actual = features.masked_imitation(student, teacher, form, distance=distance)
        assert actual.item() == pytest.approx(plain / 2)
        actual = features.masked_imitation(student, teacher, form, channel_weight, distance)
        assert actual.item() == pytest.approx(weighted / 2)
    channels_alone = features.masked_imitation(student, teacher, channel_weight[:, :, None, None], distance=distance)
    expected = features.masked_imitation(student, teacher, None, channel_weight, distance)
    torch.testing.assert_close(channels_alone, expected)


def test_cosine_distance(pair, mask):
    student, teacher = pair
    expected = (mask * (1 - F.cosine_similarity(student, teacher, dim=1))).sum() / 2
    torch.testing.assert_close(features.masked_imitation(student, teacher, mask, distance='cosine'), expected)


def test_normalizers(pair, mask):
    student, teacher = pair
    total = (mask[:, None] * (student - teacher)**2).sum()
    (batch, channels, height, width), weight = student.shape, mask.sum()
    expected = dict(batch=batch, mask=weight, twice_mask=2 * weight, twice_elements=2 * channels * weight,
                    cells=batch * height * width, mean=batch * channels * height * width)
    for name, divisor in expected.items():
        for form in (mask, mask[:, None], mask[:, None].expand_as(student)):
            actual = features.masked_imitation(student, teacher, form, normalizer=name)
            torch.testing.assert_close(actual, total / divisor)
        unmasked = features.masked_imitation(student, teacher, normalizer=name)
        ones = features.masked_imitation(student, teacher, torch.ones_like(mask), normalizer=name)
        torch.testing.assert_close(unmasked, ones)
    actual = features.masked_imitation(student, teacher, mask, normalizer=torch.tensor(7.0))
    torch.testing.assert_close(actual, total / 7)
    unmasked = features.masked_imitation(student, teacher, normalizer='mean')
    torch.testing.assert_close(unmasked, F.mse_loss(student, teacher))


@pytest.mark.parametrize('normalizer', ['batch', 'mask', 'twice_mask', 'twice_elements', 'cells', 'mean'])
def test_empty_mask_gives_zero(normalizer, pair, mask):
    student, teacher = pair
    value = features.masked_imitation(student, teacher, torch.zeros_like(mask), normalizer=normalizer)
    gradient, = torch.autograd.grad(value, student)
    assert value == 0 and gradient.abs().max() == 0


def test_no_gradient_flows_through_masks(pair, mask):
    student, teacher = pair
    mask.requires_grad_()
    channel_weight = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    loss = features.masked_imitation(student, teacher, mask, channel_weight, normalizer='mask')
    loss = loss + sum(focal_global.fgd_loss(student, teacher, mask, mask).values())
    loss = loss + sum(features.decoupled_imitation(student, teacher, mask))
    (loss + features.fkd_loss(student, teacher, mask, student[:, :, 0, 0], student[:, :1])['imitation']).backward()
    assert mask.grad is None and channel_weight.grad is None and student.grad is not None


def test_unknown_names_are_errors(pair):
    with pytest.raises(ValueError, match="distance='l3': expected one of mse, l1, smooth_l1, cosine"):
        features.masked_imitation(*pair, distance='l3')
    with pytest.raises(ValueError, match="normalizer='sum': expected a tensor or one of batch, cells"):
        features.masked_imitation(*pair, normalizer='sum')


def test_decoupled_imitation_leaves_padding_out(pair, valid):
    student, teacher = pair
    foreground = (torch.rand(2, *CELLS) < 0.3).to(student)
    actual = features.decoupled_imitation(student, teacher, foreground, valid)
    for value, mask in zip(actual, (foreground * valid, (1 - foreground) * valid)):
        expected = features.masked_imitation(student, teacher, mask, normalizer='twice_elements')
        torch.testing.assert_close(value, expected)


# FGD

def test_fgd_equals_the_sum_of_its_parts(pair, valid):
    student, teacher = pair
    relations = dict(student_relation=student * 2, teacher_relation=teacher * 3)
    for cells in (None, valid):
        foreground, background = box_masks(BOXES, cells)
        parts = focal_global.fgd_loss(student, teacher, foreground, background, 0.8, **relations, alpha=2, beta=3,
                                      gamma=5, lambda_=7, valid=cells)
        spatial, channel = (attention(teacher, 0.8, cells)
                            for attention in (masks.spatial_attention, masks.channel_attention))
        expected = dict(
            foreground=2 * features.masked_imitation(student, teacher, foreground * spatial, channel),
            background=3 * features.masked_imitation(student, teacher, background * spatial, channel),
            attention=5 * focal_global.attention_distance(student, teacher, 0.8, cells),
            relation=7 * focal_global.relation_distance(*relations.values(), cells))
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value)


def test_fgd_without_relations_has_no_relation_part(pair):
    assert list(focal_global.fgd_loss(*pair, *box_masks(BOXES))) == ['foreground', 'background', 'attention']


def test_relation_trains_the_teachers_context_block(pair):
    student_relation, teacher_relation = pair
    focal_global.relation_distance(student_relation, teacher_relation).backward()
    torch.testing.assert_close(student_relation.grad, student_relation - teacher_relation)
    torch.testing.assert_close(teacher_relation.grad, teacher_relation - student_relation)


def fgd(student, teacher, boxes, valid):
    relations = [feature + focal_global.context_pool(feature, feature[:, :1], valid) for feature in (student, teacher)]
    return sum(focal_global.fgd_loss(student, teacher, *box_masks(boxes, valid), 0.5, *relations, valid=valid).values())


PADDING_AWARE = dict(
    fgd=lambda s, t, valid: fgd(s, t, BOXES, valid),
    attention=lambda s, t, valid: focal_global.attention_distance(s, t, 0.5, valid),
    channel_wise=lambda s, t, valid: features.channel_wise_kl(s, t, 2.0, valid),
    pearson=features.pearson_distance,
    decoupled=lambda s, t, valid: sum(features.decoupled_imitation(s, t, box_masks(BOXES)[0], valid)),
)
padding_aware = pytest.mark.parametrize('loss', PADDING_AWARE.values(), ids=PADDING_AWARE.keys())


@padding_aware
def test_padding_cells_neither_matter_nor_learn(loss, pair, valid):
    student, teacher = pair
    value = loss(student, teacher, valid)
    gradient, = torch.autograd.grad(value, student)
    padding = ~valid[:, None].expand_as(student)
    assert gradient[padding].abs().max() == 0 and gradient[~padding].abs().max() > 0
    noise = 10 * torch.randn_like(student) * padding
    torch.testing.assert_close(loss(student + noise, teacher - noise, valid), value)


@padding_aware
def test_batch_of_padding_alone_gives_zero(loss, pair):
    student, teacher = pair
    value = loss(student, teacher, torch.zeros(2, *CELLS, dtype=torch.bool))
    gradient, = torch.autograd.grad(value, student)
    assert value == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize('loss', [PADDING_AWARE['attention'], PADDING_AWARE['channel_wise'], PADDING_AWARE['pearson']])
def test_valid_cells_alone_equal_the_cropped_feature(loss, pair):
    student, teacher = pair
    valid = masks.valid_cells([(40, 56)] * 2, BATCH, CELLS)
    cropped = loss(student[:, :, :5, :7], teacher[:, :, :5, :7], None)
    torch.testing.assert_close(loss(student, teacher, valid), cropped)


@pytest.mark.parametrize('boxes', [[torch.zeros(0, 4)] * 2, [torch.tensor([[0., 0., 96., 64.]])] * 2])
def test_fgd_is_finite_where_all_is_background_or_all_foreground(boxes, pair):
    student, teacher = pair
    foreground, background = box_masks(boxes)
    parts = focal_global.fgd_loss(student, teacher, foreground, background)
    gradient, = torch.autograd.grad(sum(parts.values()), student)
    assert gradient.isfinite().all()
    empty = 'foreground' if len(boxes[0]) == 0 else 'background'
    assert [name for name, value in parts.items() if value == 0] == [empty]


def test_context_pool_is_the_attended_mean(pair):
    feature, _ = pair
    logits = torch.randn(2, 1, *CELLS, dtype=torch.float64)
    weights = logits.flatten(1).exp()
    expected = (feature.flatten(2) * weights[:, None]).sum(2) / weights.sum(1)[:, None]
    torch.testing.assert_close(focal_global.context_pool(feature, logits), expected[:, :, None, None])


# PKD, CWD

def test_pearson_distance_is_one_minus_the_correlation(pair):
    student, teacher = (feature.detach() for feature in pair)
    correlations = [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()]))[0, 1]
                    for c in range(student.shape[1])]
    count = student[:, 0].numel()
    # The unbiased deviation leaves (n - 1) / n of it.
    expected = (1 - torch.stack(correlations).mean()) * (count - 1) / count
    torch.testing.assert_close(features.pearson_distance(student, teacher), expected, rtol=1e-5, atol=0)


def test_pearson_distance_ignores_scale_and_offset(pair):
    student, teacher = pair
    scale, offset = torch.tensor([0.5, 2, 3, 10, 100]).view(1, 5, 1, 1), torch.randn(1, 5, 1, 1)
    torch.testing.assert_close(features.pearson_distance(student * scale + offset, teacher * 7 - 3),
                               features.pearson_distance(student, teacher), rtol=1e-4, atol=0)


def test_channel_wise_kl_equals_the_loop(pair):
    student, teacher = (feature.detach() for feature in pair)
    expected = 0
    for n in range(2):
        for c in range(5):
            p_student, p_teacher = ((feature[n, c] / 3).flatten().softmax(0) for feature in (student, teacher))
            expected += 9 * (p_teacher * (p_teacher / p_student).log()).sum() / 10
    torch.testing.assert_close(features.channel_wise_kl(student, teacher, 3.0), expected)


def test_fkd_parts_are_norms(pair, mask):
    student, teacher = (feature.detach() for feature in pair)
    parts = features.fkd_loss(student, teacher, mask, student.mean((2, 3)), student.mean(1, keepdim=True), student * 2,
                              teacher * 3, feature_weight=2, pooling_weight=3, relation_weight=5)
    difference = student - teacher
    torch.testing.assert_close(parts['imitation'], 2 * (difference.square() * mask[:, None]).sum().sqrt())
    torch.testing.assert_close(parts['channel'], 3 * difference.mean((2, 3)).square().sum().sqrt())
    torch.testing.assert_close(parts['spatial'], 3 * difference.mean(1).square().sum().sqrt())
    torch.testing.assert_close(parts['relation'], 5 * (student * 2 - teacher * 3).square().sum().sqrt())
