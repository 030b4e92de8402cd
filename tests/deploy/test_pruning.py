"""A pruned detector is what torch-pruning makes of it, read from its files, and is a detector like any other."""
import copy
import math
import re
from functools import partial

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.models.detectors import RetinaNet
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmengine.config import Config, ConfigDict
from mmengine.runner import set_random_seed
from torch import nn

import kd_det
from kd_det.compat import NotFiniteError
from kd_det.compat.writing import WritingError
from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError
from kd_det.config.files import load_config
from kd_det.deploy.channels import (
    build_graph,
    check_kept,
    choose_kept,
    count_costs,
    find_groups,
    make_image,
    make_traceable,
    run_layers,
)
from kd_det.deploy.pruned import (
    PRUNED,
    compose_kept,
    narrow_detector,
    read_channels,
    read_kept,
    write_channels,
    write_kept,
)
from kd_det.deploy.pruning import accumulate_gradients
from kd_det.distillers.inheritance import inherit
from kd_det.registry import build_detector
from kd_det.training import runs

DENSE = ('RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3')
KINDS = (*DENSE, 'Faster R-CNN', 'Cascade R-CNN', 'Mask R-CNN', 'DETR', 'Deformable DETR', 'DINO')
SIZE = (64, 64)  # to which the pipelines of these tests resize
TEST_CFG = dict(nms_pre=60, score_thr=0.0, conf_thr=0.0, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.6),
                max_per_img=30)
SHAPES, BOXES = ((64, 64), (64, 48)), (((8, 8, 40, 40), (30, 20, 60, 60)), ((20, 4, 40, 50), ))


@pytest.fixture
def model_of(detector_config):
    """Makes the model dict of a kind, which predicts."""

    def make(kind: str) -> dict:
        model = detector_config(kind)
        if kind in DENSE:
            model.test_cfg = ConfigDict(TEST_CFG)
        return model

    return make


def build_awake(model: dict) -> nn.Module:
    """Builds a detector that tells images apart: norms that are no identity, heads with scores of all sizes."""
    set_random_seed(0)
    detector = build_detector(model).eval()
    detector.init_weights()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if parameter.dim() > 1 and 'head' in name:
                parameter.normal_(0, 0.1)
        for layer in detector.modules():
            if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.1)
                if isinstance(layer, nn.BatchNorm2d):
                    layer.running_mean.normal_(0, 0.1)
                    layer.running_var.uniform_(0.5, 1.5)
    return detector


def save(detector: nn.Module, file) -> str:
    torch.save(dict(state_dict=detector.state_dict()), file)
    return str(file)


def share_for(kind: str) -> float:
    """Of MACs; the tokens of a DETR, most of these tiny ones, keep their width."""
    return 0.85 if kind in ('DETR', 'Deformable DETR', 'DINO') else 0.5


def prune_with_torch_pruning(detector: nn.Module, groups: list, kept: dict) -> nn.Module:
    """What torch-pruning makes of a detector itself where the same channels of the same groups go."""
    traced = make_traceable(detector)
    names = {module: path for path, module in traced.named_modules()}
    graph = build_graph(traced, names)
    for group in groups:
        use = group.uses[0]
        channels, count = kept.get((use.path, use.side), (tuple(range(group.count)), group.count))
        gone = sorted(set(range(count)) - set(channels))
        if gone:
            layer = traced.get_submodule(use.path)
            graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, gone).prune()
    pruned = copy.deepcopy(detector)
    for path, module in traced.named_modules():
        if isinstance(module, BaseRoIExtractor) or not any(module.children()):
            own = pruned.get_submodule(path)
            for name, value in vars(module).items():
                if name in ('_parameters', '_buffers') or isinstance(value, (int, tuple)):
                    setattr(own, name, value)
    return pruned.eval()


@pytest.mark.parametrize('kind', KINDS)
def test_a_pruned_detector_of_a_file_is_what_torch_pruning_makes(kind, model_of, batch_for, run_config, tmp_path):
    detector = build_awake(model_of(kind))
    traced = make_traceable(detector)
    groups = find_groups(traced, 'group_norm')
    costs, share = count_costs(detector, SIZE), share_for(kind)
    kept = choose_kept(traced, groups, costs, share)
    expected = prune_with_torch_pruning(detector, groups, kept)

    config = run_config(model_of(kind), val=True)
    config.test_dataloader = config.val_dataloader
    found = kd_det.prune(config, save(detector, tmp_path / 'whole.pth'), tmp_path / 'small.pth', share,
                         importance='group_norm', evaluation=False)
    model = init_detector(str(found.config), str(found.checkpoint), device='cpu')
    assert isinstance(model, type(detector)) and type(model).__name__ == f'Pruned{type(detector).__name__}'
    assert not any(getattr(parameter, 'grad', None) is not None for parameter in model.parameters())

    data = model.data_preprocessor(batch_for(kind, SHAPES, BOXES), False)
    with torch.no_grad():
        predicted, same = (each(**copy.deepcopy(data), mode='predict') for each in (model, expected))
    for one, other in zip(predicted, same):
        assert len(one.pred_instances) > 0
        for name, value in one.pred_instances.items():
            assert torch.equal(value, other.pred_instances[name]) if isinstance(value, torch.Tensor) else True

    before, after = found.macs
    assert before == costs.total and after == count_costs(model, SIZE).total <= share * before
    assert after > 0.9 * share * before  # and not much less than was asked for
    data = model.data_preprocessor(batch_for(kind, SHAPES, BOXES), True)
    model.train().parse_losses(model(**data, mode='loss'))[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.backbone.conv1.weight.grad.any()


@pytest.fixture
def whole(retinanet, run_config, tmp_path):
    """The config of a run of a RetinaNet whose widths are multiples of eight, and its checkpoint."""
    model = retinanet(width=16, neck=32)
    config = run_config(model, val=True)
    config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    config.test_cfg = dict(type='TestLoop')
    config.dump(tmp_path / 'whole.py')
    return str(tmp_path / 'whole.py'), save(build_awake(model), tmp_path / 'whole.pth')


@pytest.fixture(scope='module')
def made():
    return {}


@pytest.fixture
def pruned(whole, made, tmp_path_factory):
    """The detector of :func:`whole`, pruned, the same for all tests."""
    if not made:
        out = tmp_path_factory.mktemp('pruned') / 'pruned.pth'
        made['pruned'] = kd_det.prune(*whole, out, 0.4, importance='group_norm', evaluation=False)
    return made['pruned']


def test_widths_are_multiples_of_eight_and_the_table_tells_all(pruned):
    found, text = pruned, pruned.tabulate().to_plain()
    assert 'PrunedRetinaNet, 64 × 64 pixels' in text and re.search(r'backbone +[\d,]+ → [\d,]+', text)
    assert {'backbone', 'neck', 'bbox_head'} == set(found.before) == set(found.to_dict()['after'])
    model = Config.fromfile(found.config).model
    assert model.type == 'PrunedRetinaNet'
    widths = [len(read_channels(group.channels)[0]) for group in model.kept]
    assert widths and not any(width % 8 for width in widths)
    loaded = torch.load(found.checkpoint, weights_only=False)
    assert set(loaded) == {'meta', 'state_dict'} and loaded['meta']['pruned_by'] == 'kd-det prune'


def test_a_pruned_detector_is_exported_like_any_other(pruned, tmp_path):
    plain = kd_det.export(pruned.config, pruned.checkpoint, tmp_path / 'plain.pth')
    assert Config.fromfile(plain.config).custom_imports.imports == ['kd_det']  # who builds it
    assert type(init_detector(str(plain.config), str(plain.checkpoint), device='cpu')) is PRUNED[RetinaNet]
    graph = kd_det.export(pruned.config, pruned.checkpoint, tmp_path / 'graph.onnx', images=2)
    assert graph.info.detector == 'PrunedRetinaNet' and graph.comparison.box_error < 0.01


def test_frozen_stages_are_pruned_and_learn(whole, tmp_path):
    config = Config.fromfile(whole[0])
    config.model.backbone.update(frozen_stages=1, norm_eval=True, with_cp=True,
                                 init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth'))
    found = kd_det.prune(config, whole[1], tmp_path / 'small.pth', 0.4, batches=1, evaluation=False)
    assert found.importance == 'taylor'
    made = Config.fromfile(found.config).model
    assert made.backbone.frozen_stages == -1 and 'init_cfg' not in made.backbone
    made.backbone.frozen_stages = 1  # who freezes them again can
    model = build_detector(made).train()
    assert model.backbone.conv1.out_channels < 16 and not model.backbone.norm1.training
    assert not any(parameter.requires_grad for parameter in model.backbone.layer1.parameters())


def test_pruned_twice_is_one_detector_of_the_unpruned_numbers(whole, pruned, tmp_path):
    once = pruned
    twice = kd_det.prune(once.config, once.checkpoint, tmp_path / 'twice.pth', 0.6, importance='group_norm',
                         evaluation=False)
    first, second = (read_kept(Config.fromfile(each.config).model.kept) for each in (once, twice))
    assert all(set(second[key][0]) <= set(first[key][0]) and second[key][1] == first[key][1] for key in first)
    model = build_detector(Config.fromfile(twice.config).model)
    assert type(model) is PRUNED[RetinaNet]
    state = torch.load(whole[1])['state_dict']
    selected = model.select_kept(state)
    assert all(torch.equal(value, selected[key]) for key, value in
               torch.load(twice.checkpoint, weights_only=False)['state_dict'].items())
    assert compose_kept({('a', 'outputs'): ((1, 3, 4), 6), ('b', 'inputs'): ((0, ), 2)},
                        {('a', 'outputs'): ((0, 2), 3), ('c', 'outputs'): ((1, ), 2)}) == {
        ('a', 'outputs'): ((1, 4), 6), ('b', 'inputs'): ((0, ), 2), ('c', 'outputs'): ((1, ), 2)}


def test_in_steps_something_trains_between(whole, tmp_path):
    trained = []

    def train(config, checkpoint, step):
        trained.append((config.name, step))
        assert Config.fromfile(config).load_from == str(checkpoint)
        return checkpoint

    found = kd_det.prune(*whole, tmp_path / 'small.pth', 0.4, steps=2, train=train, importance='group_norm',
                         evaluation=False)
    assert trained == [('step_1.py', 1)]
    before, after = found.macs
    middle = count_costs(build_detector(Config.fromfile(tmp_path / 'small_steps' / 'step_1.py').model), (64, 64)).total
    assert 0.35 * before < after <= 0.4 * before and 0.57 * before < middle <= 0.4**(1 / 2) * before
    assert before == count_costs(build_detector(Config.fromfile(whole[0]).model), (64, 64)).total


def test_a_pruned_student_inherits_what_it_kept(whole, pruned, distiller):
    student = Config.fromfile(pruned.config).model
    model = distiller(student, Config.fromfile(whole[0]).model, inherit=('backbone', 'neck', 'bbox_head'))
    model.init_weights()  # adapters have the widths that are left, and all that was kept is the teacher's
    assert model.origins.count_by_part()['neck']['random'] == 0
    teacher = model.build_teachers()[0].model
    teacher.load_state_dict(torch.load(whole[1])['state_dict'])
    inherited, refused = inherit(model.student, teacher, ('backbone', 'neck', 'bbox_head'))
    assert not refused and len(inherited) == len(model.student.state_dict())
    expected = torch.load(pruned.checkpoint, weights_only=False)['state_dict']
    assert all(torch.equal(value, expected[key]) for key, value in model.student.state_dict().items())


def test_a_pruned_detector_is_selected_from_and_a_pruned_student_takes_what_it_kept(pruned, distiller, retinanet):
    kept = Config.fromfile(pruned.config).model
    model = distiller(retinanet(width=2, neck=4), kept, inherit='auto', inherit_by='selection', distill={})
    model.init_weights()
    assert not model.not_inherited
    assert not any(part['random'] for part in model.origins.count_by_part().values())
    with pytest.raises(ConfigurationError, match="model.inherit_by: expected 'shape' for a pruned student"):
        distiller(kept, retinanet(width=32), inherit='auto', inherit_by='selection', distill={}).init_weights()


def test_a_pruned_detector_teaches(pruned, distiller, batch, retinanet):
    """What it puts out is as wide as it is now, its towers too."""
    teacher = Config.fromfile(pruned.config).model
    model = distiller(retinanet(), teacher, distill=dict(fgd=dict(type='FGD'), crosskd=dict(type='CrossKD')))
    model.init_weights()
    losses = model.train()(**model.data_preprocessor(batch(), True), mode='loss')
    assert losses['loss_fgd'] > 0 and losses['loss_crosskd'] > 0


def test_taylor_keeps_what_the_loss_asks_for(whole):
    """A channel whose gradient is 0 goes first, whatever its weights."""
    detector = build_detector(Config.fromfile(whole[0]).model)
    traced = make_traceable(detector)
    for parameter in traced.parameters():
        parameter.grad = torch.ones_like(parameter)
    layer = traced.backbone.layer3[0].conv1
    for each in (layer.weight, traced.backbone.layer3[0].bn1.weight, traced.backbone.layer3[0].bn1.bias):
        each.grad[:8] = 0
    traced.backbone.layer3[0].conv2.weight.grad[:, :8] = 0
    layer.weight.data[:8] *= 100
    kept = choose_kept(traced, find_groups(traced, 'taylor'), count_costs(detector, SIZE), 0.5)
    assert not set(range(8)) & set(kept['backbone.layer3.0.conv1', 'outputs'][0])
    kept = choose_kept(traced, find_groups(traced, 'group_norm'), count_costs(detector, SIZE), 0.5)
    assert set(range(8)) <= set(kept['backbone.layer3.0.conv1', 'outputs'][0])


def test_chance_is_of_the_seed(whole, tmp_path):
    kept = []
    for seed in (0, 0, 1):  # its own files it replaces
        found = kd_det.prune(*whole, tmp_path / 'small.pth', importance='random', seed=seed, evaluation=False)
        kept.append(Config.fromfile(found.config).model.kept)
    assert kept[0] == kept[1] != kept[2]


def test_gradients_are_of_training_images(whole, tmp_path):
    """Of the frozen stages too, and nothing is learnt."""
    config = Config.fromfile(whole[0])
    config.model.backbone.frozen_stages = 4
    detector = build_detector(config.model)
    state = copy.deepcopy(detector.state_dict())
    gradients = accumulate_gradients(detector, config, 2)
    assert all(gradient.any() for gradient in gradients)
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())
    found = kd_det.prune(config, whole[1], tmp_path / 'small.pth', importance='taylor', batches=1, evaluation=False)
    assert found.macs[1] <= 0.5 * found.macs[0]
    with torch.no_grad():
        detector.backbone.conv1.weight.fill_(float('nan'))
    with pytest.raises(NotFiniteError, match='--importance taylor: the gradients'):
        accumulate_gradients(detector, config, 1)
    config.pop('train_dataloader')
    with pytest.raises(ConfigurationError, match='--importance taylor: the config has no train_dataloader'):
        accumulate_gradients(detector, config, 2)


def test_without_training_images_the_weights_decide_and_that_is_told(whole, tmp_path):
    config = Config.fromfile(whole[0])
    config.test_dataloader = None  # nor is it evaluated
    config.train_dataloader.dataset.ann_file = 'none.json'
    found = kd_det.prune(config, whole[1], tmp_path / 'small.pth')
    by_norm = kd_det.prune(config, whole[1], tmp_path / 'norm.pth', importance='group_norm', evaluation=False)
    assert found.importance == 'group_norm' and by_norm.note == 'It was not evaluated.'
    assert re.match(r'The gradients for taylor can not be had: .*none.json.*\nIt was not evaluated: ', found.note)
    assert 'Channels were chosen by group_norm.' in found.tabulate().caption and found.note in found.tabulate().caption
    assert all(Config.fromfile(each.config).model.kept == Config.fromfile(found.config).model.kept
               for each in (found, by_norm))
    with pytest.raises(FileNotFoundError, match='none.json'):
        kd_det.prune(config, whole[1], tmp_path / 'other.pth', importance='taylor', evaluation=False)


def test_config_and_checkpoint_are_moved_together(whole, pruned, tmp_path, monkeypatch):
    """The training of a pruned detector starts from the checkpoint beside its config, wherever that is."""
    folder = tmp_path / "one's own folder"
    folder.mkdir()
    for file in (pruned.config, pruned.checkpoint):
        (folder / file.name).write_bytes(file.read_bytes())
    assert Config.fromfile(folder / 'pruned.py').load_from == str(folder / 'pruned.pth')
    (tmp_path / 'heir.py').write_text(f'_base_ = {str(folder / "pruned.py")!r}\n')
    assert Config.fromfile(tmp_path / 'heir.py').load_from == str(folder / 'pruned.pth')
    monkeypatch.chdir(folder)
    assert load_config('pruned.py').load_from == str(folder / 'pruned.pth')
    assert str(pruned.checkpoint.parent) not in pruned.config.read_text()


def test_a_wrong_graph_is_found_out(whole):
    detector = build_awake(Config.fromfile(whole[0]).model)
    traced = make_traceable(detector)
    kept = choose_kept(traced, find_groups(traced, 'group_norm'), count_costs(detector, SIZE), 0.5)
    check_kept(detector, kept)
    key = 'backbone.layer3.0.conv2', 'inputs'
    channels, count = kept[key]
    shifted = tuple(sorted((channel + 1) % count for channel in channels))
    with pytest.raises(ConfigurationError, match='do not fit one another'):
        check_kept(detector, {**kept, key: (shifted, count)})


# ------------------------------------------------------------------------------------------------ what layers may be


class Branches(nn.Module):
    """A backbone of all that a group may run through: parts of norms, grouped and depthwise convolutions, joins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 8, 1)
        self.norm = nn.GroupNorm(4, 32)
        self.grouped = nn.Conv2d(32, 32, 3, 1, 1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.left, self.right = nn.Conv2d(32, 16, 1), nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(48, 16, 2, 2)
        self.prelu = nn.PReLU(16)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, images):
        one = self.depthwise(self.grouped(self.norm(self.stem(images)).relu()))
        joined = torch.cat([self.left(one), one.new_ones(1) * self.right(one), self.left(one)], 1)
        return (self.last(self.prelu(self.up(joined))), )


class Detector(nn.Module):
    """As much of a detector as is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.bbox_head = Branches(), nn.Identity()

    def extract_feat(self, images):
        return self.backbone(images)


def test_parts_groups_and_joins_are_narrowed_alike():
    detector = Detector().eval()
    traced = make_traceable(detector)
    groups = find_groups(traced, 'group_norm')
    kept = choose_kept(traced, groups, count_costs(detector, SIZE), 0.4)
    assert {'stem', 'grouped', 'left', 'right', 'up'} <= {path.split('.')[1] for path, _ in kept}
    assert ('backbone.last', 'outputs') not in kept  # it is what the detector puts out
    check_kept(detector, kept)
    small = copy.deepcopy(detector)
    narrow_detector(small, kept)
    body = small.backbone
    assert body.norm.num_channels % 4 == 0 and body.grouped.out_channels % 4 == 0 and body.grouped.groups == 4
    assert body.depthwise.groups == body.depthwise.in_channels == body.grouped.out_channels
    assert body.up.in_channels == 2 * body.left.out_channels + body.right.out_channels
    assert body.prelu.num_parameters == body.up.out_channels < 16
    image = make_image(detector)
    expected = prune_with_torch_pruning(detector, groups, kept)
    assert torch.equal(run_layers(small, image)[0], run_layers(expected, image)[0])


def test_what_is_not_reached_is_named():
    detector = Detector()
    detector.backbone.aside = nn.Conv2d(8, 8, 1)
    with pytest.raises(ConfigurationError, match=r'how its backbone\.aside \(Conv2d\) takes part is not known'):
        find_groups(make_traceable(detector), 'group_norm')


# ------------------------------------------------------------------------------------------------ what can not be


def test_a_part_that_can_not_be_followed_is_one_clear_refusal(faster_rcnn, run_config, tmp_path):
    """Double Heads, whose box head takes two maps."""
    config = run_config(faster_rcnn())
    head = config.model.roi_head
    head.update(type='DoubleHeadRoIHead', reg_roi_scale_factor=1.3)
    head.bbox_head.update(type='DoubleConvFCBBoxHead', num_convs=1, num_fcs=1, conv_out_channels=16, fc_out_channels=16)
    checkpoint = save(build_detector(config.model), tmp_path / 'double.pth')
    with pytest.raises(ConfigurationError, match=r'A \w+ of this config can not be pruned: one of its parts reorders '
                       r'channels, or runs in a way of its own \(TypeError: .*[^.]\)\. Prune a detector with another '
                       r'backbone, neck or head\.$'):
        kd_det.prune(config, checkpoint, tmp_path / 'small.pth', importance='random', evaluation=False)
    assert not (tmp_path / 'small.pth').exists()


def test_refusals_are_of_one_line_and_leave_nothing(whole, faster_rcnn, run_config, tmp_path):
    config, checkpoint = whole
    other = save(build_detector(faster_rcnn()), tmp_path / 'other.pth')
    (tmp_path / 'mine.pth').write_bytes(b'mine')
    (tmp_path / 'chain_steps').mkdir()
    (tmp_path / 'chain_steps' / 'step_1.py').write_text('mine = 1')
    out = tmp_path / 'small.pth'
    refused = [
        (dict(checkpoint=other), ConfigurationError, 'is not of the student'),
        (dict(out=tmp_path / 'mine.pth'), WritingError, 'is not a pruned detector that kd_det wrote'),
        (dict(out=tmp_path / 'chain.pth', steps=2), WritingError, "step_1.py' exists, and is not the config of"),
        (dict(out=tmp_path / 'whole.py'), ConfigurationError, 'expected the name of a checkpoint'),
        (dict(macs=1.5), ArgumentError, 'macs: expected a number above 0 and below 1, got 1.5'),
        (dict(macs=0.001), ConfigurationError, r'--macs 0\.001: what can be pruned of this detector leaves 0\.\d+ of'),
        (dict(importance='size'), ArgumentError, 'importance: expected one of auto, group_norm, taylor, random'),
        (dict(options={'model.type': 'LAD', 'model.teacher_backbone': {}}), ConfigurationError,
         'A LAD can not be pruned: kd-det prunes'),
    ]
    for changes, error, message in refused:
        arguments = dict(dict(config=config, checkpoint=checkpoint, out=out, evaluation=False), **changes)
        with pytest.raises(error, match=message):
            kd_det.prune(**arguments)
    (tmp_path / 'own.py').write_text('mine = 1')
    own = kd_det.prune(config, checkpoint, tmp_path / 'own.pth', batches=1, evaluation=False, force=True)
    for given in ((own.config, own.checkpoint), (config, own.checkpoint), (own.config, checkpoint)):
        with pytest.raises(ConfigurationError, match=r"own\.(pth|py)' is what is pruned: give another name"):
            kd_det.prune(*given, own.checkpoint, force=True)
    assert not list(tmp_path.glob('small*')) and (tmp_path / 'mine.pth').read_bytes() == b'mine'


def test_channels_are_written_as_they_are_read():
    for channels, count in (((0, ), 1), ((0, 1, 6), 8), (tuple(range(0, 300, 7)), 301)):
        text = write_channels(channels, count)
        assert read_channels(text) == (channels, count)
        assert len(text.split()[1]) == math.ceil(count / 4)
    kept = {('a', 'outputs'): ((0, 2), 4), ('b', 'inputs'): ((0, 2), 4), ('b', 'outputs'): ((1, ), 2)}
    assert read_kept(write_kept(kept)) == kept and len(write_kept(kept)) == 2


@pytest.mark.parametrize('kept, message', [
    ([dict(channels='3/8 f0', outputs=['backbone.conv1'])], 'as many of the channels'),
    ([dict(channels='1/4 10', outputs=['backbone.conv1'])], 'as many of the channels'),
    ([dict(channels='many', outputs=['backbone.conv1'])], "channels such as '3/8 43'"),
    ([dict(channels='2/4 3', outputs=['backbone.conv9'])], 'the path of a layer'),
    ([dict(channels='2/8 3', outputs=['backbone.conv1'])], 'a layer with 8 outputs, not with 4'),
    ([dict(channels='2/4 3', layers=['backbone.conv1'])], 'dicts of channels, outputs and inputs'),
    (['2/4 3'], r'kept\[0\]: expected a dict'), ('2/4 3', 'kept: expected a list')])
def test_kept_of_another_detector_is_refused(kept, message, retinanet):
    with pytest.raises(ArgumentError, match=message):
        build_detector(dict(retinanet(), type='PrunedRetinaNet', kept=kept))


def test_the_command_prints_the_table(whole, tmp_path, capsys):
    from kd_det.cli.main import main
    arguments = ['prune', *whole, str(tmp_path / 'small.pth')]
    assert main([*arguments, '--macs', '0.6', '--batches', '1']) == 0
    text = capsys.readouterr().out
    assert 'Channels were chosen by taylor.' in text
    assert re.search(r'bbox_head .*→', text) and 'small.py its config' in text
    assert re.search(r'coco/bbox_mAP: \d\.\d+ → \d\.\d+', text)
    assert main([*arguments, '--steps', '2']) == 2
    assert '--steps needs --teacher' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, '--macs', '1'])
    assert 'above 0 and below 1' in capsys.readouterr().err


def test_a_detector_in_steps_is_distilled_between(whole, tmp_path, monkeypatch):
    from kd_det.cli.main import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, 'distill', partial(runs.distill, options={'default_hooks.distill.preflight': None}))
    assert main(['prune', *whole, 'small.pth', '--no-eval', '--batches', '1', '--steps', '2', '--teacher', whole[0],
                 '--teacher-checkpoint', whole[1], '--method', 'pkd', '--epochs', '1']) == 0
    before, trained, after = (torch.load(file, weights_only=False)['state_dict'] for file in (
        'small_steps/step_1.pth', 'small_steps/distilled_1/epoch_1.pth', 'small.pth'))
    key = 'backbone.layer4.1.conv2.weight'
    assert before.keys() == trained.keys() == after.keys() and not torch.equal(before[key], trained[key])
    assert (before[key] - trained[key]).abs().max() < 0.1 * before[key].abs().max()  # it began there
    assert trained[key].shape > after[key].shape
    assert all(any(torch.equal(each, other) for other in trained[key].unbind()) or after[key].shape[1:] !=
               trained[key].shape[1:] for each in after[key].unbind())
