"""The contracts of DetectionDistiller, each tested against what a plain wrapper would do."""
import copy
import weakref
from functools import partial

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.model import ExponentialMovingAverage, PretrainedInit
from mmengine.optim import OptimWrapper
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict

from kd_det.context import DistillContext
from kd_det.losses import DistillTerm
from kd_det.taps import TapError


def _step(model, data):
    data = model.data_preprocessor(copy.deepcopy(data), True)
    return model(**data, mode='loss')


def _train(model, data, steps=3):
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    torch.manual_seed(5)
    for _ in range(steps):
        model.train_step(copy.deepcopy(data), optimizer)
    return model


@pytest.fixture(params=['retinanet', 'faster_rcnn'])
def pair(request):
    """A student and a wider, deeper teacher whose neck is wider too, so that adapters are needed."""
    make = request.getfixturevalue(request.param)
    return make(), make(depth=50, neck=12)


def test_names_are_those_of_the_plain_student(pair, distiller):
    model, plain = distiller(*pair), MODELS.build(pair[0])
    assert list(model.state_dict()) == list(plain.state_dict())
    assert set(dict(plain.named_parameters())) < set(dict(model.named_parameters()))
    parts = {name.split('.')[0] for name, _ in model.named_parameters()}
    assert parts - {'backbone', 'neck', 'bbox_head', 'rpn_head', 'roi_head'} == {'distill_terms'}
    assert model.with_neck and model.neck is model.student.neck


def test_plain_weights_load_with_nothing_missing_or_unexpected(pair, distiller):
    model, plain = distiller(*pair), MODELS.build(pair[0])
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    averaged = ExponentialMovingAverage(model)
    averaged.load_state_dict(averaged.state_dict(), strict=True)
    adapters = copy.deepcopy(model.terms.state_dict())
    other = {key: value + 1 for key, value in plain.state_dict().items()}
    mmengine_load_state_dict(model, other, strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in other.items())
    assert adapters and all(torch.equal(model.terms.state_dict()[key], value) for key, value in adapters.items())


@pytest.mark.parametrize('weight', [0, dict(type='Stop', value=0.0, epochs=1)])
def test_weights_of_zero_train_the_plain_student_bit_for_bit(pair, distiller, batch, weight):
    model = distiller(*pair, distill=dict(fgd=dict(type='FGD', weight=weight)), seed=3)
    model.init_weights()
    torch.manual_seed(3)
    plain = MODELS.build(pair[0])
    plain.init_weights()
    _train(model, batch()), _train(plain, batch())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())


def test_initialisation_is_that_of_the_plain_student(pair, distiller):
    model = distiller(*pair, seed=3)
    model.init_weights()
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = MODELS.build(pair[0])
    plain.init_weights()
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())


def test_teacher_is_built_for_training_only(pair, distiller, batch):
    model = distiller(*pair, teacher=dict(config=pair[1], checkpoint='nowhere.pth'))
    model.eval()
    assert len(model.val_step(batch())) == 2 and model.teacher is None
    model.train()
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        _step(model, batch())


def test_prediction_is_the_students(pair, distiller, batch):
    model, data = distiller(*pair).eval(), batch()
    expected = model.student.eval().test_step(copy.deepcopy(data))
    for sample, other in zip(model.test_step(copy.deepcopy(data)), expected):
        assert torch.equal(sample.pred_instances.bboxes, other.pred_instances.bboxes)


def test_teacher_belongs_to_nothing_and_nothing_changes_it(pair, distiller, batch):
    pair[1]['backbone']['plugins'] = [dict(cfg=dict(type='DropBlock', drop_prob=0.9, block_size=3),
                                           position='after_conv2')]
    model = distiller(*pair)
    teacher = model.build_teachers()[0]
    before, weights = teacher.fingerprint(), {id(parameter) for parameter in teacher.model.parameters()}
    model.train()
    images, shapes = torch.randn(2, 3, 64, 64), [(64, 64)] * 2
    first, second = teacher.observe(images, shapes)[0], teacher.observe(images, shapes)[0]
    assert all(torch.equal(a, b) for a, b in zip(first['neck'], second['neck']))  # dropping is off
    _train(model, batch())
    assert not any(module.training for module in teacher.model.modules())
    assert teacher.fingerprint() == before
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not weights & {id(parameter) for parameter in model.parameters()}
    averaged = ExponentialMovingAverage(model)
    assert averaged.module.teacher is teacher
    assert averaged.module.student.backbone is averaged.module.backbone is not model.backbone


def test_teacher_follows_to_and_half(pair, distiller):
    model = distiller(*pair)
    model.build_teachers()
    model.half()
    assert {parameter.dtype for parameter in model.teacher.model.parameters()} == {torch.float16}
    later = distiller(*pair).double()
    assert next(later.build_teachers()[0].model.parameters()).dtype == torch.float64


def test_student_and_teacher_run_once_and_each_adapter_learns(pair, distiller, batch):
    model = distiller(*pair)
    runs = dict(student=0, teacher=0)

    def count(who, *args):
        runs[who] += 1

    model.backbone.register_forward_hook(partial(count, 'student'))
    model.build_teachers()[0].model.backbone.register_forward_hook(partial(count, 'teacher'))
    losses = _step(model, batch())
    assert runs == dict(student=1, teacher=1)
    assert losses['loss_fgd'].isfinite() and losses['loss_fgd'] > 0
    total, log = model.parse_losses(losses)
    parts = [log[f'distill/fgd_{part}'] for part in ('foreground', 'background', 'attention', 'relation')]
    torch.testing.assert_close(sum(parts), log['loss_fgd'].detach())
    torch.testing.assert_close(total, sum(value for name, value in log.items() if name.startswith('loss_')))
    total.backward()
    # A context block that starts as the identity passes gradients to its last layer only; after one step, to all.
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad()
    model.parse_losses(_step(model, batch()))[0].backward()
    assert all(parameter.grad is not None for parameter in model.terms.parameters())
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.terms.named_parameters()
               if 'adapters' in name)


def test_nothing_of_the_step_is_kept(pair, distiller, batch):
    class Spy(DistillTerm):

        def forward(self, context):
            contexts.append(context)
            assert not context.teachers[0]['neck'][0].requires_grad
            return context.student['neck'][0].mean() * 0 + 1.0

    contexts, model = [], distiller(*pair)
    model.terms['fgd'].forward = partial(Spy.forward, None)
    _step(model, batch())
    assert isinstance(contexts[0], DistillContext) and not contexts[0].teachers[0]
    assert not model.connections.student_taps._seen and not model.teacher.taps._seen


def test_a_part_that_is_called_a_loss_counts_once(pair, distiller, batch):
    model = distiller(*pair)
    model.terms['fgd'].forward = lambda context: dict(loss_fg=context.student['neck'][0].mean() * 0 + 1.0)
    losses = _step(model, batch())
    assert losses['distill/fgd_part_fg'] == losses['loss_fgd'] == 1 and not [
        name for name in losses if 'loss' in name and name.startswith('distill/')]


def test_a_stopped_term_leaves_the_teacher_alone_and_still_feeds_every_adapter_a_gradient(pair, distiller, batch):
    model = distiller(*pair, distill=dict(fgd=dict(type='FGD', weight=dict(type='Stop', value=1.0, epochs=2))))
    model.set_progress(iteration=20, epoch=2.0)
    model.build_teachers()[0].model.backbone.forward = None  # running it would fail
    losses = _step(model, batch())
    assert losses['loss_fgd'] == 0
    model.parse_losses(losses)[0].backward()
    assert all(parameter.grad is not None for parameter in model.terms.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_finite_under_autocast_and_on_hard_batches(pair, distiller, batch, dtype):
    model = distiller(*pair)
    for data in (batch(boxes=((), ())),  # no boxes at all
                 batch(shapes=((64, 64), ), boxes=(((2, 2, 20, 20), ), )),  # 1×1 level, batch of one
                 batch(shapes=((64, 96), (33, 40)))):  # padding
        model.zero_grad()
        with torch.autocast('cpu', dtype=dtype):
            losses = _step(model, data)
        assert losses['loss_fgd'].dtype == torch.float32
        model.parse_losses(losses)[0].backward()
        assert all(value.isfinite().all() for name, value in losses.items() if name.startswith('loss_fgd'))
        assert all(parameter.grad.isfinite().all() for parameter in model.terms.parameters())


def test_automatic_inheritance_takes_all_parts_of_the_same_type_but_the_backbone(faster_rcnn, retinanet, distiller):
    def inherited(*pair):
        model = distiller(*pair, inherit='auto', distill=dict())
        model.init_weights()
        return model.inherited_parts

    assert inherited(faster_rcnn(), faster_rcnn(depth=50)) == ('neck', 'rpn_head', 'roi_head')
    assert inherited(retinanet(), faster_rcnn()) == ('neck', )


def test_automatic_inheritance_takes_the_whole_transformer_of_a_detr(detr, distiller):
    model = distiller(detr('DINO'), detr('DINO', depth=50), inherit='auto', distill=dict())
    model.init_weights()
    student, teacher = model.state_dict(), model.teacher.model.state_dict()
    others = {key for key in student if key in teacher and student[key].shape != teacher[key].shape
              or key.startswith('backbone.')}
    assert 'level_embed' in student.keys() - others and all('convs' in key for key in others if key.startswith('neck'))
    assert all(torch.equal(student[key], teacher[key]) for key in student.keys() - others)


@pytest.mark.parametrize('own, theirs', [(1, 3), (3, 1), (2, 2)])
def test_inherited_branches_of_a_detr_do_what_they_did_in_a_teacher_of_other_depth(own, theirs, detr, distiller):
    """Branches are counted by decoder layers; the last is for the encoder's proposals, wherever it stands."""
    model = distiller(detr('DINO', layers=own), detr('DINO', layers=theirs), inherit=('bbox_head', ), distill=dict())
    for parameter in model.build_teachers()[0].model.bbox_head.parameters():
        torch.nn.init.normal_(parameter)
    model.init_weights()
    head, teacher = model.bbox_head, model.teacher.model.bbox_head
    expected = [*range(min(own, theirs)), *[None] * (own - theirs), theirs]
    for branches, of_teacher in ((head.cls_branches, teacher.cls_branches), (head.reg_branches, teacher.reg_branches)):
        assert len(branches) == len(expected)
        for branch, index in zip(branches, expected):
            alike = [all(map(torch.equal, branch.parameters(), each.parameters())) for each in of_teacher]
            assert alike == [other == index for other in range(theirs + 1)]
    assert {key.split('.')[2] for key in model.not_inherited} == {str(index) for index in range(theirs, own)}


def test_inheritance_copies_what_fits_and_tells_what_does_not(faster_rcnn, distiller):
    model = distiller(faster_rcnn(), faster_rcnn(depth=50), inherit=('neck', 'rpn_head', 'roi_head'))
    model.init_weights()
    teacher = model.teacher.model.state_dict()
    for key, value in model.state_dict().items():
        # The laterals have wider inputs there, and a bias does not go without its weight.
        part, of_lateral = key.split('.')[0], key.startswith('neck.lateral_convs')
        fits = key in teacher and teacher[key].shape == value.shape and not of_lateral
        is_teachers = key in teacher and torch.equal(teacher[key], value)
        assert (part in model.inherited_parts and fits) == (is_teachers and part != 'backbone' and not of_lateral)
        assert (part in model.inherited_parts and not fits) == any(each.startswith(key) for each in model.not_inherited)
    assert 'neck.lateral_convs.0.conv.bias (its layer stays)' in model.not_inherited
    counts = model.origins.count_by_part()
    assert counts['rpn_head']['inherited'] == sum(parameter.numel() for parameter in model.rpn_head.parameters())
    assert counts['backbone']['random'] and counts['neck']['random'] and counts['neck']['inherited']


@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
def test_pretrained_weights_are_told_apart(kind, retinanet, distiller, tmp_path):
    donor = MODELS.build(retinanet()['backbone'])
    state = {key: value for key, value in donor.state_dict().items() if not key.startswith('layer4')}
    torch.save(dict(state_dict=state), tmp_path / 'backbone.pth')
    student = retinanet()
    student['backbone']['init_cfg'] = dict(type=kind, checkpoint=str(tmp_path / 'backbone.pth'))
    model = distiller(student, retinanet())
    model.init_weights()
    counts = model.origins.count_by_part()['backbone']
    assert counts['random'] == sum(parameter.numel() for parameter in donor.layer4.parameters())
    assert counts['pretrained'] == sum(parameter.numel() for parameter in donor.parameters()) - counts['random']


def test_several_teachers(retinanet, distiller, batch):
    teachers = [dict(config=retinanet(neck=12), random_teacher=True),
                dict(config=retinanet(neck=16), random_teacher=True)]
    model = distiller(retinanet(), None, teacher=teachers,
                      distill=dict(first=dict(type='FGD'), second=dict(type='FGD', teacher=1)))
    losses = _step(model, batch())
    assert losses['loss_first'] > 0 and losses['loss_second'] > 0
    assert model.terms['second'].adapters[0].out_channels == 16


def test_two_teachers_pull_by_their_weights(retinanet, distiller, batch):
    teachers = [dict(config=retinanet(neck=12), random_teacher=True) for _ in range(2)]

    def losses(**weights):
        terms = {name: dict(type='FGD', teacher=index, weight=weight)
                 for index, (name, weight) in enumerate(weights.items())}
        return _step(distiller(retinanet(), None, teacher=teachers, distill=terms), batch())

    shares, whole = losses(first=0.7, second=0.3), losses(first=1.0, second=1.0)
    assert whole['loss_first'] != whole['loss_second']
    assert shares['loss_first'].item() == pytest.approx(0.7 * whole['loss_first'].item())
    assert shares['loss_second'].item() == pytest.approx(0.3 * whole['loss_second'].item())


@pytest.mark.parametrize('changes, error, message', [
    (dict(distill=dict(fgd=dict(type='FGD', tap='nek'))), TapError, "no module 'nek'.*neck"),
    (dict(distill=dict(fgd=dict(type='FGD', tap='bbox_head'))), TapError, 'bbox_head'),
    (dict(distill=dict(fgd=dict(type='FGD', levels=(0, 7)))), ValueError, 'model.distill.fgd: .*there is no level 7'),
    (dict(distill=dict(fgd=dict(type='FGD', temprature=1))), ValueError,
     r'model\.distill\.fgd\.temprature: there is no such key'),
    (dict(distill=dict(fgd=dict(type='FDG'))), ValueError, "model.distill.fgd.type: there is no 'FDG'"),
    (dict(distill=dict(loss_fgd=dict(type='FGD'))), ValueError, "may not contain 'loss'"),
    (dict(distill=dict(fgd=dict(tap='neck'))), ValueError, "expected a dict with a 'type'"),
    (dict(distill=dict(fgd=dict(type='FPN', in_channels=[1], out_channels=1, num_outs=1))), ValueError,
     'expected a distillation term, which FPN is not'),
    (dict(distill=dict(fgd=dict(type='FGD', weight='1'))), ValueError,
     'expected a number of at least 0, or a schedule'),
    (dict(distill=dict(fgd=dict(type='FGD', teacher=1))), ValueError, 'teacher: expected an index below 1'),
    (dict(teacher=dict(checkpoint='x.pth')), ValueError, r'model\.teacher\.config: expected .*, got nothing'),
    (dict(teacher=dict(config='nowhere.py')), FileNotFoundError, "no config file 'nowhere.py'"),
    (dict(inherit='head'), ValueError, "no part 'head'; it has backbone, bbox_head, neck"),
])
def test_errors_say_what_is_wrong_and_where(retinanet, distiller, changes, error, message):
    with pytest.raises(error, match=message):
        distiller(retinanet(), retinanet(), **changes).init_weights()


def test_what_a_guide_put_out_is_let_go_of_once_the_last_term_has_read_it(retinanet, distiller, batch, monkeypatch):
    mask = dict(type='TeacherConfidence', head='bbox_head')
    model = distiller(retinanet(), retinanet(depth=50, neck=12), distill=dict(
        first=dict(type='FeatureImitation', mask=mask), second=dict(type='FeatureImitation', mask=mask),
        third=dict(type='PKD'))).train()
    held, alive = [], []

    def watch(name):
        term, forward = model.terms[name], type(model.terms[name]).forward

        def run(context):
            outputs = context.teacher_outputs[0].get('bbox_head')
            held.extend([] if held else [weakref.ref(outputs), weakref.ref(outputs.logits[0])])
            alive.append((name, 'bbox_head' in context.teacher_outputs[0], [each() is not None for each in held]))
            return forward(term, context)

        monkeypatch.setattr(term, 'forward', run)

    for name in model.terms:
        watch(name)
    losses = _step(model, batch())
    # The second term needs the logits for no gradient: once it has its mask they are gone, and the features stay.
    assert alive == [('first', True, [True, True]), ('second', True, [True, True]), ('third', False, [False, False])]
    sum(losses[f'loss_{name}'] for name in model.terms).backward()
    data = model.data_preprocessor(batch(), True)
    context = model.observe(data['inputs'], data['data_samples'], model.terms).context
    assert 'bbox_head' in context.teacher_outputs[0] and 'neck' in context.teachers[0]
