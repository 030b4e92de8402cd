"""Every config that is shipped: it parses, its teacher is published, its twin is its twin, and it trains."""
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmengine.logging import MessageHub

from kd_det.configuration import is_distillation, load_config, student_model

ROOT = Path(__file__).parents[2]
DISTILLED = {
    'fgd_r101_r18': 'baseline_faster_rcnn_r101_r18',
    'fgd_retinanet_r101_r18': 'baseline_retinanet_r101_r18',
    'fgd_gfl_r101_r18': 'baseline_gfl_r101_r18',
    'fgd_yolox_l_s': 'baseline_yolox_l_s',
}
SHRINK = 8


def load(name: str):
    return load_config(ROOT / 'configs' / f'{name}.py')


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
    widths = ('in_channels', 'out_channels', 'feat_channels', 'fc_out_channels', 'widen_factor', 'base_channels',
              'stem_channels')
    node = {key: shrunk(value) for key, value in node.items()}
    if node.get('type') == 'ResNet':
        node = {**node, 'base_channels': 64, 'stem_channels': 64, 'init_cfg': None}
    for key in widths:
        if key in node:
            value = node[key]
            node[key] = ([width // SHRINK for width in value] if isinstance(value, list)
                         else value / SHRINK if isinstance(value, float) else value // SHRINK)
    return node


def test_every_config_is_covered_here():
    files = {file.stem for file in (ROOT / 'configs').glob('*.py')}
    assert files == {*DISTILLED, *DISTILLED.values()}


def test_model_index_lists_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [model for file in index['Import'] for model in yaml.safe_load((ROOT / file).read_text())['Models']]
    assert {model['Config']
            for model in models} == {f'configs/{name}.py'
                                     for pair in DISTILLED.items()
                                     for name in pair}
    assert all((ROOT / model['Config']).is_file() for model in models)
    assert [model['Name'] for model in models] == [Path(model['Config']).stem for model in models]


@pytest.mark.parametrize('name', DISTILLED)
def test_teacher_is_a_published_model_of_mmdet(name):
    teacher = load(name).model.teacher
    assert teacher.checkpoint.startswith('https://')
    assert teacher.checkpoint in published_weights(teacher.config)


@pytest.mark.parametrize('name, twin', DISTILLED.items())
def test_twin_differs_in_nothing_but_distillation(name, twin):
    distilled, twin = load(name).to_dict(), load(twin).to_dict()
    model, hooks = distilled.pop('model'), distilled.pop('default_hooks')
    assert model['student'] == twin.pop('model')
    assert hooks.pop('distill') == dict(type='DistillHook', preflight=dict(images=64, min_map=0.01))
    assert hooks == twin.pop('default_hooks')
    assert distilled.pop('fgd') == model['distill']
    assert distilled == twin  # data, schedule, evaluation, seed
    assert 'seed' in twin['randomness']


@pytest.mark.parametrize('twin, original', [
    ('baseline_faster_rcnn_r101_r18', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    ('baseline_retinanet_r101_r18', 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'),
    ('baseline_gfl_r101_r18', 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'),
    ('baseline_yolox_l_s', 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'),
])
def test_student_keeps_the_data_and_schedule_of_mmdet(twin, original):
    """New are only the seed, the import of kd_det, and the scope that mmengine notes on what another package gives."""

    def without_scope(node):
        if isinstance(node, dict):
            return {key: without_scope(value) for key, value in node.items() if key != '_scope_'}
        return type(node)(map(without_scope, node)) if isinstance(node, (list, tuple)) else node

    twin, original = without_scope(load(twin).to_dict()), without_scope(load_config(original).to_dict())
    assert twin.pop('custom_imports')['imports'] == ['kd_det']
    assert twin.pop('randomness') == dict(seed=0)
    for part in ('backbone', 'neck'):
        twin['model'].pop(part), original['model'].pop(part)
    assert twin == original


@pytest.mark.parametrize('name, weights', [
    ('fgd_r101_r18', dict(levels=(0, 1, 2, 3), temperature=0.5, alpha=5e-5, beta=2.5e-5, gamma=5e-5, lambda_=5e-7)),
    ('fgd_retinanet_r101_r18', dict(temperature=0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6)),
    ('fgd_gfl_r101_r18', dict(temperature=0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6)),
    ('fgd_yolox_l_s', dict(temperature=0.8, alpha=1.6e-3, beta=8e-4, gamma=8e-4, lambda_=8e-6)),
])
def test_fgd_has_the_published_weights_of_the_family(name, weights):
    assert load(name).model.distill == dict(fgd=dict(type='FGD', tap='neck', **weights))


@pytest.mark.parametrize('name', DISTILLED)
def test_distillation_trains_a_step(name, batch):
    from mmdet.registry import MODELS
    MessageHub.get_current_instance().update_info('iter', 0)  # YOLOX's preprocessor asks for it
    config = load(name)
    teacher = load_config(config.model.teacher.config)
    config.model.student = shrunk(config.model.student)
    config.model.teacher = dict(config=shrunk(student_model(teacher)), random_teacher=True)
    assert is_distillation(config)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    data = model.data_preprocessor(batch(), training=True)
    losses = model.loss(data['inputs'], data['data_samples'])
    total, log = model.parse_losses(losses)
    assert torch.isfinite(total) and log['loss_fgd'] > 0

    losses['loss_fgd'].backward()
    for part in ('backbone', 'neck'):  # the distillation alone reaches them
        gradients = [parameter.grad for parameter in getattr(model, part).parameters() if parameter.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())


def test_methods_add_up(tmp_path):
    """As the documentation says: **_base_.a, **_base_.b."""
    base = ROOT / 'configs' / '_base_'
    (tmp_path / 'other.py').write_text("hint = dict(hint=dict(type='FeatureImitation', tap='neck'))\n")
    (tmp_path / 'sum.py').write_text(
        f"_base_ = ['{base}/pairs/faster_rcnn_r101_r18.py', '{base}/methods/fgd_two_stage.py', './other.py']\n"
        'model = dict(distill=dict(**_base_.fgd, **_base_.hint))\n')
    assert list(load_config(tmp_path / 'sum.py').model.distill) == ['fgd', 'hint']
