"""The one form of dense outputs, against what MMDetection's heads themselves make of theirs."""
import pytest
import torch
from mmdet.models.dense_heads import RetinaHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from kd_det.heads import HeadError, read_dense, reads
from kd_det.heads.families import RetinaReader
from kd_det.heads.readers import READERS, find_reader
from kd_det.taps import record_calls

HEIGHT, WIDTH = 64, 96
FAMILIES = ['retina', 'retina_softmax', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet', 'rtmdet_separate', 'yolox',
            'rpn', 'ssd', 'yolov3']
DISTRIBUTED = ['gfl']


def _sample(boxes=((8, 8, 60, 50), )):
    shape = (HEIGHT, WIDTH)
    sample = DetDataSample(metainfo=dict(img_shape=shape, pad_shape=shape, batch_input_shape=shape))
    bboxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sample.gt_instances = InstanceData(bboxes=bboxes, labels=torch.zeros(len(bboxes), dtype=torch.long))
    return sample


def _predicted(head, maps):
    """Rows of class, score and box that the head itself predicts on the first image, without threshold and NMS."""
    if not hasattr(head, 'loss_cls'):
        head.loss_cls = None  # MMDetection 3.3.0 reads it when it predicts, but its SSDHead has none
    config = head.test_cfg.copy()
    config.update(nms=dict(type='nms', iou_threshold=1.1), max_per_img=10**6)  # an RPN suppresses in any case
    results = head.predict_by_feat(
        *maps, batch_img_metas=[_sample().metainfo] * 2, cfg=config, with_nms=head.num_classes == 1)[0]
    return torch.cat([results.labels[:, None], results.scores[:, None], results.bboxes], 1)


def _read(outputs, only_best_class, clip):
    """The same rows from what was read."""
    rows = []
    for level, boxes in enumerate(outputs.boxes):
        scores, boxes = outputs.probabilities(level)[0], boxes[0]
        if outputs.centerness is not None:
            scores = scores * outputs.centerness[level][0].sigmoid()[:, None]
        torch.testing.assert_close(scores.amax(1), outputs.scores(level)[0])
        if clip:
            boxes = boxes.clamp(boxes.new_zeros(4), boxes.new_tensor([WIDTH, HEIGHT] * 2))
        for label in range(scores.shape[1]):
            chosen = scores.argmax(1) == label if only_best_class else slice(None)
            here = scores[chosen, label, None]
            rows.append(torch.cat([torch.full_like(here, label), here, boxes[chosen]], 1))
    return torch.cat(rows)


def _sorted(rows):
    return rows[(rows[:, 0] * 2 + rows[:, 1]).argsort()]


@pytest.mark.parametrize('name', FAMILIES)
def test_boxes_and_scores_are_those_that_the_head_predicts(name, dense_head, features):
    head = dense_head(name).eval()
    maps = head(features())
    expected, outputs = _predicted(head, maps), read_dense(head, maps)
    rows = _read(outputs, only_best_class=name == 'yolox', clip=not name.startswith('yolo'))
    assert len(expected) == len(rows) >= 126  # three levels of 8 · 12, 4 · 6 and 2 · 3 cells
    torch.testing.assert_close(_sorted(rows), _sorted(expected), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_train_and_eval_mode_read_the_same(name, dense_head, features):
    head, inputs = dense_head(name), features()
    evaluated = read_dense(head.eval(), head(inputs))
    head.train()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    trained = read_dense(head, head(inputs))
    for field in ('logits', 'regressions', 'boxes', 'priors', 'objectness', 'centerness', 'distributions'):
        assert (getattr(trained, field) is None) == (getattr(evaluated, field) is None)
        for one, other in zip(getattr(trained, field) or (), getattr(evaluated, field) or ()):
            torch.testing.assert_close(one, other)
    assert (trained.shapes, trained.strides) == (((8, 12), (4, 6), (2, 3)), (8, 16, 32))
    assert (trained.distributions is not None) == (name in DISTRIBUTED)


def test_fcos_with_normalised_boxes_puts_out_other_units_in_eval_mode(dense_head, features):
    """The trap that the reader is for: raw outputs differ by the stride."""
    head, inputs = dense_head('fcos_normalized'), features()
    trained, evaluated = (head.train(mode)(inputs)[1] for mode in (True, False))
    for raw, other, stride in zip(trained, evaluated, (8, 16, 32)):
        torch.testing.assert_close(raw * stride, other)


@pytest.mark.parametrize('name', FAMILIES)
def test_gradient_reaches_the_features(name, dense_head, features):
    head, inputs = dense_head(name).train(), features()
    outputs = read_dense(head, head(inputs))
    sum(boxes.square().sum() for boxes in outputs.boxes).backward(retain_graph=True)
    assert all(feature.grad.abs().sum() > 0 for feature in inputs)
    for feature in inputs:
        feature.grad = None
    sum(outputs.probabilities(level).sum() for level in range(3)).backward()
    assert all(feature.grad.abs().sum() > 0 for feature in inputs)


@pytest.mark.parametrize('reduction', ['max', 'mean'])
@pytest.mark.parametrize('name', ['retina', 'retina_softmax', 'fcos'])
def test_probabilities_of_a_cell(name, reduction, dense_head, features):
    head = dense_head(name).eval()
    maps = head(features())
    outputs, (row, column) = read_dense(head, maps), (3, 5)
    logits = maps[0][0][1, :, row, column].view(-1, head.cls_out_channels)  # anchors of the cell, by class
    expected = logits.softmax(1)[:, :-1] if name == 'retina_softmax' else logits.sigmoid()
    expected = expected.amax(0) if reduction == 'max' else expected.mean(0)
    cells = outputs.cell_probabilities(0, reduction)
    assert cells.shape == (2, 3, 8, 12)
    torch.testing.assert_close(cells[1, :, row, column], expected)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_prior_lies_on_its_cell(name, dense_head, features):
    head = dense_head(name).eval()
    outputs = read_dense(head, head(features()))
    for priors, (height, width), stride in zip(outputs.priors, outputs.shapes, outputs.strides):
        centers = ((priors[:, :2] + priors[:, 2:]) / 2).view(height, width, -1, 2)
        columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing='xy')
        steps = torch.stack([columns, rows], -1)[:, :, None].float() * stride
        torch.testing.assert_close(centers - centers[0, 0], steps.expand_as(centers))
        assert (centers[0, 0] >= 0).all() and (centers[0, 0] <= stride).all()


@pytest.mark.parametrize('name', FAMILIES)
def test_positives_are_those_of_the_heads_own_assigner(name, dense_head, features):
    head = dense_head(name).train()
    head.init_weights()  # YOLOX assigns by its predictions, RTMDet too
    maps, method = head(features()), find_reader(type(head)).assigning_method
    with record_calls(head, method) as calls:
        head.loss(features(), [_sample(((8, 8, 60, 50), )), _sample(())])
    outputs = read_dense(head, maps, [call.returned for call in calls])
    positives = torch.cat([outputs.positives(level) for level in range(3)], 1)
    assert positives.shape == torch.cat(outputs.logits, 1).shape[:2]
    assert positives[0].any() and not positives[1].any()
    priors = torch.cat(outputs.priors)[positives[0]]
    assert ((priors[:, 0] < 60) & (priors[:, 2] > 8) & (priors[:, 1] < 50) & (priors[:, 3] > 8)).all()


@pytest.mark.parametrize('name', FAMILIES)
def test_targets_lead_positive_priors_to_their_boxes(name, dense_head, features):
    """Of heads with anchors and deltas; ATSS keeps its targets as boxes, the others as normalised deltas."""
    head = dense_head(name).train()
    head.init_weights()
    boxes = (8, 8, 60, 50), (30, 40, 90, 62)
    with record_calls(head, find_reader(type(head)).assigning_method) as calls:
        head.loss(features(), [_sample(boxes), _sample(())])
    outputs = read_dense(head, head(features()), [call.returned for call in calls])
    if name not in ('retina', 'retina_softmax', 'atss', 'rpn', 'ssd'):
        assert outputs.targets is None
        return
    found = set()
    for targets, assigned, priors in zip(outputs.targets, outputs.assigned, outputs.priors):
        assert targets[~assigned].abs().sum() == 0 and targets.shape[:2] == assigned.shape
        priors, (shift, scale) = priors[assigned[0]], targets[0][assigned[0]].chunk(2, 1)
        sizes = priors[:, 2:] - priors[:, :2]
        centers, sizes = (priors[:, :2] + priors[:, 2:]) / 2 + shift * sizes, sizes * scale.exp()
        found |= {tuple(box) for box in torch.cat([centers - sizes / 2, centers + sizes / 2], 1).round().tolist()}
    assert found and found <= set(boxes)


def test_positives_of_yolof_lie_on_their_own_image():
    """It has one level, and returns the labels of a batch as one tensor."""
    coder = dict(type='DeltaXYWHBBoxCoder', target_stds=[1., 1., 1., 1.], add_ctr_clamp=True, ctr_clamp=32)
    anchors = dict(type='AnchorGenerator', ratios=[1.0], scales=[1, 2], strides=[16])
    torch.manual_seed(0)
    head = MODELS.build(dict(
        type='YOLOFHead', num_classes=3, in_channels=8, num_cls_convs=1, num_reg_convs=1, norm_cfg=dict(type='BN'),
        reg_decoded_bbox=True, anchor_generator=anchors, bbox_coder=coder, loss_bbox=dict(type='GIoULoss'),
        train_cfg=dict(assigner=dict(type='UniformAssigner', pos_ignore_thr=0.15, neg_ignore_thr=0.7),
                       allowed_border=-1, pos_weight=-1, debug=False))).train()
    levels = (torch.randn(2, 8, HEIGHT // 16, WIDTH // 16), )
    with record_calls(head, 'get_targets') as calls:
        head.loss(levels, [_sample(((8, 8, 40, 40), )), _sample(())])
    outputs = read_dense(head, head(levels), [call.returned for call in calls])
    labels = calls[0].returned[0]
    assert labels.shape == outputs.logits[0].shape[:2] == (2, 4 * 6 * 2)
    assert torch.equal(outputs.positives(0), (labels >= 0) & (labels < 3))
    assert outputs.positives(0)[0].any() and not outputs.positives(0)[1].any()
    assert outputs.targets is None


def test_positives_that_no_assignment_tells(dense_head, features):
    head = dense_head('yolov3').eval()
    with pytest.raises(HeadError, match="not known for this head.*normalizer='confidence'"):
        read_dense(head, head(features())).positives(0)


def test_a_level_that_is_not_there(dense_head, features):
    head = dense_head('fcos').eval()
    outputs = read_dense(head, head(features()))
    assert outputs.level_of(16) == 1
    with pytest.raises(HeadError, match=r'no level of stride 64; its strides are \[8, 16, 32\]'):
        outputs.level_of(64)


def test_a_subclass_is_read_unless_it_has_a_forward_of_its_own(dense_head):

    class SameOutputs(RetinaHead):
        pass

    class OwnTargets(RetinaHead):

        def get_targets(self, *args, **kwargs):
            raise NotImplementedError

    class OwnOutputs(RetinaHead):

        def forward_single(self, x):
            return x

    retina = dense_head('retina')
    for kind, assigns in ((SameOutputs, True), (OwnTargets, False)):
        retina.__class__ = kind
        assert ('positives' in find_reader(type(retina)).parts) == assigns
    retina.__class__ = OwnOutputs
    with pytest.raises(HeadError, match='outputs of a OwnOutputs can not be read. Known are ATSSHead, .*YOLOXHead'):
        find_reader(type(retina))
    try:
        reads(OwnOutputs)(RetinaReader)
        assert type(find_reader(type(retina))) is type(READERS[RetinaHead]) is RetinaReader
    finally:
        del READERS[OwnOutputs]
