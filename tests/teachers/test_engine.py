"""Every option of a teacher's engine: the same features up to rounding, and nothing that it needs is lost."""
import copy

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.config.arguments import ArgumentError
from kd_det.teachers import Teacher, TeacherError

COMPILED = dict(backend='aot_eager')  # without a C++ compiler
SHAPES = [(64, 64)] * 2


@pytest.fixture
def checkpoint(retinanet, tmp_path):
    torch.manual_seed(1)
    model = MODELS.build(retinanet(depth=50))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 2)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'teacher.pth')
    return str(tmp_path / 'teacher.pth')


@pytest.fixture
def teacher(retinanet, checkpoint):
    """Makes teachers of equal weights."""

    def make(taps=('neck', 'backbone.layer2'), **engine) -> Teacher:
        return Teacher(retinanet(depth=50), checkpoint, taps=taps, heads=['bbox_head'], **engine,
                       student_preprocessor=MODELS.build(retinanet()['data_preprocessor']))

    return make


@pytest.mark.parametrize('engine, tolerance', [
    (dict(), 1e-4), (dict(fuse=False), 1e-4), (dict(channels_last=False), 1e-4), (dict(compile=COMPILED), 1e-4),
    (dict(precision='bfloat16'), 0.05), (dict(precision='float16'), 0.01)])
def test_features_and_boxes_are_those_of_the_plain_detector(teacher, batch, engine, tolerance):
    plain, made = teacher(fuse=False, channels_last=False), teacher(**engine)
    images = torch.randn(2, 3, 64, 64)
    for heads in ([], ['bbox_head'], []):  # stopping at the last tap or not
        (features, outputs), (others, expected) = (each.observe(images, SHAPES, heads) for each in (made, plain))
        assert others['neck'][0].is_contiguous() and features.keys() == others.keys()
        for path, levels in features.items():
            for level, other in zip(levels, others[path]):
                assert (level.float() - other).norm() <= tolerance * other.norm() and not level.requires_grad
    boxes = torch.cat(outputs['bbox_head'].boxes, 1) if outputs else torch.cat(
        made.observe(images, SHAPES, ['bbox_head'])[1]['bbox_head'].boxes, 1)
    assert boxes.dtype == torch.float32
    data = plain.model.data_preprocessor(batch(), False)
    found, expected = (each.predict(data['inputs'], copy.deepcopy(data['data_samples']))[0].pred_instances
                       for each in (made, plain))
    assert len(expected) > 5 and abs(len(found) - len(expected)) <= 2
    torch.testing.assert_close(found.scores[:3], expected.scores[:3], rtol=max(tolerance, 1e-3), atol=1e-3)


def test_features_have_the_engines_precision_and_the_students_memory_order(teacher):
    made = teacher(precision='bfloat16')
    level = made.observe(torch.randn(2, 3, 64, 64), SHAPES)[0]['neck'][0]
    assert level.dtype == torch.bfloat16 and level.is_contiguous()
    assert made.model.neck.fpn_convs[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_an_autocast_around_the_step_leaves_the_engines_precision(teacher):
    with torch.autocast('cpu', torch.float16):
        features = teacher(precision='bfloat16').observe(torch.randn(2, 3, 64, 64), SHAPES)[0]
    assert features['neck'][0].dtype == torch.bfloat16


def test_a_tap_within_a_pair_reads_what_it_reads_in_the_plain_detector(teacher):
    taps, images = ('backbone.layer4.0.conv1', 'backbone.layer4.0.bn2', 'backbone.conv1'), torch.randn(2, 3, 64, 64)
    fused, plain = (teacher(taps, fuse=fuse) for fuse in (True, False))
    features, expected = (each.observe(images, SHAPES)[0] for each in (fused, plain))
    for path in taps:
        torch.testing.assert_close(features[path][0], expected[path][0], rtol=1e-4, atol=1e-5)
    kept = [name for name, module in fused.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert kept == ['backbone.bn1', 'backbone.layer4.0.bn1', 'backbone.layer4.0.bn2']


def test_nothing_runs_beyond_the_last_tap_that_is_read(teacher):
    made, ran = teacher(('backbone.layer2', 'backbone.layer3')), []
    for name in ('layer3', 'layer4'):
        getattr(made.model.backbone, name).register_forward_pre_hook(lambda *args, name=name: ran.append(name))
    images = torch.randn(2, 3, 64, 64)
    assert set(made.observe(images, SHAPES, taps=['backbone.layer2'])[0]) == {'backbone.layer2'} and not ran
    assert set(made.observe(images, SHAPES)[0]) == {'backbone.layer2', 'backbone.layer3'} and ran == ['layer3']
    made.observe(images, SHAPES, ['bbox_head'], taps=[])
    assert ran == ['layer3', 'layer3', 'layer4']


def test_compiled_parts_hold_no_tap(teacher):
    made = teacher(('backbone.layer2', 'neck'), compile=COMPILED)
    made.observe(torch.randn(2, 3, 64, 64), SHAPES)
    compiled = {name for name, module in made.model.named_modules() if 'forward' in vars(module)}
    assert compiled == {'neck', 'backbone.conv1', 'backbone.layer1', 'backbone.layer2', 'backbone.layer3',
                        'backbone.layer4'}


def test_the_fingerprint_is_that_of_the_checkpoint_until_something_writes(teacher):
    made, images = teacher(precision='bfloat16'), torch.randn(2, 3, 64, 64)
    loaded = made.fingerprint()
    assert loaded == teacher(fuse=False).fingerprint()
    made.observe(images, SHAPES)
    assert made.fingerprint() == loaded and made.num_parameters == teacher().num_parameters
    made.model.backbone.conv1.bias[0] += 1
    assert made.fingerprint() != loaded


def test_a_student_inherits_before_the_engine_starts(retinanet, faster_rcnn, distiller, teacher):
    made = teacher()
    assert made.state_dict().keys() == made.model.state_dict().keys()
    made.observe(torch.randn(2, 3, 64, 64), SHAPES)
    with pytest.raises(TeacherError, match='inherit before the first step'):
        made.state_dict()


@pytest.mark.parametrize('engine, message', [
    (dict(precision='int8'), "precision: expected one of float32, bfloat16, float16, got 'int8'"),
    (dict(shard=True, compile=True), 'model.teacher.shard and model.teacher.compile do not go together'),
    (dict(shard=True, cache=dict(dir='cache')), 'model.teacher.shard and model.teacher.cache do not go together')])
def test_options_that_can_not_be_had(teacher, engine, message):
    with pytest.raises((TeacherError, ArgumentError), match=message):
        teacher(**engine)


def test_one_process_has_nothing_to_shard(teacher):
    whole, alone = teacher(), teacher(shard=True)
    images = torch.randn(2, 3, 64, 64)
    for one, other in zip(*(each.observe(images, SHAPES)[0]['neck'] for each in (whole, alone))):
        assert torch.equal(one, other)
    assert type(alone.model.backbone.layer1) is type(whole.model.backbone.layer1)
