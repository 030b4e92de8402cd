"""Student and teacher in packages of their own, whose configs name their types without a scope."""
import copy
import sys

import pytest
import torch
from mmdet.registry import DATASETS, HOOKS, MODELS, TASK_UTILS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import DefaultScope

from kd_det.checks.doctor import check_config, inspect_config
from kd_det.config.composition import distillation_config
from kd_det.config.files import build_own, load_config
from kd_det.distillers import build_schedule
from kd_det.masks.base import build_mask
from kd_det.registry import add_nodes, build_detector, find_class, get_scope, prepare_without_runner, within_scope
from kd_det.study.fidelity import measure_fidelity
from kd_det.teachers import TeacherError, probe_heads, read_model_config
from kd_det.training.runner import build_runner

SCOPES = ('alphadet', 'betadet')
REGISTRY = '''
from mmengine.registry import MODELS as ROOT, Registry
MODELS = Registry('model', parent=ROOT, scope='{scope}', locations=['{scope}.models'])
'''
TYPES = '''
from mmdet.models import FocalLoss, ResNet, RetinaHead, RetinaNet
from {scope}.registry import MODELS
for name, base in dict(Detector=RetinaNet, Trunk=ResNet, Head=RetinaHead, Loss=FocalLoss).items():
    MODELS.register_module(module=type(name, (base, ), dict(__module__=__name__)))
'''


@pytest.fixture(scope='module', autouse=True)
def packages(tmp_path_factory):
    """Two packages with models of the same names, and with no other registry."""
    folder = tmp_path_factory.mktemp('packages')
    for scope in SCOPES:
        (folder / scope).mkdir()
        (folder / scope / '__init__.py').touch()
        (folder / scope / 'registry.py').write_text(REGISTRY.format(scope=scope))
        (folder / scope / 'models.py').write_text(TYPES.format(scope=scope))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def own(model: dict) -> dict:
    """The same detector of a package's own types, which are named without their scope; MMDetection's with it."""

    def scoped(node):
        if isinstance(node, dict):
            node = {key: scoped(value) for key, value in node.items()}
            if 'type' in node and (f"mmdet.{node['type']}" in MODELS or f"mmdet.{node['type']}" in TASK_UTILS):
                node['type'] = f"mmdet.{node['type']}"
        return node

    model = scoped(copy.deepcopy(model))
    for part, kind in ((model, 'Detector'), (model['backbone'], 'Trunk'), (model['bbox_head'], 'Head'),
                       (model['bbox_head']['loss_cls'], 'Loss')):
        part['type'] = kind
    return model


@pytest.fixture
def mmdetections(retinanet):
    """Makes the model dict of a RetinaNet whose losses are named, for those of a scope must be."""

    def make(**sizes) -> dict:
        model = retinanet(**sizes)
        model.bbox_head.update(loss_cls=dict(type='FocalLoss', use_sigmoid=True), loss_bbox=dict(type='L1Loss'))
        return model

    return make


@pytest.fixture
def teacher_file(tmp_path, mmdetections):
    """The config of a teacher of a package, which alone imports it."""

    def make(scope: str) -> str:
        file = tmp_path / f'{scope}_teacher.py'
        Config(dict(default_scope=scope, custom_imports=dict(imports=[f'{scope}.models'], allow_failed_imports=False),
                    model=own(mmdetections(depth=50, neck=12)))).dump(file)
        return str(file)

    return make


def test_a_scope_looks_up_elsewhere_what_it_has_no_registry_for():
    with within_scope('alphadet'):
        assert find_class(MODELS, dict(type='Trunk')).__module__ == 'alphadet.models'
        assert find_class(MODELS, dict(type='RetinaHead')) is None  # a registry that it has answers for itself
        assert find_class(MODELS, dict(type='RetinaHead'), 'mmdet').__module__.startswith('mmdet.')
        assert find_class(DATASETS, dict(type='CocoDataset')).__module__.startswith('mmdet.')
        assert type(ROOT_HOOKS.build(dict(type='DistillHook'))).__module__.startswith('kd_det.')
    assert add_nodes('alphadet') == {} == add_nodes('mmengine') == add_nodes('mmdet') == add_nodes('kd_det')
    assert DefaultScope.get_current_instance().scope_name == 'mmdet'


@pytest.mark.parametrize('scope', ['mmengine', 'alphadet', 'mmdet', 'kd_det'])
def test_this_packages_parts_are_built_whatever_scope_holds(scope):
    with within_scope(scope):
        assert build_schedule(dict(type='Warmup', value=dict(type='Balance'), epochs=1)).balance.full == 0.5
        assert type(build_mask('BoxForeground')).__name__ == 'BoxForeground'
        assert type(build_mask(dict(type='MaskProduct', masks=['NearAnchorForeground']))).__name__ == 'MaskProduct'
        assert type(build_own(MODELS, dict(type='FGD', tap='neck'))).__name__ == 'FGD'
        with pytest.raises(ValueError, match="there is no 'Warmdown'"):
            build_schedule(dict(type='Warmdown', value=1.0))


def test_a_detector_is_built_within_the_scope_of_its_config(teacher_file, mmdetections):
    for scope in SCOPES:
        config = load_config(teacher_file(scope))
        for given in (config.filename, config.to_dict()):
            model = read_model_config(given)
            detector = build_detector(model)
            parts = detector, detector.backbone, detector.bbox_head, detector.bbox_head.loss_cls
            assert {type(part).__module__ for part in parts} == {f'{scope}.models'}
            towers = ['bbox_head.towers']
            assert probe_heads(given, towers) == probe_heads(mmdetections(depth=50, neck=12), towers)
    assert get_scope(Config(dict(default_scope=None))) == 'mmdet'


@pytest.mark.parametrize('change, said', [
    (dict(default_scope='gammadet', custom_imports={}),
     r'KeyError: Trunk is not in the gammadet::model registry.* Import the package that has it with custom_imports'),
    (dict(model=dict(backbone=dict(depht=18))), "TypeError: .*unexpected keyword argument 'depht'"),
])
def test_a_teacher_that_can_not_be_built_is_named_by_its_config(change, said, teacher_file, mmdetections, run_config):
    file = teacher_file('alphadet')
    config = load_config(file)
    config.merge_from_dict(change)
    if 'custom_imports' in change:
        config.custom_imports = {}
    config.dump(file)
    pair = distillation_config(run_config(mmdetections()), file, 'x.pth', 'fgd')
    with pytest.raises(TeacherError, match=f"(?s)The model of the teacher's config '{file}' can not be used: {said}"):
        build_detector(pair.model)
    found = [finding.found for finding in inspect_config(pair) if finding.subject == 'a training step']
    assert file in found[0]


def test_a_pair_of_two_packages_trains_as_that_of_mmdetection(teacher_file, mmdetections, run_config, tmp_path):
    def trained(student: str, teacher: str) -> dict:
        model = mmdetections() if student == 'mmdet' else own(mmdetections())
        config = run_config(model, epochs=1, name=f'{student}_{teacher}')
        config.default_scope, config.default_hooks.checkpoint = student, None
        given = teacher_file(teacher) if teacher != 'mmdet' else str(tmp_path / 'mmdet_teacher.py')
        if teacher == 'mmdet':
            Config(dict(default_scope='mmdet', model=mmdetections(depth=50, neck=12))).dump(given)
        torch.manual_seed(0)
        torch.save(dict(state_dict=build_detector(read_model_config(given)).state_dict()), tmp_path / 'teacher.pth')
        config = distillation_config(config, given, str(tmp_path / 'teacher.pth'), 'pgd+crosskd', ('neck', 'bbox_head'))
        config.default_hooks.distill.preflight = None
        check_config(config, splits=('train', ))
        runner = build_runner(config)
        runner.train()
        return runner.model.state_dict()

    ours, expected = trained('alphadet', 'betadet'), trained('mmdet', 'mmdet')
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_doctor_and_fidelity_stay_within_the_scope_of_the_config(teacher_file, mmdetections, run_config, tmp_path):
    teacher = teacher_file('betadet')
    torch.save(dict(state_dict=build_detector(read_model_config(teacher)).state_dict()), tmp_path / 'teacher.pth')
    config = run_config(own(mmdetections()), val=True)
    config.default_scope = 'alphadet'
    config = distillation_config(config, teacher, str(tmp_path / 'teacher.pth'), 'fgd')
    assert not [finding for finding in inspect_config(config) if finding.fault or finding.remedy]
    with within_scope('alphadet'):
        torch.save(dict(state_dict=build_detector(config.model.student).state_dict()), tmp_path / 'student.pth')
    config.dump(tmp_path / 'distillation.py')
    measured = measure_fidelity(tmp_path / 'distillation.py', tmp_path / 'student.pth',
                                dict(config=teacher, checkpoint=str(tmp_path / 'teacher.pth')))
    assert 'cka_8' in measured
    assert DefaultScope.get_current_instance().scope_name == 'mmdet'


def test_what_is_written_has_its_scope(retinanet, run_config):
    made = distillation_config(run_config(retinanet()), 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'x.pth',
                               'fgd+defeat+pgd', balance=0.5)

    def types(node):
        if isinstance(node, dict):
            yield from ([node['type']] if 'type' in node else ())
            yield from (mask for mask in [node.get('mask')] if isinstance(mask, str))
            for value in node.values():
                yield from types(value)
        for value in node if isinstance(node, (list, tuple)) else ():
            yield from types(value)

    written = [made.model.type, made.default_hooks.distill.type, *types(made.model.distill)]
    assert len(written) > 10 and all(name.startswith('mmdet.') for name in written)
    with within_scope('mmengine'):  # of a config that names no scope
        assert type(HOOKS.build(dict(type=made.default_hooks.distill.type))).__name__ == 'DistillHook'


def test_without_a_runner_what_it_counts_stands_at_the_beginning():
    """TOOD asks for the epoch, others for the iteration."""
    hub = MessageHub.get_current_instance()
    hub.runtime_info.pop('epoch', None)
    prepare_without_runner()
    assert (hub.get_info('iter'), hub.get_info('epoch')) == (0, 0)
