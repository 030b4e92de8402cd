"""Decoders run on boxes of somebody else's choice: as they run on their own queries, and without a trace."""
import pytest
import torch
from mmdet.models.detectors import DINO
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.heads import HeadError, QueryDecoder, QueryOutputs, StudentHeads, TeacherForward, find_head, run_heads
from kd_det.heads.decoders import BoxQueries
from kd_det.taps import record_calls
from kd_det.teachers.probe import make_shape_samples

NAME, QUERIES = 'bbox_head.decoder', 'bbox_head.queries'
# The second is padded; the third has no box.
IMAGES = dict(shapes=((64, 96), (48, 56), (64, 64)), boxes=(((8, 8, 40, 40), (50, 10, 90, 60)), ((4, 4, 40, 44), ), ()))
# Name -> kind and changes of its config.
DETECTORS = {
    'DAB-DETR': ('DABDETR', {}), 'DAB-DETR with patterns': ('DABDETR', dict(num_patterns=1)),
    'Deformable DETR': ('DeformableDETR', {}), 'without refinement': ('DeformableDETR', dict(with_box_refine=False)),
    'two stages': ('DeformableDETR', dict(embed=256, as_two_stage=True)), 'DINO': ('DINO', {})}


@pytest.fixture
def build(detr):
    """Builds a detector, with weights drawn so that its queries do not answer alike."""

    def make(name: str, **changes) -> torch.nn.Module:
        kind, own = DETECTORS[name]
        torch.manual_seed(0)
        model = MODELS.build(detr(kind, **{**own, **changes}))
        for parameter in model.bbox_head.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def step(batch):
    """One training step of a detector: its decoder as terms are given it, and what it was called with itself."""

    def run(model: torch.nn.Module) -> tuple[QueryDecoder, dict, tuple]:
        data = model.data_preprocessor(batch(**IMAGES), True)
        heads = StudentHeads(model.train(), [NAME])
        with heads.capture() as outputs, record_calls(model, 'forward_decoder') as calls, \
                record_calls(model.bbox_head, 'forward') as answers:
            model(**data, mode='loss')
        return outputs[NAME], calls[0].arguments['kwargs'], answers[0].returned

    return run


def find_boxes(model: torch.nn.Module, given: dict) -> torch.Tensor:
    """(N, Q, 4): where a detector's own queries start; of one that starts from points with sizes that do not matter."""
    if type(model).__name__ == 'DABDETR':
        return given['query_pos'].sigmoid()
    points = given['reference_points']
    return points if points.shape[-1] == 4 else torch.cat([points, torch.rand_like(points)], -1)


def ask(boxes: torch.Tensor) -> BoxQueries:
    """Queries of the first class, each of which sees all of its image."""
    images, count = boxes.shape[:2]
    return BoxQueries(boxes, torch.zeros(images, count, dtype=torch.long), torch.zeros(images, count, count) > 0)


@pytest.mark.parametrize('name', [name for name in DETECTORS if name != 'DINO'])
def test_on_a_detectors_own_queries_it_says_what_the_detector_says(name, build, step):
    model = build(name)
    decoder, given, (logits, boxes) = step(model)
    own = find_boxes(model, given)
    found = decoder.run(ask(own))
    assert boxes.std(2).amax() > 0.01  # queries differ
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, boxes, rtol=1e-4, atol=1e-4)


def test_on_dinos_denoising_queries_it_says_what_dino_says(build, step, monkeypatch):
    model = build('DINO', dn_cfg=dict(label_noise_scale=1e-9, box_noise_scale=0.4,
                                      group_cfg=dict(dynamic=False, num_groups=2)))
    count = 2 * 2 * 2  # groups, with a positive and a negative query for each of at most two boxes
    original = model.dn_query_generator.generate_dn_mask

    def hide_from_others(*args, **kwargs):  # DINO lets them see the queries that it matches
        mask = original(*args, **kwargs)
        mask[:count, count:] = True
        return mask

    monkeypatch.setattr(model.dn_query_generator, 'generate_dn_mask', hide_from_others)
    decoder, given, (logits, boxes) = step(model)
    labels = torch.tensor([0, 1]).repeat(3, 4)  # those of the first image
    found = decoder.run(BoxQueries(given['reference_points'][:, :count], labels,
                                   given['dn_mask'][:count, :count].expand(3, -1, -1)))
    torch.testing.assert_close(found.logits[:, 0], logits[:, 0, :count], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes[:, 0], boxes[:, 0, :count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_hidden_query_has_no_influence(name, build, step):
    decoder, *_ = step(build(name))
    boxes, labels = torch.rand(3, 4, 4) * 0.4 + 0.3, torch.tensor([[0, 1, 2, 0]] * 3)
    hidden = torch.zeros(3, 4, 4, dtype=torch.bool)
    hidden[1, :3, 3] = True  # in one image alone
    before = decoder.run(BoxQueries(boxes, labels, hidden))
    changed = boxes.clone()
    changed[:, 3] = torch.tensor([0.2, 0.2, 0.1, 0.3])
    after = decoder.run(BoxQueries(changed, labels, hidden))
    assert torch.equal(after.logits[:, 1, :3], before.logits[:, 1, :3])
    for image in (0, 2):
        assert (after.logits[-1, image, :3] - before.logits[-1, image, :3]).abs().max() > 1e-6


@pytest.mark.parametrize('name', DETECTORS)
def test_a_run_draws_nothing_and_leaves_the_modes_of_all_modules(name, build, step):
    model = build(name)
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    decoder, *_ = step(model)
    queries = ask(torch.rand(3, 2, 4) * 0.4 + 0.3)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first, second = decoder.run(queries), decoder.run(queries)
    assert torch.equal(first.logits, second.logits) and first.logits.requires_grad and all(modes)
    assert modes == [module.training for module in model.modules()] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_teachers_is_that_of_its_prediction_and_runs_its_encoder_once(name, build, batch):
    model = build(name).eval().requires_grad_(False)
    data = model.data_preprocessor(batch(**IMAGES), False)
    samples = make_shape_samples(data['inputs'].shape[-2:], [each.img_shape for each in data['data_samples']])
    queries = ask(torch.rand(3, 2, 4) * 0.4 + 0.3)
    found = []
    for names, decoders in (([NAME], 0), ([NAME, QUERIES], 1)):  # alone no query of its own is made
        with record_calls(model.encoder, 'forward') as encoded, record_calls(model.decoder, 'forward') as decoded:
            forward = TeacherForward(model, model.extract_feat(data['inputs']), {}, samples)
            decoder = run_heads(names, forward)[NAME]
        assert len(encoded) == 1 and len(decoded) == decoders
        found.append(decoder.run(queries))
        assert not found[-1].logits.requires_grad
    assert torch.equal(found[0].logits, found[1].logits) and torch.equal(found[0].boxes, found[1].boxes)


def test_classes_shares_and_gradients():
    memory = torch.ones(2, 3, 4, requires_grad=True)

    class LabelReader(QueryDecoder):

        def decode(self, queries):
            labels = torch.nn.functional.one_hot(queries.labels, 5)[None]
            return QueryOutputs(self.memory.sum((1, 2)).view(1, 2, 1, 1) * labels, queries.boxes[None], 'sigmoid')

    decoder = LabelReader(memory, None, {}, 5, 'sigmoid')
    queries = BoxQueries(torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2), torch.zeros(2, 3, 3) > 0)
    assert decoder.num_classes == 5 and decoder.restrict([4, 1, 0]).num_classes == 3
    restricted = decoder.restrict([4, 1, 0]).run(queries)  # its labels are places among these
    assert torch.equal(restricted.logits, 12 * torch.eye(3).expand(1, 2, 3, 3))
    weighed = decoder.weigh(torch.tensor([0.0, 1.0])).weigh(torch.tensor([1.0, 0.5])).run(queries)
    assert torch.equal(weighed.logits, decoder.run(queries).logits)
    gradient, = torch.autograd.grad(weighed.logits.sum(), memory)
    assert torch.equal(gradient.sum((1, 2)), torch.tensor([0.0, 0.5]) * 3 * 12)
    assert not decoder.detach().run(queries).logits.requires_grad


def test_detectors_whose_queries_do_not_start_from_boxes(detr, distiller, retinanet):
    term = dict(distill=dict(a=dict(type='TargetQueries')))
    for kind in ('DETR', 'ConditionalDETR'):
        with pytest.raises(ConfigurationError, match=f'model.distill.a: A {kind}Head has no queries that start from'):
            distiller(detr(kind), detr('DINO'), **term)
    with pytest.raises(ConfigurationError, match='A RetinaHead has no queries that start from boxes, as those of DAB'):
        distiller(retinanet(), detr('DINO'), **term)

    class OwnQueries(DINO):

        def pre_decoder(self, *args, **kwargs):
            return super().pre_decoder(*args, **kwargs)

    model = MODELS.build(detr('DINO'))
    assert find_head(model, NAME) is model.bbox_head
    model.__class__ = OwnQueries
    with pytest.raises(HeadError, match='A OwnQueries has no queries that start from boxes'):
        find_head(model, NAME)


def test_guides_that_have_no_decoder_to_run(detr, distiller, tmp_path):
    """There is no mean of decoders, and no map of them to keep."""
    distill, student = dict(a=dict(type='TargetQueries')), detr('DINO')
    members = [dict(type='Peer', learner=0), dict(type='Peer', learner=1)]
    with pytest.raises(ConfigurationError, match="it reads 'bbox_head.decoder', of which there is no mean"):
        distiller(student, None, peers=1, teacher=dict(type='Ensemble', of=members), distill=distill)
    teacher = dict(config=detr('DINO'), random_teacher=True, cache=dict(dir=str(tmp_path)))
    with pytest.raises(ConfigurationError, match="a: it reads the outputs of the teacher's bbox_head.decoder"):
        distiller(student, None, teacher=teacher, distill=distill)
