"""Every config that is shipped: it parses, its teacher is published, its twin is its twin, and it trains."""
import copy
import re
from functools import cache
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmengine.logging import MessageHub

from kd_det.config.composition import find_model_family, method_terms
from kd_det.config.files import is_distillation, load_config, student_model
from kd_det.context import Progress
from kd_det.distillers.schedules import build_schedule
from kd_det.teachers import InputBridge

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
SHRINK = 8


def inherited(file: Path, kind: str) -> str:
    """The name of the student or the pair that a config inherits from, '' where it inherits from none."""
    found = re.search(rf'/{kind}/(\w+)\.py', file.read_text(encoding='utf-8'))
    return found[1] if found else ''


FILES = sorted(CONFIGS.glob('*.py'))
STUDENTS = {file.stem: inherited(file, 'students') for file in sorted(CONFIGS.glob('_base_/pairs/*.py'))}
RECIPES = {file.stem: inherited(file, 'recipes') for file in FILES if inherited(file, 'recipes')}
BASELINES = {inherited(file, 'students'): file.stem for file in FILES if inherited(file, 'students')}
DISTILLED = {file.stem: inherited(file, 'pairs') for file in FILES if inherited(file, 'pairs')}


def method_of(name: str) -> str:
    return name.partition('_')[0]


@cache
def cached(name: str):
    return load_config(name if '::' in name else CONFIGS / f'{name}.py')


def load(name: str):
    """A config of one's own, by its name within configs/ or that of another package."""
    return copy.deepcopy(cached(name))


def published_weights(config: str) -> list:
    """What mmdet's metafile lists as the weights of one of its configs."""
    path = Path('configs') / config.partition('::')[2]
    metafile = Path(mmdet.__file__).parent / '.mim' / path.parent / 'metafile.yml'
    models = yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']
    return [model['Weights'] for model in models if model['Config'] == str(path)]


def shrunk(node):
    """The same model dict with all widths divided by :data:`SHRINK`, and nothing to download."""
    if isinstance(node, (list, tuple)):
        return [shrunk(item) for item in node]
    if not isinstance(node, dict):
        return node
    widths = ['in_channels', 'out_channels', 'feat_channels', 'fc_out_channels', 'conv_out_channels', 'widen_factor',
              'base_channels', 'stem_channels', 'feedforward_channels', 'groups']
    if node.get('type') == 'SwinTransformer':
        widths.append('embed_dims')
    if node.get('type') == 'ChannelMapper':  # mmdet's code for the transformers behind it knows 256 channels alone
        widths.remove('out_channels')
    node = {key: shrunk(value) for key, value in node.items()}
    if node.get('type') in ('ResNet', 'ResNeXt'):
        node = {**node, 'base_channels': 64, 'stem_channels': 64}
    if (node.get('init_cfg') or {}).get('type') == 'Pretrained':
        node = {**node, 'init_cfg': None}
    if 'num_queries' in node:
        node['num_queries'] = 20  # fewer than the small images have cells
    for key in widths:
        if key in node:
            value = node[key]
            node[key] = ([width // SHRINK for width in value] if isinstance(value, list)
                         else value / SHRINK if key == 'widen_factor' else value // SHRINK)
    return node


def settle(detector):
    """Lets BatchNorm take the statistics of the batch: it has learnt none, and without any, activations explode. And
    draws what mmdet leaves as the memory was, until a checkpoint is loaded."""
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    if hasattr(detector, 'level_embed'):
        torch.nn.init.normal_(detector.level_embed)
    if hasattr(getattr(detector, 'bbox_head', None), 'rtm_cls'):  # untrained it says the same of all cells
        for parameter in (each for each in detector.bbox_head.parameters() if each.dim() > 1):
            torch.nn.init.normal_(parameter, std=0.1)


def test_every_config_is_a_baseline_or_a_method_of_a_pair():
    assert {file.stem for file in FILES} == {*DISTILLED, *BASELINES.values()}
    assert set(DISTILLED.values()) == set(STUDENTS)  # no pair without a method
    assert set(STUDENTS.values()) == set(BASELINES)  # no student without a baseline, and the other way round
    for name, pair in DISTILLED.items():
        assert name == f"{method_of(name)}_{'r101_r18' if pair == 'faster_rcnn_r101_r18' else pair}"


def test_model_index_lists_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    files = [yaml.safe_load((ROOT / file).read_text()) for file in index['Import']]
    models = [model for file in files for model in file['Models']]
    assert sorted(model['Config'] for model in models) == [f'configs/{file.name}' for file in FILES]
    assert [model['Name'] for model in models] == [Path(model['Config']).stem for model in models]
    assert [model['In Collection'].lower() for model in models] == [method_of(model['Name']) for model in models]
    collections = {collection['Name'] for file in files for collection in file['Collections']}
    assert {model['In Collection'] for model in models} == collections


@pytest.mark.parametrize('pair', STUDENTS)
def test_teacher_is_a_published_model_of_mmdet(pair):
    teacher = load(f'_base_/pairs/{pair}').model.teacher
    assert teacher.checkpoint.startswith('https://')
    assert teacher.checkpoint in published_weights(teacher.config)


@pytest.mark.parametrize('name', DISTILLED)
def test_twin_differs_in_nothing_but_distillation(name):
    distilled, twin = load(name).to_dict(), load(BASELINES[STUDENTS[DISTILLED[name]]]).to_dict()
    model, hooks = distilled.pop('model'), distilled.pop('default_hooks')
    assert model['student'] == twin.pop('model')
    assert hooks.pop('distill') == dict(type='mmdet.DistillHook', preflight=dict(images=64, min_map=0.01))
    assert hooks == twin.pop('default_hooks')
    assert distilled.pop(RECIPES.get(name) or method_of(name)) == model['distill']
    assert distilled == twin  # data, schedule, evaluation, seed
    assert 'seed' in twin['randomness']


@pytest.mark.parametrize('name', DISTILLED)
def test_weights_are_those_of_the_teachers_family(name):
    """Between unlike detectors the published weights go with the teacher: PKD's from Mask R-CNN to RetinaNet is 6."""
    model = load(name).model
    if name in RECIPES:  # of a pair of detectors, in place of those of a family
        recipe = RECIPES[name]
        assert model.distill == method_terms(f'kd_det::_base_/recipes/{recipe}.py', 'one_stage')
        return
    assert model.distill == method_terms(method_of(name), find_model_family(load(model.teacher.config).model))


def test_the_recipe_for_rtmdets_is_the_published_one():
    """Each level weighs 1 for 280 of 300 epochs, before normalisation and activation."""
    for pair in ('l_s', 's_tiny', 'm_s', 'l_m'):
        config = load(f'cwd_rtmdet_{pair}')
        assert config.train_cfg.max_epochs == 300
        for index, term in enumerate(config.model.distill.values()):
            assert term.tap == f'neck.out_convs.{index}.conv' and term.normalize and term.temperature == 1
            weight = build_schedule(term.weight)
            assert [weight(Progress(epoch=epoch)) for epoch in (0, 279.9, 280, 299)] == [1, 1, 0, 0]
        assert len(config.model.distill) == 3


@pytest.mark.parametrize('twin, original, changed', [
    ('baseline_faster_rcnn_r101_r18', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', ('backbone', 'neck')),
    ('baseline_retinanet_r101_r18', 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', ()),
    ('baseline_gfl_r101_r18', 'mmdet::gfl/gfl_r50_fpn_1x_coco.py', ('backbone', 'neck')),
    ('baseline_atss_r101_r18', 'mmdet::atss/atss_r50_fpn_1x_coco.py', ('backbone', 'neck')),
    ('baseline_fcos_r101_r18', 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
     ('backbone', 'neck', 'data_preprocessor')),
    ('baseline_yolox_l_s', 'mmdet::yolox/yolox_s_8xb8-300e_coco.py', ()),
    ('baseline_rtmdet_l_s', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', ()),
    ('baseline_rtmdet_s_tiny', 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', ()),
    ('baseline_rtmdet_l_m', 'mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py', ()),
    ('baseline_dino_r50_r18', 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', ('backbone', 'neck')),
    ('baseline_deformable_detr_r50_r18',
     'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py', ('backbone', 'neck')),
    ('baseline_faster_rcnn_r50', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', ()),
    ('baseline_retinanet_r50', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', ()),
    ('baseline_fcos_r50', 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', ()),
])
def test_student_keeps_the_data_and_schedule_of_mmdet(twin, original, changed):
    """New are only the seed, the import of kd_det, and the scope that mmengine notes on what another package gives."""

    def without_scope(node):
        if isinstance(node, dict):
            return {key: without_scope(value) for key, value in node.items() if key != '_scope_'}
        return type(node)(map(without_scope, node)) if isinstance(node, (list, tuple)) else node

    twin, original = without_scope(load(twin).to_dict()), without_scope(load(original).to_dict())
    assert twin.pop('custom_imports')['imports'] == ['kd_det']
    assert twin.pop('randomness') == dict(seed=0)
    for part in changed:
        assert twin['model'].pop(part) != original['model'].pop(part)
    assert twin == original


@pytest.mark.parametrize('file', [*FILES, *CONFIGS.glob('demo/*.py'), *CONFIGS.glob('bccd/*.py')],
                         ids=lambda file: file.stem)
def test_mmdetections_own_tools_import_kd_det_with_the_config(file):
    assert 'kd_det' in load_config(file).custom_imports.imports


def test_students_from_torchvisions_weights_see_images_as_those_do():
    """The FCOS of mmdet starts from Caffe's, its R18 does not."""
    fcos, retinanet = (load(f'baseline_{name}_r101_r18').model for name in ('fcos', 'retinanet'))
    assert fcos.backbone == retinanet.backbone
    assert fcos.data_preprocessor == retinanet.data_preprocessor


@pytest.mark.parametrize('pair', STUDENTS)
def test_teacher_sees_what_its_own_preprocessing_makes(pair, batch):
    """Some teachers start from Caffe's weights, with other channels and scales than their students."""
    from mmdet.registry import MODELS
    model = load(f'_base_/pairs/{pair}').model
    preprocessors = [model.student.data_preprocessor, load(model.teacher.config).model.data_preprocessor]
    student, teacher = (MODELS.build({**preprocessor, 'batch_augments': None}) for preprocessor in preprocessors)
    shapes = ((64, 64), (48, 32))
    seen = InputBridge(student, teacher)(student(batch(shapes))['inputs'], shapes)
    torch.testing.assert_close(seen, teacher(batch(shapes))['inputs'], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('pair', STUDENTS)
def test_distillation_trains_a_step(pair, batch):
    """One step of the pair with the terms of all its configs; each of them alone reaches the backbone and the neck."""
    from mmdet.registry import MODELS
    MessageHub.get_current_instance().update_info('iter', 0)  # YOLOX's preprocessor asks for it
    names = [name for name, of in DISTILLED.items() if of == pair]
    config = load(names[0])
    assert is_distillation(config)
    terms = {key: term for name in names for key, term in load(name).model.distill.items()}
    teacher = load(config.model.teacher.config)
    config.model.student = shrunk(config.model.student)
    config.model.teacher = dict(config=shrunk(student_model(teacher)), random_teacher=True)
    config.model.distill = terms
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    settle(model.teacher.model)
    for branch in getattr(getattr(model, 'bbox_head', None), 'reg_branches', ()):  # untrained, DETRs regress nothing
        torch.nn.init.normal_(branch[-1].weight, std=0.1)
    model.set_progress(iteration=1000, epoch=1.0)  # behind any warm-up
    data = model.data_preprocessor(batch(), training=True)
    losses = model.loss(data['inputs'], data['data_samples'])
    total, log = model.parse_losses(losses)
    assert torch.isfinite(total)

    for term in terms:
        assert log[f'loss_{term}'] > 0
        model.zero_grad()
        losses[f'loss_{term}'].backward(retain_graph=True)
        for part in ('backbone', 'neck'):
            weights = getattr(model, part).parameters()
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
            assert any(gradient.any() for gradient in gradients), f'{term} does not reach the {part}'
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())


@pytest.mark.parametrize('pair, strides', [
    ('mask_rcnn_swin_s_retinanet_r50', [8, 16, 32, 64]),
    ('faster_rcnn_x101_fcos_r50', [8, 16, 32, 64]),
    ('cascade_mask_rcnn_x101_faster_rcnn_r50', [4, 8, 16, 32]),
    ('rtmdet_l_s', [8, 16, 32]),
    ('dino_r50_r18', [8, 16, 32, 64]),
])
def test_pkd_pairs_the_levels_of_unlike_detectors_by_stride(pair, strides):
    from mmdet.registry import MODELS
    config = load(f'pkd_{pair}')
    config.model.student = shrunk(config.model.student)
    config.model.teacher = dict(config=shrunk(student_model(load(config.model.teacher.config))), random_teacher=True)
    pairs = MODELS.build(config.model).terms['pkd'].pairs
    assert [each.student_spec.stride for each in pairs] == [each.teacher_spec.stride for each in pairs] == strides


def test_methods_add_up(tmp_path):
    """As the documentation says: **_base_.a, **_base_.b."""
    base = CONFIGS / '_base_'
    (tmp_path / 'other.py').write_text("hint = dict(hint=dict(type='FeatureImitation', tap='neck'))\n")
    (tmp_path / 'sum.py').write_text(
        f"_base_ = ['{base}/pairs/faster_rcnn_r101_r18.py', '{base}/methods/fgd_two_stage.py', './other.py']\n"
        'model = dict(distill=dict(**_base_.fgd, **_base_.hint))\n')
    assert list(load_config(tmp_path / 'sum.py').model.distill) == ['fgd', 'hint']
