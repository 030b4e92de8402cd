"""The queries of DETRs: a student's from its own loss, a teacher's by running its transformer."""
import pytest
import torch
from mmdet.registry import MODELS

from kd_det.heads import HeadError, QueryOutputs, StudentHeads, TeacherForward, find_head, read_queries, run_heads
from kd_det.heads.queries import join_queries
from kd_det.taps import record_calls
from kd_det.teachers.probe import make_shape_samples

KINDS = ('DETR', 'ConditionalDETR', 'DABDETR', 'DeformableDETR', 'DINO')
NAME = 'bbox_head.queries'
# The second is padded; the third has no box.
IMAGES = dict(shapes=((64, 96), (48, 56), (64, 64)), boxes=(((8, 8, 40, 40), (50, 10, 90, 60)), ((4, 4, 40, 44), ), ()))


@pytest.fixture
def step(batch):
    """Builds a DETR and reads its queries in one training step; returns the model, the outputs, and the batch."""

    def run(config, data=None):
        torch.manual_seed(0)
        model = MODELS.build(config).train()
        data = model.data_preprocessor(data or batch(**IMAGES), True)
        heads = StudentHeads(model, [NAME])
        with heads.capture() as outputs:
            model(**data, mode='loss')
        return model, outputs[NAME], data

    return run


@pytest.mark.parametrize('kind', KINDS)
def test_queries_and_their_boxes_are_those_of_the_loss(kind, detr, step):
    given = []

    with pytest.MonkeyPatch.context() as patch:
        head = MODELS.get(f'{kind}Head')
        original = head.loss_by_feat_single
        patch.setattr(head, 'loss_by_feat_single',
                      lambda self, *args, **kwargs: given.append(args) or original(self, *args, **kwargs))
        model, queries, data = step(detr(kind, layers=3))
    assert queries.activation == ('softmax' if kind == 'DETR' else 'sigmoid') and queries.num_classes == 3
    assert queries.logits.shape == (3, 3, 10, 3 + (kind == 'DETR')) and queries.boxes.shape == (3, 3, 10, 4)
    assert queries.logits.requires_grad and queries.boxes.requires_grad
    for layer, (logits, boxes) in enumerate(given[:3]):  # later calls are for the encoder's proposals
        assert torch.equal(queries.logits[layer], logits) and torch.equal(queries.boxes[layer], boxes)


@pytest.mark.parametrize('kind', KINDS)
def test_assignment_is_that_of_the_heads_own_matcher(kind, detr, step):
    model, queries, data = step(detr(kind))
    truth = [sample.gt_instances for sample in data['data_samples']]
    for layer in range(2):
        for image, instances in enumerate(truth):
            assigned = queries.assigned[layer, image]
            assert sorted(assigned[assigned >= 0].tolist()) == list(range(len(instances)))
            labels = model.bbox_head._get_targets_single(queries.logits[layer, image], queries.boxes[layer, image],
                                                         instances, data['data_samples'][image].metainfo)[0]
            assert torch.equal(labels < 3, assigned >= 0)
            assert torch.equal(labels[assigned >= 0], instances.labels[assigned[assigned >= 0]])


@pytest.mark.parametrize('kind', KINDS)
def test_costs_of_boxes_are_those_by_which_the_matcher_assigns(kind, detr, batch, step):
    model, queries, data = step(detr(kind))
    for image, sample in enumerate(data['data_samples'][:2]):
        cost = queries.box_cost(queries.logits[1, image], queries.boxes[1, image], sample.gt_instances.bboxes,
                                sample.gt_instances.labels, sample.img_shape)
        assigned = queries.assigned[1, image]
        assert cost.shape == (10, len(sample.gt_instances)) and not cost.requires_grad
        chosen = cost[assigned >= 0].gather(1, assigned[assigned >= 0, None]).sum()
        others = [cost[torch.randperm(10)[:cost.shape[1]], torch.arange(cost.shape[1])].sum() for _ in range(50)]
        assert chosen <= min(others) + 1e-6 < max(others)


@pytest.mark.parametrize('kind', KINDS)
def test_a_teachers_queries_are_those_that_it_predicts_from(kind, detr, batch):
    torch.manual_seed(0)
    model = MODELS.build(detr(kind, queries=12, layers=3)).eval()
    data = model.data_preprocessor(batch(**IMAGES), False)
    shapes = [sample.img_shape for sample in data['data_samples']]
    images = data['inputs']
    samples = make_shape_samples(images.shape[-2:], shapes)
    assert not hasattr(samples[0], 'gt_instances')
    forward = TeacherForward(model, model.extract_feat(images), {}, samples)
    queries = run_heads([NAME], forward)[NAME]
    assert queries.logits.shape[:3] == (3, 3, 12) and queries.assigned is None and queries.box_cost is None
    with record_calls(model.bbox_head, 'predict_by_feat') as calls:
        model.predict(images, data['data_samples'])
    (given, ) = calls
    logits, boxes = list(given.arguments.values())[:2]
    torch.testing.assert_close(queries.logits[-1], logits[-1])
    torch.testing.assert_close(queries.boxes[-1], boxes[-1])


def test_scores_are_the_largest_probability_of_a_class(detr, step):
    for kind in ('DETR', 'DINO'):
        queries = step(detr(kind))[1]
        probabilities = queries.logits.softmax(-1)[..., :-1] if kind == 'DETR' else queries.logits.sigmoid()
        assert torch.equal(queries.scores(), probabilities.max(-1).values)
        last = queries.last(1)
        assert torch.equal(last.logits[0], queries.logits[1]) and torch.equal(last.assigned[0], queries.assigned[1])


@pytest.mark.parametrize('kind', ['DETR', 'DINO'])
def test_some_classes_alone(kind, detr, step):
    queries = step(detr(kind))[1]
    restricted = queries.restrict([2, 0])
    assert restricted.num_classes == 2 and torch.equal(restricted.logits[..., :2], queries.logits[..., [2, 0]])
    assert restricted.boxes is queries.boxes and restricted.assigned is queries.assigned


def test_what_is_no_head_of_queries(detr, retinanet):
    with pytest.raises(HeadError, match='A RetinaHead predicts no queries'):
        find_head(MODELS.build(retinanet()), NAME)
    model = MODELS.build(detr())
    with pytest.raises(HeadError, match='A DeformableDETRHead predicts queries, nothing cell by cell'):
        find_head(model, 'bbox_head')

    class OtherHead(type(model.bbox_head)):

        def forward(self, *args):
            return None

    model.bbox_head.__class__ = OtherHead
    with pytest.raises(HeadError, match='A OtherHead predicts no queries'):
        find_head(model, NAME)


def test_an_assigner_that_can_not_be_followed(detr):
    head = MODELS.build(detr()).bbox_head
    with pytest.raises(HeadError, match='A HungarianAssigner made 1 assignments for 2 decoder layers and 1 images'):
        read_queries(head, torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 4), [None])


def test_the_mean_of_detectors_pairs_their_queries():
    """Whatever the order of the others' queries, and where another has fewer."""
    torch.manual_seed(0)
    boxes = torch.rand(2, 3, 6, 4) * 0.4 + 0.3
    first = QueryOutputs(3 * torch.randn(2, 3, 6, 5), boxes, 'sigmoid')
    order = torch.stack([torch.randperm(6) for _ in range(6)]).view(2, 3, 6)
    moved = first.select(order)
    other = QueryOutputs(moved.logits + 0.1, moved.boxes + 0.01, 'sigmoid')
    shares = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    joined = join_queries([first, other], shares)
    weight = shares[:, 1].view(1, 3, 1, 1)
    torch.testing.assert_close(joined.logits, first.logits + 0.1 * weight)
    torch.testing.assert_close(joined.boxes, first.boxes + 0.01 * weight)
    fewer = QueryOutputs(other.logits[:, :, :4], other.boxes[:, :, :4], 'sigmoid')
    joined = join_queries([first, fewer], torch.full((3, 2), 0.5))
    kept = (joined.logits == first.logits).all(-1)
    assert (kept.sum(-1) == 2).all()  # they have no partner
    torch.testing.assert_close(joined.logits[~kept], first.logits[~kept] + 0.05)
    with pytest.raises(HeadError, match='other classes'):
        join_queries([first, QueryOutputs(torch.zeros(2, 3, 6, 4), boxes, 'sigmoid')], shares)
