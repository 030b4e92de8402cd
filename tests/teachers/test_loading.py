import re
from collections import OrderedDict

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit

from kd_det.compat import CheckpointError
from kd_det.compat.checkpoint import NotFiniteError
from kd_det.teachers import TeacherError, load_strictly, read_model_config
from kd_det.teachers.loading import is_pretrained, remove_pretrained


@pytest.fixture
def detector(retinanet):
    return MODELS.build(retinanet())


def _save(tmp_path, state, **others):
    path = tmp_path / 'teacher.pth'
    torch.save(dict(state_dict=state, meta=dict(epoch=12), **others), path)
    return str(path)


def test_whole_checkpoint_loads_with_wrapper_prefix_and_without_step_counters(detector, tmp_path):
    state = {f'module.{key}': torch.randn_like(value) if value.is_floating_point() else value
             for key, value in detector.state_dict().items() if not key.endswith('num_batches_tracked')}
    assert load_strictly(detector, _save(tmp_path, state)) == dict(epoch=12)
    for key, value in state.items():
        assert torch.equal(detector.state_dict()[key[len('module.'):]], value)


def test_faulty_keys_are_named(detector, tmp_path):
    state = {key: torch.zeros_like(value) for key, value in detector.state_dict().items()}
    del state['bbox_head.retina_cls.weight']
    state['neck.extra.weight'] = torch.zeros(1)
    state['bbox_head.retina_reg.weight'] = torch.zeros(3, 2)
    with pytest.raises(CheckpointError) as error:
        load_strictly(detector, _save(tmp_path, state))
    for fault in ('1 keys missing from the file: bbox_head.retina_cls.weight',
                  '1 keys unexpected in the file: neck.extra.weight',
                  'bbox_head.retina_reg.weight (file (3, 2), model (4, 8, 3, 3))'):
        assert fault in str(error.value)


def test_a_one_stage_detectors_checkpoint_is_refused_by_a_two_stage_one(detector, faster_rcnn, tmp_path):
    """MMDetection renames its bbox_head to rpn_head: the keys left over are not the file's."""
    checkpoint = _save(tmp_path, detector.state_dict())
    with pytest.raises(CheckpointError, match=r'keys unexpected in the file: .*rpn_head\.retina_cls\.weight'):
        load_strictly(MODELS.build(faster_rcnn()), checkpoint)


def test_chosen_keys_can_be_allowed(detector, tmp_path):
    state = {key: value for key, value in detector.state_dict().items() if not key.startswith('bbox_head.')}
    state['ema_neck'] = torch.zeros(1)
    load_strictly(detector, _save(tmp_path, state), allow_missing='bbox_head.*', allow_unexpected=['ema_*'])


@pytest.mark.parametrize('key, value', [
    ('backbone.layer2.0.conv1.weight', float('nan')), ('bbox_head.retina_cls.bias', float('nan')),
    ('neck.lateral_convs.0.conv.weight', float('-inf')), ('backbone.bn1.running_var', float('nan')),
    ('backbone.bn1.running_mean', float('inf'))])
def test_weights_that_are_not_finite_are_refused(key, value, detector, tmp_path):
    state = {f'module.{name}': tensor.clone() for name, tensor in detector.state_dict().items()}
    state[f'module.{key}'].view(-1)[-1] = value
    kind = 'nan' if value != value else 'infinite'
    with pytest.raises(NotFiniteError, match=re.escape(
            f"teacher.pth' of the teacher holds weights that are not finite: 1 of {_count_tensors(detector)} tensors, "
            f"first {key} (1 of {state[f'module.{key}'].numel()} numbers is {kind}). Its training")):
        load_strictly(detector, _save(tmp_path, state))


def test_a_buffer_may_be_infinite_and_what_is_missing_is_whatever_memory_held(detector, tmp_path):
    detector.register_buffer('mask', torch.zeros(2))
    state = {key: value.clone() for key, value in detector.state_dict().items() if not key.startswith('bbox_head.')}
    state['mask'][0] = float('-inf')
    with torch.no_grad():
        detector.bbox_head.retina_cls.bias.fill_(float('nan'))
    load_strictly(detector, _save(tmp_path, state), allow_missing='bbox_head.*')


def _count_tensors(model):
    return sum(value.is_floating_point() for value in model.state_dict().values())


def test_keys_of_older_versions_load_as_their_module_renames_them(tmp_path):
    """MMDetection's FCOS still reads the names that its layers had before 2021."""
    model = MODELS.build(dict(
        type='FCOS', backbone=dict(type='ResNet', depth=18),
        neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, num_outs=5),
        bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1)))
    renamed = dict(conv_cls='fcos_cls', conv_reg='fcos_reg', conv_centerness='fcos_centerness')
    state = {key: value for key, value in model.state_dict().items()}
    old = {}
    for key, value in state.items():
        name = next((name for name in renamed if name in key), None)
        old[key.replace(name, renamed[name]) if name else key] = value + 1
    load_strictly(model, _save(tmp_path, old))
    assert torch.equal(model.bbox_head.conv_cls.bias, old['bbox_head.fcos_cls.bias'])


@pytest.mark.parametrize('given, left', [
    (dict(init_cfg=dict(type='Pretrained', checkpoint='x.pth')), dict()),
    (dict(init_cfg=dict(type=PretrainedInit, checkpoint='x.pth')), dict()),
    (dict(init_cfg=[dict(type='Constant', val=1), dict(type='Pretrained', checkpoint='x.pth')]),
     dict(init_cfg=[dict(type='Constant', val=1)])),
    (dict(init_cfg=dict(type='Constant', val=1)), dict(init_cfg=dict(type='Constant', val=1))),
    (dict(pretrained='torchvision://resnet18'), dict()),
])
def test_a_random_detector_loads_no_weights_of_its_parts(retinanet, given, left):
    given, left = (ConfigDict(retinanet(), roi_heads=[dict(backbone=dict(depth=18, **each))]) for each in (given, left))
    before = given.to_dict()
    assert remove_pretrained(given) == left
    assert given.to_dict() == before


def test_config_forms(retinanet, distiller):
    assert read_model_config(retinanet()).type == 'RetinaNet'
    assert read_model_config(dict(model=retinanet())).type == 'RetinaNet'
    assert read_model_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').backbone.depth == 18
    distilled = dict(type='DetectionDistiller', student=retinanet(), teacher={}, distill={})
    assert read_model_config(dict(model=distilled)).type == 'RetinaNet'


def test_faulty_configs():
    with pytest.raises(FileNotFoundError, match="no config file 'nowhere.py'"):
        read_model_config('nowhere.py')
    with pytest.raises(TeacherError, match='holds no model'):
        read_model_config(dict(optimizer='SGD'))


def _after(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def weights(detector):
    """Weights that the detector has not, and the same of another model."""
    def drawn():
        return {key: torch.rand_like(value) if value.is_floating_point() else value
                for key, value in detector.state_dict().items()}
    return drawn(), drawn()


def _loads(detector, path, state, **options):
    load_strictly(detector, str(path), **options)
    return all(torch.equal(detector.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize('keep', [
    lambda state, other: state,
    lambda state, other: dict(state_dict=state, meta=None),
    lambda state, other: dict(state_dict=None, model=state),
    lambda state, other: dict(ema=dict(module=state, updates=torch.tensor(3)), model=None),
    lambda state, other: dict(net=state, ema=other, optimizer=dict(state={0: dict(step=torch.tensor(1.))})),
    lambda state, other: dict(state_dict=state, ema_state_dict=dict(_after('module.', other), steps=torch.tensor(3))),
    lambda state, other: dict(ema_state_dict=dict(_after('module.', state), steps=torch.tensor(3))),
    lambda state, other: dict(_after('module.', state), n_averaged=torch.tensor(3)),
    lambda state, other: dict(model_state_dict=_after('module._orig_mod.', state), epoch=torch.tensor(7)),
    lambda state, other: {key.replace('backbone.', 'backbone._orig_mod.'): value for key, value in state.items()},
])
def test_weights_are_found_where_programs_keep_them(detector, weights, tmp_path, keep):
    torch.save(keep(*weights), tmp_path / 'kept.pth')
    assert _loads(detector, tmp_path / 'kept.pth', weights[0])


@pytest.mark.parametrize('content, told', [
    (dict(), 'holds no weights: it is empty'),
    (dict(ema=None, model=None), r"holds no weights: it has the entries 'ema' \(None\), 'model' \(None\)"),
    (dict(state_dict={}, optimizer=dict(state={}, param_groups=[])), r"holds no weights.*'state_dict' \(dict\)"),
    (dict(student=dict(weight=torch.ones(1)), teacher=dict(weight=torch.ones(1)), iter=torch.tensor(3)),
     r"several models, under 'student.' \(1 keys\) and 'teacher.' \(1 keys\).*checkpoint_prefix='teacher.'"),
])
def test_files_without_clear_weights_say_what_they_hold(detector, tmp_path, content, told):
    torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=told):
        load_strictly(detector, str(tmp_path / 'other.pth'))


def _old_average(state):
    return {'ema_' + key.replace('.', '_'): value for key, value in state.items()}


@pytest.mark.parametrize('keep, prefix, given', [
    (lambda state, other: dict(state_dict=_after('architecture.', state)), 'architecture.', 'architecture'),
    (lambda state, other: dict(state_dict=_after('model.detector.', state)), 'model.detector.', 'model.detector.'),
    (lambda state, other: dict(state_dict=_after('module.model.', state)), 'model.', 'module.model.'),
    (lambda state, other: {**_after('student.', other), **_after('teacher.', state)}, 'teacher.', 'teacher.'),
    (lambda state, other: dict(student=other, teacher=dict(module=state)), 'teacher.module.', 'teacher'),
    (lambda state, other: dict(state_dict=_old_average(state)), 'ema_', 'ema_'),
])
def test_a_prefix_of_all_keys_is_told_with_the_line_that_picks_it(detector, weights, tmp_path, keep, prefix, given):
    torch.save(keep(*weights), tmp_path / 'wrapped.pth')
    with pytest.raises(CheckpointError, match=re.escape(f"teacher.checkpoint_prefix='{prefix}'")):
        load_strictly(detector, str(tmp_path / 'wrapped.pth'))
    for picked in (prefix, given):
        assert _loads(detector, tmp_path / 'wrapped.pth', weights[0], checkpoint_prefix=picked)
    with pytest.raises(CheckpointError, match=f"checkpoint_prefix='guide.': no key .*'{prefix.split('.')[0]}"):
        load_strictly(detector, str(tmp_path / 'wrapped.pth'), checkpoint_prefix='guide.')


def test_a_second_set_of_weights_is_left_out_or_taken(detector, weights, tmp_path):
    torch.save(dict(state_dict={**weights[0], **_old_average(weights[1])}), tmp_path / 'both.pth')
    with pytest.raises(CheckpointError, match=r"once more after 'ema_'.*teacher.allow_unexpected=\['ema_\*'\]"):
        load_strictly(detector, str(tmp_path / 'both.pth'))
    assert _loads(detector, tmp_path / 'both.pth', weights[0], allow_unexpected=['ema_*'])
    assert _loads(detector, tmp_path / 'both.pth', weights[1], checkpoint_prefix='ema_')


def test_a_prefix_keeps_the_versions_of_the_modules(detector, weights, tmp_path):
    """By them a module knows which of its keys to rename."""
    state = torch.nn.Sequential(OrderedDict(teacher=detector)).state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'wrapped.pth')
    seen = []
    detector.bbox_head._register_load_state_dict_pre_hook(
        lambda state, prefix, metadata, *others: seen.append((prefix, metadata.get('version'))))
    assert _loads(detector, tmp_path / 'wrapped.pth', {}, checkpoint_prefix='teacher.')
    assert seen == [('bbox_head.', state._metadata['teacher.bbox_head']['version'])]


def test_a_shared_beginning_that_fits_nothing_is_told_too(detector, tmp_path):
    with pytest.raises(CheckpointError, match="All keys of the file begin with 'net.'.*checkpoint_prefix='net.'"):
        load_strictly(detector, _save(tmp_path, {'net.weight': torch.ones(1)}))
    with pytest.raises(CheckpointError) as error:  # a student has no such option
        load_strictly(detector, _save(tmp_path, _after('model.', detector.state_dict())), role='student')
    assert 'checkpoint_prefix' not in str(error.value) and "after 'model.'" in str(error.value)


@pytest.mark.parametrize('config, loads', [
    (dict(type='Pretrained', checkpoint='a.pth'), True), (dict(type='mmengine.model.PretrainedInit'), True),
    (dict(checkpoint='a.pth'), True),  # as PVT's configs write it
    (dict(type='Normal', std=0.1), False), (dict(config='a.py', checkpoint='a.pth'), False), ('a.pth', False)])
def test_what_loads_weights_from_somewhere(config, loads):
    assert is_pretrained(config) is loads
    assert ('init_cfg' in remove_pretrained(dict(type='PVT', init_cfg=config))) is not loads
