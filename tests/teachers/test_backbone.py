"""A backbone as teacher: which maps it answers, where they lie on the image, what it is given, what it loads."""
import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from torch import nn

from kd_det.compat import CheckpointError
from kd_det.config.distillation import compose_distillation
from kd_det.config.files import ConfigurationError
from kd_det.context import LevelSpec
from kd_det.teachers import TeacherError, backbone
from kd_det.teachers.backbone import TimmBackbone
from kd_det.teachers.features import FeatureGuide, MapStatistics, make_bridge, resample
from kd_det.teachers.guide import Reading, build_guide
from kd_det.teachers.teacher import UnreadLevel

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
NECK = Reading(('neck', ), ())
LEVELS = [dict(neck=(LevelSpec(8, 8), LevelSpec(8, 16), LevelSpec(8, 64)))]
RESNET = dict(type='mmdet.ResNet', depth=18, base_channels=4, stem_channels=4)


def make_student(**preprocessing) -> nn.Module:
    student = nn.Linear(1, 1)
    student.data_preprocessor = DetDataPreprocessor(**{**dict(mean=MEAN, std=STD, bgr_to_rgb=True), **preprocessing})
    return student


def make_backbone(student=None, reading=NECK, levels=LEVELS, **config):
    config = config if 'checkpoint' in config else dict(config, random_teacher=True)
    guide, learners = build_guide(dict(type='Backbone', **config)), [student or make_student()]
    form = guide.probe(reading, learners, levels)
    return guide.start(reading, learners), form.levels


# ------------------------------------------------------------------------------------------- which maps, and where


@pytest.mark.parametrize('config, channels', [
    (dict(name='test_vit'), [64, 64, 64]), (dict(name='test_resnet'), [48, 192, 96]),
    (dict(name='test_maxvit', image_size=(160, 160)), [64, 96, 128]),
    (dict(config=RESNET, mean=MEAN, std=STD), [8, 16, 32])])
def test_each_level_of_the_student_gets_the_nearest_map_at_its_cells(config, channels):
    guide, levels = make_backbone(**config)
    assert levels['neck'] == tuple(LevelSpec(width, stride) for width, stride in zip(channels, (8, 16, 64)))
    features, outputs = guide.observe(torch.randn(2, 3, 96, 160), [(96, 160), (80, 100)])
    assert [tuple(level.shape) for level in features['neck']] == [
        (2, width, *cells) for width, cells in zip(channels, [(12, 20), (6, 10), (2, 3)])]
    assert outputs == {} and not any(level.requires_grad for level in features['neck'])
    assert guide.num_parameters == sum(each.numel() for each in guide.weights.parameters()) > 0


def test_a_path_that_the_student_does_not_tap_has_its_own_maps():
    guide, levels = make_backbone(reading=Reading(('backbone', ), ()), config=RESNET, mean=MEAN, std=STD)
    assert levels == dict(backbone=((4, 4), (8, 8), (16, 16), (32, 32)))
    images = torch.randn(1, 3, 96, 128)
    features = guide.observe(images, [(96, 128)])[0]['backbone']
    for level, expected in zip(features, guide.weights.backbone(images)):
        assert torch.equal(level, expected)


def test_the_cells_are_those_that_the_student_has():
    guide, _ = make_backbone(name='test_vit')
    theirs = tuple(torch.zeros(1, 8, *cells) for cells in ((13, 21), (6, 10), (2, 3)))
    step = SimpleNamespace(features=dict(neck=theirs))
    features = guide.observe(torch.randn(1, 3, 96, 160), [(96, 160)], learners=[step])[0]['neck']
    assert [level.shape[-2:] for level in features] == [level.shape[-2:] for level in theirs]


def test_levels_that_nothing_reads_are_left_out():
    guide, _ = make_backbone(name='test_vit')
    first, second, third = guide.observe(torch.randn(1, 3, 64, 64), [(64, 64)],
                                         levels=dict(neck=(False, True, False)))[0]['neck']
    assert isinstance(first, UnreadLevel) and isinstance(third, UnreadLevel) and second.shape == (1, 64, 4, 4)


def test_the_tokens_of_a_vit_lie_row_by_row_without_class_and_registers():
    guide, _ = make_backbone(reading=Reading(('backbone', ), ()), name='test_vit3')  # has registers
    images, model = torch.randn(2, 3, 64, 96), guide.weights.backbone.model
    assert model.num_prefix_tokens > 0
    expected = model.forward_features(images)[:, model.num_prefix_tokens:]  # after the last normalisation
    torch.testing.assert_close(guide.compute_maps(images, [])['backbone'][0].flatten(2).mT, expected)


def put_out(module, specs, *strides):
    """A guide of what a module puts out, read by levels of these strides."""
    guide = build_guide(dict(type='Backbone', name='test_vit', random_teacher=True))
    guide._specs = tuple(specs)
    guide.probe(NECK, [], [dict(neck=tuple(LevelSpec(8, stride) for stride in strides))])
    bridge = make_bridge(make_student().data_preprocessor, MEAN, STD, True, 3, specs[-1].stride)
    guide.settle(module, bridge, torch.zeros(()))
    return guide


class Positions(nn.Module):
    """A backbone of one map of stride 14: the x and y in pixels of each cell's centre."""

    def extract_feat(self, images):
        y, x = (torch.arange(side // 14) * 14 + 7.0 for side in images.shape[-2:])
        return (torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))]).expand(len(images), -1, -1, -1), )


@pytest.mark.parametrize('stride', [4, 8, 14, 16, 32])
def test_maps_lie_on_the_pixels_of_the_image_whatever_the_stride_and_the_size(stride):
    guide = put_out(Positions(), [LevelSpec(2, 14)], stride)
    images = torch.zeros(1, 3, 200, 120)  # no multiples of 14
    x, y = guide.observe(images, [(200, 120)])[0]['neck'][0][0]
    rows, columns = (-(-side // stride) for side in images.shape[-2:])
    assert x.shape == (rows, columns)
    centres = torch.arange(max(rows, columns)) * stride + stride / 2
    within = slice(28 // stride + 1, -(28 // stride) - 1)  # at the border there is nothing to interpolate with
    torch.testing.assert_close(x[0, within], centres[:columns][within], atol=0.01, rtol=0)
    torch.testing.assert_close(y[within, 0], centres[:rows][within], atol=0.01, rtol=0)


def test_a_finer_map_is_averaged_not_sampled():
    level = torch.randn(1, 1, 32, 32)
    assert resample(level, (128, 128), 32, (4, 4)).std() < 0.5 * level[..., ::8, ::8].std()


def test_resampling_to_the_same_cells_changes_nothing():
    level = torch.randn(1, 2, 8, 8)
    assert torch.equal(resample(level, (64, 64), 8, (7, 8)), level[:, :, :7])


def test_a_map_that_ends_before_the_students_cells_goes_on():
    level = torch.arange(3.0).expand(1, 1, 3, 3)
    assert torch.equal(resample(level, (24, 24), 8, (3, 5))[0, 0, 0], torch.tensor([0.0, 1, 2, 2, 2]))


# ------------------------------------------------------------------------------------------- what it is given


@pytest.mark.parametrize('preprocessing', [dict(), dict(mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=False),
                                           dict(mean=None, std=None, bgr_to_rgb=False)])
def test_it_sees_the_image_in_its_own_normalisation_and_padding(preprocessing):
    guide, _ = make_backbone(make_student(**preprocessing), name='test_vit')
    raw = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)  # BGR, as it was loaded
    preprocessor = DetDataPreprocessor(**{**dict(mean=MEAN, std=STD, bgr_to_rgb=True), **preprocessing})
    images = preprocessor(dict(inputs=[raw], data_samples=None))['inputs']
    seen = guide.bridge(images, [(40, 56)])
    assert seen.shape == (1, 3, 48, 64)  # multiples of the patch
    config = guide.weights.backbone.default_cfg
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    torch.testing.assert_close(seen[0, :, :40, :56], (raw.flip(0) / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert not seen[..., 40:, :].any() and not seen[..., 56:].any()  # the mean colour


def test_mean_std_and_order_can_be_given():
    guide, _ = make_backbone(name='test_vit', mean=[1, 2, 3], std=[4.0, 5.0, 6.0], bgr_to_rgb=False)
    images = torch.zeros(1, 3, 16, 16)  # which is the mean colour, red first
    seen = guide.bridge(images, [(16, 16)])[0, :, 0, 0]
    torch.testing.assert_close(seen, (torch.tensor(MEAN[::-1]) - torch.tensor([1.0, 2, 3])) / torch.tensor([4.0, 5, 6]))


def test_images_are_resized_for_a_model_of_one_size():
    guide, _ = make_backbone(name='test_maxvit', image_size=(160, 160))
    seen = []
    guide.weights.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    guide.observe(torch.randn(1, 3, 96, 160), [(96, 160)])
    assert seen == [(1, 3, 160, 160)]


# ------------------------------------------------------------------------------------------- what it loads


@pytest.fixture
def stored():
    """A model with a classifier, as its file has it."""
    import timm
    return timm.create_model('test_vit', num_classes=7).state_dict()


def save(state, tmp_path, form='plain'):
    if form == 'safetensors':
        from safetensors.torch import save_file
        save_file(state, tmp_path / 'weights.safetensors')
        return str(tmp_path / 'weights.safetensors')
    wrapped = dict(plain=state, nested=dict(model=state, epoch=3),
                   parallel=dict(state_dict={f'module.{key}': value for key, value in state.items()}))
    torch.save(wrapped[form], tmp_path / 'weights.pth')
    return str(tmp_path / 'weights.pth')


@pytest.mark.parametrize('form', ['plain', 'nested', 'parallel', 'safetensors'])
def test_weights_are_those_of_the_file_without_its_classifier(form, stored, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(backbone, 'print_log', lambda line, *_: said.append(line))
    guide, _ = make_backbone(name='test_vit', checkpoint=save(stored, tmp_path, form))
    loaded = guide.weights.backbone.model.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in loaded.items())
    assert set(stored) - set(loaded) == {'head.weight', 'head.bias'} and guide.checkpoint
    message, keys = said[0].split(': ')
    assert message.endswith('the classifier is left aside, which a Backbone has not')
    assert sorted(keys.split(', ')) == ['head.bias', 'head.weight']


def test_weights_with_their_authors_names_get_those_of_timm(stored, tmp_path):
    stored['mask_token'] = torch.zeros(1, 64)  # by which a file of DINOv2's authors is known
    guide, _ = make_backbone(name='test_vit', checkpoint=save(stored, tmp_path))
    assert all(torch.equal(value, stored[key]) for key, value in guide.weights.backbone.model.state_dict().items())


def test_a_detectors_backbone_is_loaded_after_its_prefix(tmp_path, retinanet):
    from mmdet.registry import MODELS
    detector = MODELS.build(retinanet())
    checkpoint = save(dict(detector.state_dict()), tmp_path)
    config = dict(config=dict(retinanet()['backbone'], type='mmdet.ResNet'), mean=MEAN, std=STD, checkpoint=checkpoint)
    guide, _ = make_backbone(**config, checkpoint_prefix='backbone.')
    assert torch.equal(guide.weights.backbone.conv1.weight, detector.backbone.conv1.weight)
    with pytest.raises(CheckpointError, match=r"checkpoint_prefix='backbone\.'"):
        make_backbone(**config)


@pytest.mark.parametrize('change, message', [
    (lambda state: state.pop('blocks.0.attn.qkv.weight'), r'1 keys missing from the file: model\.blocks\.0\.attn\.qkv'),
    (lambda state: state.update({'blocks.9.bias': torch.zeros(1)}), r'1 keys unexpected .*: model\.blocks\.9\.bias'),
    (lambda state: state.update({'norm.weight': torch.zeros(3)}), r'norm\.weight \(file \(3,\), model \(64,\)\)'),
    (lambda state: state.update({'patch_embed.proj.weight': torch.zeros(64, 3, 14, 14)}),
     r'patch_embed\.proj\.weight \(file \(64, 3, 14, 14\), model'),
    (lambda state: state['norm.weight'].fill_(float('nan')), 'not finite')])
def test_what_does_not_fit_to_the_last_key_is_refused(change, message, stored, tmp_path):
    change(stored)
    with pytest.raises(CheckpointError, match=message):
        make_backbone(name='test_vit', checkpoint=save(stored, tmp_path))


def test_a_damaged_file_of_safetensors_is_called_that(tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"weight"')
    with pytest.raises(CheckpointError, match='cannot be read as safetensors.*damaged'):
        make_backbone(name='test_vit', checkpoint=str(tmp_path / 'x.safetensors'))
    with pytest.raises(FileNotFoundError, match='No checkpoint at'):
        make_backbone(name='test_vit', checkpoint=str(tmp_path / 'y.safetensors'))


def test_it_is_frozen_and_its_fingerprint_sees_every_weight():
    guide, _ = make_backbone(config=RESNET, mean=MEAN, std=STD)
    assert not any(module.training for module in guide.weights.modules())
    assert not any(parameter.requires_grad for parameter in guide.weights.parameters())
    before = guide.fingerprint()
    guide.observe(torch.randn(1, 3, 64, 64), [(64, 64)])
    assert guide.fingerprint() == before
    guide.weights.backbone.bn1.running_mean[0] += 1
    assert guide.fingerprint() != before
    assert copy.deepcopy(dict(held=guide))['held'] is guide


def test_it_moves_with_the_student():
    guide, _ = make_backbone(name='test_vit')
    guide._apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert guide.observe(torch.randn(1, 3, 64, 64).double(), [(64, 64)])[0]['neck'][0].dtype == torch.float64


def test_building_draws_nothing_from_the_students_random_numbers():
    student = make_student()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_backbone(student, name='test_vit')
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize('config, message', [
    (dict(), 'name: expected either the name of a model of timm, or the config'),
    (dict(name='test_vit', config=RESNET), 'config: expected either'),
    (dict(name='test_vitt'), "has no model 'test_vitt'. Nearest: test_vit"),
    (dict(name='test_vit.nowhere'), r"can not build 'test_vit\.nowhere': Invalid pretrained tag"),
    (dict(name='hf-hub:timm/test_vit'), 'name: expected the name of a model of timm.*this machine alone'),
    (dict(name='test_vit', random_teacher=False), 'has no checkpoint'),
    (dict(name='test_vit', checkpoint='x.pth'), 'contradicts'),
    (dict(name='test_vit', random_teacher=False, checkpoint='https://host/x.pth'), 'a file on this machine'),
    (dict(name='test_vit', mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]), '255 times as large'),
    (dict(name='test_vit', mean=[0.0]), 'std: expected the standard deviation of each channel beside mean'),
    (dict(name='test_vit', mean=[0.0], std=[1.0, 1.0]), 'std: expected 1 numbers, as mean has'),
    (dict(name='test_maxvit'), 'can not be run on images of 256 × 256 pixels.*image_size'),
    (dict(config=RESNET), 'mean: expected how images are normalised'),
    (dict(config=RESNET, mean=MEAN, std=STD, out_indices=(1, )), 'out_indices: expected none beside a config'),
    (dict(config=dict(RESNET, depht=18), mean=MEAN, std=STD), "config: there is no argument 'depht'. Nearest: depth"),
    (dict(config=dict(type='ResNett'), mean=MEAN, std=STD), "config: there is no 'ResNett'"),
    (dict(config=dict(type='nowhere.ViT'), mean=MEAN, std=STD), "there is no package 'nowhere'"),
    (dict(config=dict(type='mmdet.FPN', in_channels=[3], out_channels=4, num_outs=1), mean=MEAN, std=STD),
     r'FPN puts out a tuple of 1 \(a tensor \(4, 256, 256\)')])
def test_what_can_not_be_is_one_clear_error_before_training(config, message):
    with pytest.raises((ConfigurationError, TeacherError), match=message):
        guide = build_guide(dict(type='Backbone', **dict(dict(random_teacher=True), **config)))
        guide.probe(NECK, [make_student()], LEVELS)


def test_a_backbone_of_vectors_is_refused(monkeypatch):
    monkeypatch.setattr(TimmBackbone, 'forward', lambda self, images: images.mean((2, 3)))
    with pytest.raises(TeacherError, match=r'puts out a tensor \(1, 3\) of float32, where a tuple of maps'):
        make_backbone(name='test_vit')


def test_without_timm_the_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ModuleNotFoundError) as error:
        make_backbone(name='test_vit')
    assert error.value.name == 'timm'


def test_a_term_that_compares_predictions_is_refused(distiller, retinanet):
    with pytest.raises(ConfigurationError, match=r"distill\.kd: it reads 'bbox_head', and a Backbone puts out no"):
        distiller(retinanet(), {}, teacher=dict(type='Backbone', name='test_vit', random_teacher=True),
                  distill=dict(kd=dict(type='DenseClassification')))


def test_methods_learn_from_a_backbone_that_a_file_names(run_config, retinanet, distiller, batch, tmp_path):
    import timm
    (tmp_path / 'vit.py').write_text("teacher = dict(type='mmdet.Backbone', name='test_vit')")
    torch.save(timm.create_model('test_vit', num_classes=0).state_dict(), tmp_path / 'vit.pth')
    config, _ = compose_distillation(run_config(retinanet()), [str(tmp_path / 'vit.py')], [str(tmp_path / 'vit.pth')],
                                     'foundation+token_relations')
    assert config.model.teacher == dict(type='mmdet.Backbone', name='test_vit', checkpoint=str(tmp_path / 'vit.pth'))
    model = distiller(config.model.student, {}, teacher=config.model.teacher, distill=config.model.distill).train()
    before = model.build_teachers()[0].fingerprint()
    assert model.terms['foundation'].adapters[0].weight.shape[:2] == (64, 32)
    losses = model.loss(**model.data_preprocessor(batch(), True))
    assert losses['loss_foundation'] > 0 and losses['loss_token_relations'] > 0  # by Balance, of the first batch on
    model.parse_losses(losses)[0].backward()
    assert model.backbone.conv1.weight.grad.any() and model.terms['foundation'].adapters[0].weight.grad.any()
    assert model.build_teachers()[0].fingerprint() == before


def test_a_file_that_names_another_guide_makes_no_ensemble(run_config, retinanet, tmp_path):
    (tmp_path / 'vit.py').write_text("teacher = dict(type='mmdet.Backbone', name='test_vit')")
    with pytest.raises(ConfigurationError, match='one teacher, a detector'):
        compose_distillation(run_config(retinanet()), [str(tmp_path / 'vit.py')], ['a.pth', 'b.pth'], 'pkd')


# ------------------------------------------------------------------------------------------- before training


def test_the_statistics_are_those_of_the_formula():
    statistics, generator = MapStatistics(), torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 6, 5, generator=generator) * torch.tensor([8.0, 2, 1, 0]).view(-1, 1, 1) + 1
    padded = torch.nn.functional.pad(images, (0, 3, 0, 2), value=1e6)  # of 8 × 8 cells, 80 × 80 pixels
    for image in padded:
        statistics.add(image[None], (80, 80), [(60, 50)])
    found, cells = statistics.summarize(), images.permute(0, 2, 3, 1).flatten(1, 2).double()
    assert found.over_cells == pytest.approx(float(cells.var(1, unbiased=False).mean()))
    assert found.over_images == pytest.approx(float(cells.mean(1).var(0, unbiased=False).mean()))
    flat = cells.flatten(0, 1)
    shares = torch.linalg.svdvals(flat - flat.mean(0)).square()
    shares = shares[:3] / shares.sum()
    assert found.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()))
    assert found.finite and not found.is_constant


@pytest.fixture
def runner(run_config):
    def make(**changes):
        config = run_config({}, val=True)
        config.merge_from_dict(changes)
        warnings = []
        model = make_student()
        return SimpleNamespace(cfg=config, model=model, warnings=warnings,
                               logger=SimpleNamespace(warning=warnings.append))
    return make


class Maps(nn.Module):

    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def extract_feat(self, images):
        gray = images.mean(1, keepdim=True).expand(-1, 48, -1, -1)
        return [self.compute(gray[..., ::8, ::8])]


def test_what_its_features_hold_is_said_before_training(runner):
    guide = put_out(Maps(torch.rand_like), [LevelSpec(48, 8)], 8)
    report = guide.report(runner(), 3, 0.0)
    number = r'(\d[\d.e-]*)'
    found = re.fullmatch(r"features of a Backbone on 3 images\n  'neck', the map of stride 8: variance over cells "
                         f'{number}, over images {number}, effective rank {number} of 48', report)
    over_cells, over_images, rank = map(float, found.groups())
    assert over_cells == pytest.approx(1 / 12, rel=0.1) and over_images < 0.01 and 30 < rank < 48  # of even noise
    assert 'on 8 images' in guide.report(runner(val_dataloader=None), 64, 0.0)  # those of the training


@pytest.mark.parametrize('compute, message', [
    (lambda gray: gray * 0 + 7, 'the same in all cells of 4 images, so that they teach nothing'),
    (lambda gray: gray * 0, 'the same in all cells'), (lambda gray: (gray * 0).log(), 'are not finite')])
def test_features_that_teach_nothing_end_the_run(compute, message, runner):
    with pytest.raises(TeacherError, match=f"Pre-flight: the features of a Backbone .'neck', the map of.*{message}"):
        put_out(Maps(compute), [LevelSpec(48, 8)], 8).report(runner(), 4, 0.0)


def test_poor_features_are_warned_of(runner):
    made = runner()
    put_out(Maps(lambda gray: gray), [LevelSpec(48, 8)], 8).report(made, 4, 0.0)
    assert 'have an effective rank of 1.00' in made.warnings[0]


def test_a_run_learns_from_a_backbone_and_says_what_it_is_worth(run_config, retinanet):
    from mmengine.runner import Runner
    config = run_config(
        dict(type='DetectionDistiller', student=retinanet(),
             teacher=[dict(type='Backbone', name='test_vit', random_teacher=True),
                      dict(type='Backbone', config=RESNET, mean=MEAN, std=STD, random_teacher=True)],
             distill=dict(pkd=dict(type='PKD', tap='neck', levels=3), fgd=dict(type='FGD', tap='neck', teacher=1))),
        epochs=1, val=True, preflight=dict(images=4), log_level='INFO')
    runner = Runner.from_cfg(config)
    assert isinstance(runner.model.guides[0], FeatureGuide) and runner.model.teachers is None
    runner.train()
    logged = runner.message_hub.log_scalars
    assert logged['train/loss_pkd'].current() > 0 and logged['train/loss_fgd'].current() > 0
    log, = Path(config.work_dir).glob('*/*.log')
    assert log.read_text().count('Pre-flight: features of a Backbone on 4 images') == 2
    stored = torch.load(f'{config.work_dir}/epoch_1.pth', weights_only=False)
    assert set(stored['state_dict']) == set(runner.model.student.state_dict())
