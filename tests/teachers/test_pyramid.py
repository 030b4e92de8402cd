"""A neck computes no level that nothing reads; those that are read stay as they are."""
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from kd_det.taps import TapError
from kd_det.teachers import Teacher
from kd_det.teachers.teacher import UnreadLevel, cut_pyramid, mark_unread

SHAPES = [(64, 64)] * 2
COMPILED = dict(backend='aot_eager')  # without a C++ compiler


def _fpn(**options):
    return MODELS.build({**dict(type='FPN', in_channels=[4, 8, 16, 32], out_channels=8, num_outs=5), **options}).eval()


@pytest.mark.parametrize('options', [
    dict(), dict(add_extra_convs='on_output', relu_before_extra_convs=True),
    dict(add_extra_convs='on_lateral', num_outs=6),
    dict(start_level=1, add_extra_convs='on_input'), dict(start_level=1, add_extra_convs='on_output'),
    dict(num_outs=4), dict(start_level=1, end_level=2, num_outs=2)])
@torch.no_grad()
def test_levels_that_are_read_are_those_of_the_whole_neck(options):
    neck, inputs = _fpn(**options), [torch.randn(1, 4 * 2**level, 32 // 2**level, 32 // 2**level) for level in range(4)]
    whole, state = neck(inputs), list(neck.state_dict())
    for mask in range(1, 2**len(whole)):
        read = [bool(mask >> index & 1) for index in range(len(whole))]
        with cut_pyramid(neck, read) as indices:
            levels = dict(zip(indices, neck(inputs)))
        assert len(levels) == len(indices) and all(torch.equal(level, whole[index]) for index, level in levels.items())
        assert {index for index, each in enumerate(read) if each} <= levels.keys()
        assert min(levels) == min(read.index(True), len(neck.lateral_convs) - 1)
    assert all(map(torch.equal, neck(inputs), whole)) and list(neck.state_dict()) == state


def test_a_neck_is_whole_again_after_an_error():
    neck = _fpn()
    with pytest.raises(RuntimeError), cut_pyramid(neck, [False, True, False, False, False]):
        assert len(neck.lateral_convs) == 3
        neck([torch.randn(1, 5, 8, 8)] * 4)
    assert (neck.start_level, neck.num_outs, len(neck.lateral_convs), len(neck.fpn_convs)) == (0, 5, 4, 4)


def test_other_necks_stay_whole():
    neck = MODELS.build(dict(type='PAFPN', in_channels=[4, 8], out_channels=8, num_outs=3))  # derived from FPN
    with cut_pyramid(neck, [False, True, False]) as indices:
        assert list(indices) == [0, 1, 2] and len(neck.lateral_convs) == 2


def test_an_unread_level_is_never_read_silently():
    levels = mark_unread('neck', (torch.ones(1), ), [False, True])
    assert isinstance(levels[0], UnreadLevel) and torch.equal(levels[1], torch.ones(1)) and levels[0].nbytes == 0
    with pytest.raises(TapError, match="No term declares that it reads level 0 of the teacher's 'neck'"):
        levels[0].float()
    with pytest.raises(TypeError):
        torch.ones(1) + levels[0]


@pytest.fixture
def teacher(faster_rcnn, tmp_path):
    """Makes teachers of equal weights, five levels of strides 4 to 64."""
    torch.manual_seed(1)
    torch.save(dict(state_dict=MODELS.build(faster_rcnn()).state_dict()), tmp_path / 'teacher.pth')

    def make(taps=('neck', ), heads=('rpn_head', ), **options) -> Teacher:
        return Teacher(faster_rcnn(), str(tmp_path / 'teacher.pth'), taps=taps, heads=heads, **options,
                       student_preprocessor=MODELS.build(faster_rcnn()['data_preprocessor']))

    return make


def _counted(teacher) -> list:
    """Notes the names of the neck's convolutions as they run."""
    ran = []
    for kind in ('lateral_convs', 'fpn_convs'):
        for index, module in enumerate(getattr(teacher.model.neck, kind)):
            module.register_forward_pre_hook(lambda *args, name=f'{kind}.{index}': ran.append(name))
    return ran


WHOLE = [f'{kind}.{index}' for kind in ('lateral_convs', 'fpn_convs') for index in range(4)]


@pytest.mark.parametrize('engine', [dict(), dict(compile=COMPILED), dict(precision='bfloat16')])
def test_features_of_a_teacher(teacher, engine):
    made, whole, images = teacher(**engine), teacher(**engine), torch.randn(2, 3, 64, 64)
    for read in [(False, True, True, True, True), (True, ) * 5, (False, False, True, False, False)]:
        levels = made.observe(images, SHAPES, levels=dict(neck=read))[0]['neck']
        for each, level, expected in zip(read, levels, whole.observe(images, SHAPES)[0]['neck']):
            assert isinstance(level, UnreadLevel) != each
            if each:
                torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-6)
                assert level.is_contiguous()


def test_convolutions_of_unread_levels_do_not_run_unless_something_else_reads_them(teacher, batch):
    made, images = teacher(('neck', 'neck.lateral_convs.0')), torch.randn(2, 3, 64, 64)
    ran, read = _counted(made), (False, True, False, True, False)

    def ran_in(heads=(), taps=('neck', )) -> list:
        ran.clear()
        features, outputs = made.observe(images, SHAPES, heads, taps=taps, levels=dict(neck=read))
        assert [isinstance(level, UnreadLevel) for level in features['neck']] == [not each for each in read]
        return list(ran)

    assert ran_in() == [name for name in WHOLE if not name.endswith('.0')]
    assert ran_in(heads=['rpn_head']) == WHOLE
    assert ran_in(taps=('neck', 'neck.lateral_convs.0')) == WHOLE
    ran.clear()
    data = made.model.data_preprocessor(batch(), False)
    made.predict(data['inputs'], data['data_samples'])
    assert ran == WHOLE
    ran.clear()
    made.detect(data['inputs'], data['data_samples'])
    assert ran == WHOLE


def test_a_cache_keeps_the_levels_that_are_read(teacher, tmp_path):
    made = teacher(cache=dict(dir=str(tmp_path / 'cache'), dtype='float32'))
    images, read, expected = torch.randn(2, 3, 64, 64), (False, True, True, True, False), teacher()
    for hits in (0, 2):
        levels = made.observe(images, SHAPES, levels=dict(neck=read))[0]['neck']
        assert made.cache.counts.hits == hits
        for each, level, other in zip(read, levels, expected.observe(images, SHAPES)[0]['neck']):
            assert torch.equal(level, other) if each else isinstance(level, UnreadLevel)
    written = made.cache.counts.written
    assert all(isinstance(level, torch.Tensor) for level in made.observe(images, SHAPES)[0]['neck'])
    assert made.cache.counts.written > 3 * written  # stride 4 has three times the cells of the others together


def test_terms_tell_which_levels_they_read(faster_rcnn, retinanet, distiller, batch):
    """A Faster R-CNN of strides 4 to 64 teaches a RetinaNet of strides 8 to 128, as in some of the configs."""
    pkd = dict(type='PKD', tap='neck', levels=4, weight=1.0)
    model = distiller(retinanet(), faster_rcnn(), distill=dict(pkd=pkd))
    ran = _counted(model.build_teachers()[0])
    data = model.data_preprocessor(batch(), True)
    losses = model.loss(data['inputs'], data['data_samples'])
    assert ran == [name for name in WHOLE if not name.endswith('.0')]
    model.terms['pkd'].__class__ = type('Unaware', (type(model.terms['pkd']), ), dict(teacher_levels_read={}))
    whole = model.loss(data['inputs'], data['data_samples'])
    assert ran[6:] == WHOLE
    assert torch.equal(losses['loss_pkd'], whole['loss_pkd']) and losses['loss_pkd'] > 0


def test_levels_of_several_terms_add_up(faster_rcnn, distiller, batch):
    terms = dict(first=dict(type='PKD', levels=(1, ), weight=1.0), second=dict(type='CWD', levels=(2, )))
    model = distiller(faster_rcnn(), faster_rcnn(), distill=terms)
    ran, data = _counted(model.build_teachers()[0]), model.data_preprocessor(batch(), True)
    seen = model.observe(data['inputs'], data['data_samples'], ['first', 'second']).context.teachers[0]['neck']
    assert [isinstance(level, UnreadLevel) for level in seen] == [True, False, False, True, True]
    assert 'fpn_convs.1' in ran and 'fpn_convs.0' not in ran
    ran.clear()
    seen = model.observe(data['inputs'], data['data_samples'], ['second']).context.teachers[0]['neck']
    assert [isinstance(level, UnreadLevel) for level in seen] == [True, True, False, True, True]
    assert 'fpn_convs.2' in ran and 'fpn_convs.1' not in ran


def test_pseudo_labels_come_from_the_whole_detector(faster_rcnn, retinanet, distiller, batch):
    model = distiller(retinanet(), faster_rcnn(), distill=dict(pkd=dict(type='PKD', levels=4, weight=1.0)),
                      pseudo_labels=dict(score=0.0))
    ran, data = _counted(model.build_teachers()[0]), batch()
    for sample in data['data_samples']:
        sample.set_metainfo(dict(unlabelled=True))
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    data = model.data_preprocessor(data, True)
    model.loss(data['inputs'], data['data_samples'])
    assert ran == [*WHOLE, *(name for name in WHOLE if not name.endswith('.0'))]
