"""Students that start from a teacher of another width and depth: by a selection of its weights, or grown from it."""
import copy

import pytest
import torch
from mmcv.cnn import ConvModule, is_norm
from mmdet.models.necks.ssd_neck import L2Norm
from mmdet.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from kd_det.config import ConfigurationError
from kd_det.distillers import quantization_plan, resizing
from kd_det.distillers.inheritance import Inheritance, inherit
from kd_det.distillers.resizing import find_flattened, find_spread_layers, is_transposed, resize, spread_cells
from kd_det.training.hooks import build_origin_table

CNNS = ('RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3', 'Faster R-CNN', 'Cascade R-CNN',
        'Mask R-CNN')


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    for module in (quantization_plan, resizing):
        monkeypatch.setattr(module, 'PROBE_SIZE', 128)


@pytest.fixture
def pair(detector_config):
    """Makes a small and a large detector of a kind, their statistics and norms drawn, too."""

    def make(kind: str, factor: float = 2) -> tuple[nn.Module, nn.Module]:
        made = []
        for each in (1, factor):
            config = detector_config(kind, widths=(int(4 * each), int(16 * each)))
            if 'feat_channels' in config.get('bbox_head', {}):
                config.bbox_head.feat_channels = int(8 * each)
            if 'roi_head' in config and isinstance(config.roi_head.bbox_head, dict):
                config.roi_head.bbox_head.fc_out_channels = int(16 * each)
            made.append(draw(MODELS.build(config)))
        return tuple(made)

    return make


def draw(detector: nn.Module) -> nn.Module:
    for layer in detector.modules():
        if isinstance(layer, (_BatchNorm, nn.GroupNorm, L2Norm)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
        if isinstance(layer, (_BatchNorm, nn.GroupNorm)):
            nn.init.normal_(layer.bias, 0, 0.1)
        if isinstance(layer, _BatchNorm):
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return detector


def parts_of(detector: nn.Module) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.split('.')[0] for key in detector.state_dict()))


def outputs_of(detector: nn.Module) -> dict[str, list]:
    image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return resizing._run_parts(copy.deepcopy(detector).double().eval(), image)


def differ(one: dict[str, list], other: dict[str, list]) -> float:
    """By how much outputs differ at most, in units of the largest; those of fewer channels are in the other's order."""
    assert one.keys() == other.keys()
    return max(((resize(a, b.shape) - b).abs().max() / b.abs().max()).item()
               for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize('kind', ['RTMDet', 'Mask R-CNN', 'DINO'])
def test_a_detector_of_the_same_size_is_the_teacher_bit_for_bit(kind, detector_config):
    student, teacher = (draw(MODELS.build(detector_config(kind))) for _ in range(2))
    before = student.state_dict()['backbone.conv1.weight'].clone()
    for rule in ('selection', 'growth'):
        origins, refused = inherit(student, teacher, parts_of(student), Inheritance(rule))
        assert set(origins) == set(student.state_dict()) and set(origins.values()) == {'inherited'} and not refused
    assert all(map(torch.equal, student.state_dict().values(), teacher.state_dict().values()))
    assert not torch.equal(before, student.state_dict()['backbone.conv1.weight'])


@pytest.mark.parametrize('kind', ['RTMDet', 'SSD', 'DINO', 'Mask R-CNN'])
@pytest.mark.parametrize('rule', ['shape', 'selection'])
def test_a_layer_is_inherited_whole_or_not_at_all_and_the_statistics_behind_it_with_it(rule, kind, pair):
    student, teacher = pair(kind)
    if rule == 'selection':  # which takes from wider layers: let some be narrower
        student, teacher = teacher, student
    before = {key: value.clone() for key, value in student.state_dict().items()}
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance(rule))
    kept, norms = {key.rpartition('.')[0]: key in origins for key in before}, 0
    for key in before:
        path, _, name = key.rpartition('.')
        if not is_norm(student.get_submodule(path)):
            assert kept[path] == (key in origins), key
    assert any(each.endswith('(its layer stays)') for each in refused)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items() if key not in origins)
    for path, module in student.named_modules(remove_duplicate=False):
        if isinstance(module, ConvModule) and module.with_norm:
            statistics = [f'{path}.{module.norm_name}.{name}' for name in module.norm._buffers]
            norms += 1
            assert kept[f'{path}.conv'] or not origins.keys() & set(statistics)
    assert norms or kind not in ('RTMDet', 'DINO')


def test_the_statistics_of_other_blocks_stay_and_a_stem_that_fits_comes_whole(retinanet):
    student, teacher = (draw(MODELS.build(retinanet(depth=depth))) for depth in (18, 50))
    origins, _ = inherit(student, teacher, ('backbone', ))
    assert {key.split('.')[1] for key in origins if not key.startswith('backbone.layer')} == {'conv1', 'bn1'}
    own, theirs = student.state_dict(), teacher.state_dict()
    alike = {key for key in own if key.startswith('backbone.layer1.0.bn1') and own[key].shape == theirs[key].shape}
    # Of a convolution of 3 × 3 here, of 1 × 1 there: what comes out of the norm is scaled alike.
    assert origins.keys() & alike == {'backbone.layer1.0.bn1.weight', 'backbone.layer1.0.bn1.bias'} < alike
    assert 'backbone.layer1.0.conv2.weight' in origins and 'backbone.layer1.0.bn2.running_var' in origins


def test_an_activation_does_not_part_a_norm_from_its_layer():
    student, teacher = (nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Linear(4, 4),
                                      nn.LayerNorm(4)) for width in (2, 3))
    origins, refused = inherit(nn.ModuleDict(dict(neck=student)), nn.ModuleDict(dict(neck=teacher)), ('neck', ))
    assert origins.keys() == {f'neck.{place}.{name}' for place in (2, 3, 4) for name in ('weight', 'bias')}
    assert refused == ['neck.0.weight', *(f'neck.{key} (its layer stays)' for key in (
        '0.bias', '2.running_mean', '2.running_var', '2.num_batches_tracked'))]


def silence(teacher: nn.Module, student: nn.Module) -> None:
    """Lets no layer of the teacher look at the channels that the student does not have."""
    flattened = find_flattened(student)
    for path, layer in student.named_modules(remove_duplicate=False):
        if isinstance(layer, (_ConvNd, nn.Linear)):
            dim, weight = int(not is_transposed(layer)), teacher.get_submodule(path).weight
            kept = spread_cells(weight.shape[dim], layer.weight.shape[dim], flattened.get(path, 1))
            gone = torch.ones(weight.shape[dim], dtype=torch.bool).index_fill_(0, kept, False)
            weight.data.index_fill_(dim, gone.nonzero()[:, 0], 0)


@pytest.mark.parametrize('kind', ['RetinaNet', 'ATSS', 'RTMDet', 'SSD', 'YOLOv3', 'Mask R-CNN'])
def test_selected_channels_are_the_same_ones_wherever_they_are_shared(kind, pair):
    """The student computes what the teacher does whose layers do not look at what was not selected."""
    student, teacher = pair(kind, 1.5)
    for detector in (student, teacher):
        for layer in detector.modules():
            if isinstance(layer, (nn.GroupNorm, L2Norm)):  # which look at all channels of a group at once
                layer.forward = lambda feature: feature
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance('selection'))
    assert not refused and set(origins) == set(student.state_dict())
    assert {'selected', 'inherited'} == set(origins.values())
    whole = outputs_of(teacher)
    silence(teacher, student)
    found = outputs_of(teacher)
    assert differ(whole, found) > 1e-3
    expected = {name: [each if each.shape == own.shape else resize(each, own.shape) for each, own in
                       zip(found[name], outputs)] for name, outputs in outputs_of(student).items()}
    assert differ(outputs_of(student), expected) < 1e-9


def test_written_out_indices_of_a_small_case(faster_rcnn):
    """Half the channels: 0, 2, 4, …; of a linear layer that takes in maps of 9 cells, all 9 of a channel."""
    student, teacher = (draw(MODELS.build(faster_rcnn(width=width, neck=neck))) for width, neck in ((4, 8), (8, 16)))
    inherit(student, teacher, parts_of(student), Inheritance('selection'))
    own, theirs = student.state_dict(), teacher.state_dict()
    for key in ('weight', 'bias', 'running_mean', 'running_var'):
        assert torch.equal(own[f'backbone.layer3.1.bn2.{key}'], theirs[f'backbone.layer3.1.bn2.{key}'][::2])
    assert torch.equal(own['backbone.conv1.weight'], theirs['backbone.conv1.weight'][::2])
    assert torch.equal(own['neck.lateral_convs.0.conv.weight'], theirs['neck.lateral_convs.0.conv.weight'][::2, ::2])
    assert torch.equal(own['rpn_head.rpn_cls.weight'], theirs['rpn_head.rpn_cls.weight'][:, ::2])
    assert torch.equal(own['rpn_head.rpn_cls.bias'], theirs['rpn_head.rpn_cls.bias'])
    flattened = theirs['roi_head.bbox_head.shared_fcs.0.weight'].view(16, 16, 3, 3)
    assert torch.equal(own['roi_head.bbox_head.shared_fcs.0.weight'].view(16, 8, 3, 3), flattened[:, ::2])


@pytest.mark.parametrize('kind', ['DAB-DETR', 'Deformable DETR'])
def test_a_transformer_is_selected_from_head_by_head(kind, pair):
    student, teacher = pair(kind)
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance('selection'))
    assert not refused and set(origins) == set(student.state_dict())
    (own, theirs), layer = ((dict(each.named_parameters()) for each in (student, teacher)), 'decoder.layers.1.')
    key = next(key for key in own if key.startswith(f'{layer}self_attn') and own[key].dim() == 2)
    stacked = own[key].shape[0] // 32  # queries, keys and values may be one tensor; 4 heads, of 8 channels and of 16
    expected = theirs[key].view(stacked, 4, 16, 64)[:, :, ::2, ::2].reshape(-1, 32)
    assert torch.equal(own[key], expected)


def test_a_shallower_student_has_the_first_layers_of_each_stage(one_stage):
    student, teacher = (draw(MODELS.build(one_stage('fcos', depth=depth, width=width, stacked_convs=convs)))
                        for depth, width, convs in ((18, 4, 1), (34, 8, 3)))
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance('selection'))
    assert not refused
    theirs = teacher.state_dict()
    for layer in ('backbone.layer3.1.conv2.weight', 'bbox_head.cls_convs.0.conv.weight'):
        weight = theirs[layer]
        expected = weight if 'head' in layer else weight[::2, ::2]
        assert torch.equal(student.state_dict()[layer], expected)
        assert origins[layer] == ('inherited' if 'head' in layer else 'selected')


def test_a_shallower_student_may_have_layers_at_even_distances(one_stage):
    student, teacher = (draw(MODELS.build(one_stage('fcos', depth=depth, width=width, stacked_convs=convs)))
                        for depth, width, convs in ((18, 4, 2), (34, 8, 4)))
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance('selection', layers='even'))
    assert not refused and 'random' not in origins.values()
    own, theirs = student.state_dict(), teacher.state_dict()
    for key, counterpart in {'backbone.layer1.1.conv2.weight': 'backbone.layer1.1.conv2.weight',  # 2 of 3
                             'backbone.layer2.1.conv2.weight': 'backbone.layer2.2.conv2.weight',  # of 4
                             'backbone.layer3.1.bn1.running_var': 'backbone.layer3.3.bn1.running_var',  # of 6
                             'backbone.layer4.0.downsample.1.weight': 'backbone.layer4.0.downsample.1.weight',
                             'bbox_head.reg_convs.1.conv.weight': 'bbox_head.reg_convs.2.conv.weight',
                             'neck.fpn_convs.1.conv.weight': 'neck.fpn_convs.1.conv.weight'}.items():
        assert torch.equal(own[key], resize(theirs[counterpart], own[key].shape)), key


def test_the_decoder_of_a_shallower_transformer_keeps_its_places(detector_config):
    student, teacher = (MODELS.build(detector_config('DINO')) for _ in range(2))
    for detector, keep in ((student, 1), (teacher, 2)):
        for part in (detector.encoder, detector.decoder):
            first = part.layers[0]
            part.layers = nn.ModuleList([copy.deepcopy(first) for _ in range(2 * keep)])
    moved = find_spread_layers(student, teacher)
    assert moved['encoder.layers.1.norms.0.weight'] == 'encoder.layers.2.norms.0.weight'
    assert all(key.startswith('encoder.layers.1.') for key in moved)


@pytest.mark.parametrize('make, changes, expected', [
    ('retinanet', dict(depth=50), ['backbone (backbone.layer1.0: a Bottleneck in the teacher, a BasicBlock here)']),
    ('retinanet', dict(classes=5), ['bbox_head.retina_cls.weight (5 outputs in the teacher, 3 here)',
                                    'bbox_head.retina_cls.bias (5 outputs in the teacher, 3 here)']),
    ('retinanet', dict(width=2), None),
    ('faster_rcnn', {}, ['bbox_head (the teacher has none)']),
])
def test_what_can_not_be_selected_stays_and_is_told(make, changes, expected, request, retinanet):
    student = MODELS.build(retinanet(width=4, neck=8))
    teacher = MODELS.build(request.getfixturevalue(make)(**dict(dict(width=8, neck=16), **changes)))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance('selection'))
    if expected is None:  # all of the backbone is narrower, and the neck where it reads it
        assert {each.split('.')[0] for each in refused} == {'backbone', 'neck'}
        expected = ['backbone.conv1.weight ((2, 3, 7, 7) in the teacher, (4, 3, 7, 7) here)']
        assert expected == refused[:1] and 'backbone.layer1.0.conv1.weight' not in origins
    else:
        assert [each for each in refused if make == 'retinanet' or each.startswith('bbox_head')] == expected
    assert origins['neck.fpn_convs.0.conv.weight'] == 'selected'
    left = {key for key in before if key not in origins}
    assert left and all(torch.equal(before[key], student.state_dict()[key]) for key in left)


# ---------------------------------------------------------------------------------------------------- a larger student


def grow(student: nn.Module, teacher: nn.Module, noise: float = 0.1) -> dict[str, str]:
    origins, refused = inherit(student, teacher, parts_of(student), Inheritance('growth', noise))
    assert not refused
    return origins


@pytest.mark.parametrize('kind', CNNS)
def test_a_wider_student_computes_what_the_teacher_does(kind, pair):
    teacher, student = pair(kind, 3 if kind in ('ATSS', 'GFL', 'FCOS', 'SSD') else 1.5)
    assert set(grow(student, teacher)) == set(student.state_dict())
    assert differ(outputs_of(teacher), outputs_of(student)) < 1e-5


@pytest.mark.parametrize('family, depth, head', [
    ('retina', 34, dict(stacked_convs=4)), ('retina', 18, dict(stacked_convs=3, norm_cfg=dict(type='BN'))),
    ('fcos', 34, {})])
def test_a_deeper_and_wider_student_computes_what_the_teacher_does(family, depth, head, one_stage):
    small, large = (MODELS.build(one_stage(family, width=width, depth=each, **changes)) for width, each, changes in
                    ((4, 18, {**head, **({'stacked_convs': 1} if head else {})}), (8, depth, head)))
    teacher, student = draw(small), draw(large)
    origins = grow(student, teacher)
    assert differ(outputs_of(teacher), outputs_of(student)) < 1e-5
    if head:
        assert origins['bbox_head.cls_convs.2.conv.weight'] == 'grown'
    if depth == 34:
        assert origins['backbone.layer1.2.bn2.weight'] == 'grown' and 'backbone.layer1.2.conv1.weight' not in origins


def test_a_deeper_two_stage_student_computes_what_the_teacher_does(faster_rcnn):
    """Bottlenecks, and linear layers that stand behind a ReLU."""
    small, large = faster_rcnn(depth=50), faster_rcnn(depth=101)
    for config, convs, fcs in ((small, 1, 1), (large, 2, 2)):
        config.roi_head.bbox_head.update(type='ConvFCBBoxHead', num_shared_convs=convs, num_shared_fcs=fcs,
                                         conv_out_channels=8)
    teacher, student = (draw(MODELS.build(config)) for config in (small, large))
    origins = grow(student, teacher)
    assert origins['backbone.layer3.22.bn3.bias'] == origins['roi_head.bbox_head.shared_fcs.1.weight'] == 'grown'
    assert differ(outputs_of(teacher), outputs_of(student)) < 1e-5


@pytest.mark.parametrize('noise', [0.0, 0.1])
def test_copies_learn_to_differ_by_unequal_shares(noise, retinanet, batch):
    student, teacher = (draw(MODELS.build(retinanet(width=width))) for width in (8, 4))
    grow(student, teacher, noise)
    weight = student.backbone.layer3[0].conv1.weight
    pairs = weight.detach().view(16, 2, 8, 2, 3, 3)
    assert torch.allclose(pairs.sum(3), teacher.backbone.layer3[0].conv1.weight[:, None], atol=1e-6)
    assert torch.equal(pairs[..., 0, :, :], pairs[..., 1, :, :]) == (noise == 0)
    student.eval()  # statistics of the batch would do
    data = student.data_preprocessor(batch(), True)
    student.parse_losses(student(**data, mode='loss'))[0].backward()
    stem = student.backbone.conv1.weight.grad.view(4, 2, -1)
    apart = (stem[:, 0] - stem[:, 1]).abs().max() / stem.abs().max()
    assert (apart < 1e-5) if noise == 0 else (apart > 1e-3)


def fcos(one_stage, **changes):
    changes = dict(dict(width=8, neck=16, stacked_convs=1, feat_channels=16), **changes)
    return one_stage('fcos', **changes)


@pytest.mark.parametrize('changes, message', [
    (dict(depth=50), 'which backbone.layer1.0 can not: a BasicBlock in the teacher, a Bottleneck here'),
    (dict(stacked_convs=2), 'bbox_head.cls_convs.1 can not: the teacher has none, and with a GroupNorm no layer is an'),
    (dict(feat_channels=12), 'bbox_head.cls_convs.0.gn can not: a GroupNorm needs each channel as often as the others'),
    (dict(norm_cfg=dict(type='GN', num_groups=4)), 'cls_convs.0.gn can not: num_groups=2 in the teacher, 4 here'),
    (dict(classes=4), 'bbox_head.conv_cls.weight can not: 3 outputs in the teacher, 4 here'),
    (dict(width=2), r'backbone.conv1.weight can not: \(4, 3, 7, 7\) in the teacher, \(2, 3, 7, 7\) here'),
    (dict(norm_cfg=None), 'bbox_head.cls_convs.0.conv.bias can not: the teacher has none'),
    (dict(strides=[4, 8, 16]), ''),  # no weight, and nothing that is put out of the network
    (dict(centerness_on_reg=True), 'bbox_head can not: it puts out numbers up to .* off on an image of noise'),
])
def test_what_can_not_be_kept_is_refused_by_name(changes, message, one_stage):
    teacher = draw(MODELS.build(fcos(one_stage, width=4, neck=8, feat_channels=8)))
    student = MODELS.build(fcos(one_stage, **changes))
    if not message:
        grow(student, teacher)
        return
    with pytest.raises(ConfigurationError, match=f"model.inherit_by: by 'growth' .*{message}"):
        grow(student, teacher)


@pytest.mark.parametrize('own, theirs, message', [
    ((64, 8), (32, 8), 'a MultiheadAttention does not do the same with copied channels'),
    ((32, 8), (32, 4), '')])
def test_a_transformer_keeps_its_width_and_its_backbone_may_grow(own, theirs, message, detr):
    student, teacher = (MODELS.build(detr('DETR', embed=embed, width=width)) for embed, width in (own, theirs))
    if message:
        with pytest.raises(ConfigurationError, match=f'encoder.layers.0.self_attn.attn can not: {message}'):
            grow(student, teacher)
    else:
        grow(student, teacher)
        assert differ(outputs_of(teacher), outputs_of(student)) < 1e-5


# ------------------------------------------------------------------------------------------------- in a distillation


@pytest.mark.parametrize('by, widths, origin, changes', [
    ('selection', (4, 8), 'selected', {}), ('selection', (4, 8), 'selected', dict(quantize=dict(bits=8))),
    (dict(rule='growth'), (8, 4), 'grown', {}), ('shape', (4, 8), 'inherited', {})])
def test_a_distillation_starts_all_parts_and_tells_by_which_rule(by, widths, origin, changes, retinanet, distiller):
    student, taught_by = (retinanet(width=width) for width in widths)
    model = distiller(student, taught_by, inherit='auto', inherit_by=by, distill={}, **changes)
    model.init_weights()
    counts = model.origins.count_by_part()
    if by == 'shape':  # as ever: no backbone, and of the neck what does not read it
        assert model.inherited_parts == ('neck', 'bbox_head') and counts['backbone']['random'] and model.not_inherited
        return
    assert model.inherited_parts == ('backbone', 'neck', 'bbox_head') and not model.not_inherited
    assert counts['backbone'][origin] and counts['neck'][origin] and counts['neck']['inherited']
    assert not any(counts[part]['random'] for part in counts)
    rows = [line for line in build_origin_table(model).splitlines() if origin in line or 'student.backbone' in line]
    assert rows[0].split('┃').index(next(cell for cell in rows[0].split('┃') if origin in cell)) == next(
        index for index, cell in enumerate(rows[1].split('│')) if f"{counts['backbone'][origin]:,}" in cell)


@pytest.mark.parametrize('changes, message', [
    (dict(inherit_by='growth', inherit=('neck', )), r"model.inherit: expected 'auto' beside inherit_by='growth'"),
    (dict(inherit_by='selection'), r"model.inherit_by: expected 'shape' where nothing is inherited, got 'selection'"),
    (dict(inherit_by=dict(rule='growth', noise=-1.0), inherit='auto'), 'model.inherit_by.noise: expected a number of'),
    (dict(inherit_by=dict(rule='growth', layers='even'), inherit='auto'),
     "model.inherit_by.layers: expected it beside rule='selection' alone, got 'even'"),
    (dict(inherit_by=dict(rule='grow'), inherit='auto'), 'model.inherit_by.rule: expected one of .* Nearest: growth'),
    (dict(inherit_by='growth', inherit='auto', teacher=(), peers=1), 'model.inherit_by: expected .* nothing is'),
])
def test_what_does_not_go_together_is_told(changes, message, retinanet, distiller):
    with pytest.raises(ConfigurationError, match=message):
        distiller(retinanet(width=8), retinanet(), **{**dict(distill={}), **changes}).init_weights()


def test_noise_of_a_growth_moves_no_random_numbers(retinanet, distiller):
    model = distiller(retinanet(width=8), retinanet(), distill={}, inherit='auto', inherit_by='growth')
    model.student.init_weights()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model.inherit()
    assert torch.equal(torch.rand(1), expected)
