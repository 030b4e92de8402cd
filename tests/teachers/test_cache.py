"""A cached answer is the computed one, and nothing but the very same question gets it."""
import copy

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.heads.capture import can_be_kept
from kd_det.teachers import Teacher
from kd_det.teachers.cache import TeacherCache

SHAPES = [(64, 64), (48, 64)]


@pytest.fixture
def teacher(retinanet, tmp_path):
    """Makes teachers with equal weights; each with a cache in the same folder unless told otherwise."""
    base = MODELS.build(retinanet())
    torch.save(dict(state_dict=base.state_dict()), tmp_path / 'teacher.pth')

    def make(dtype='float32', cache=True, taps=('neck', 'backbone.layer2'), score_thr=0.1, **engine) -> Teacher:
        options = dict(dir=str(tmp_path / 'cache'), dtype=dtype, max_gb=1) if cache else None
        config = retinanet()
        config.test_cfg.score_thr = score_thr
        return Teacher(config, str(tmp_path / 'teacher.pth'), cache=options, taps=taps, heads=['bbox_head'], **engine,
                       student_preprocessor=MODELS.build(retinanet()['data_preprocessor']))

    return make


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def _no_forward(teacher: Teacher) -> Teacher:
    def fail(*args, **kwargs):
        raise AssertionError('the teacher ran')

    teacher.model.backbone.forward = fail
    return teacher


def _tensors(observed) -> dict:
    features, outputs = observed
    tensors = {f'{path}.{index}': level for path, levels in features.items() for index, level in enumerate(levels)}
    for name, dense in outputs.items():
        for field in ('logits', 'regressions', 'boxes'):
            tensors.update({f'{name}.{field}.{index}': level for index, level in enumerate(getattr(dense, field))})
    return tensors


def _assert_same(a, b, **tolerance):
    a, b = _tensors(a), _tensors(b)
    assert a.keys() == b.keys() and len(a) > 5
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].is_contiguous() == b[name].is_contiguous(), name
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize('channels_last', [False, True])
def test_float32_changes_no_bit(teacher, images, channels_last):
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    expected = teacher(cache=False).observe(images, SHAPES, ['bbox_head'])
    first, again = teacher(), _no_forward(teacher())
    _assert_same(first.observe(images, SHAPES, ['bbox_head']), expected)
    _assert_same(again.observe(images, SHAPES, ['bbox_head']), expected)
    _assert_same(again.observe(images.clone(), SHAPES, ['bbox_head']), expected)
    assert (first.cache.counts.hits, first.cache.counts.misses) == (0, 2)
    assert (again.cache.counts.hits, again.cache.counts.misses, again.cache.counts.written) == (4, 0, 0)


def test_float16_rounds_the_same_whether_computed_or_read(teacher, images):
    expected = teacher(cache=False).observe(images, SHAPES, ['bbox_head'])
    computed = teacher('float16').observe(images, SHAPES, ['bbox_head'])
    read = _no_forward(teacher('float16')).observe(images, SHAPES, ['bbox_head'])
    _assert_same(computed, read)
    _assert_same(read, expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(read[0]['neck'][0], expected[0]['neck'][0])


def test_values_beyond_float16_are_kept_in_float32(teacher, images):
    def large(make):
        made = make()
        made.model.backbone.layer2[-1].bn2.weight.mul_(1e7)
        return made

    expected = large(lambda: teacher(cache=False)).observe(images, SHAPES)
    assert expected[0]['backbone.layer2'][0].abs().max() > 1e5
    large(lambda: teacher('float16')).observe(images, SHAPES)
    read = _no_forward(large(lambda: teacher('float16'))).observe(images, SHAPES)
    assert torch.equal(read[0]['backbone.layer2'][0], expected[0]['backbone.layer2'][0])


def _flipped(teacher, images):
    return teacher, images.flip(-1), SHAPES, ['bbox_head']


def _one_pixel(teacher, images):
    images = images.clone()
    images[0, 0, 0, 0] += 1e-6
    images[1, 2, 63, 63] += 1e-6
    return teacher, images, SHAPES, ['bbox_head']


def _larger_padding(teacher, images):
    return teacher, torch.nn.functional.pad(images, (0, 32)), SHAPES, ['bbox_head']


def _other_image_shapes(teacher, images):
    return teacher, images, [(60, 64), (40, 64)], ['bbox_head']


def _another_batch_size(teacher, images):
    return teacher, images[:1], SHAPES[:1], ['bbox_head']


def _other_heads(teacher, images):
    return teacher, images, SHAPES, []


def _a_weight_written_to(teacher, images):
    with torch.no_grad():
        teacher.model.backbone.conv1.weight[0, 0, 0, 0] += 1e-3
    return teacher, images, SHAPES, ['bbox_head']


def _a_statistic_written_to(teacher, images):
    teacher.model.backbone.bn1.running_mean[0] += 1e-3
    return teacher, images, SHAPES, ['bbox_head']


@pytest.mark.parametrize('change', [_flipped, _one_pixel, _larger_padding, _other_image_shapes, _another_batch_size,
                                    _other_heads, _a_weight_written_to, _a_statistic_written_to])
def test_what_does_not_match_is_computed(teacher, images, change):
    asked = teacher(fuse=False)  # so that the weights are those of its checkpoint still
    asked.observe(images, SHAPES, ['bbox_head'])
    asked, *question = change(asked, images)
    plain = teacher(cache=False, fuse=False)
    plain.model.load_state_dict(asked.model.state_dict())
    before = copy.copy(asked.cache.counts)
    _assert_same(asked.observe(*question), plain.observe(*question))
    assert asked.cache.counts.hits == before.hits and asked.cache.counts.misses == before.misses + len(question[0])


def test_another_config_taps_or_precision_is_another_question(teacher, images):
    teacher().observe(images, SHAPES)
    config = teacher(score_thr=0.5)
    config.observe(images, SHAPES)
    fewer = teacher(taps=['neck'])
    fewer.observe(images, SHAPES)
    plain = teacher(fuse=False)
    plain.observe(images, SHAPES)
    half = teacher()
    with torch.autocast('cpu', torch.bfloat16):
        features = half.observe(images, SHAPES)[0]
        again = half.observe(images, SHAPES)[0]
    assert features['neck'][0].dtype == torch.bfloat16 and torch.equal(features['neck'][0], again['neck'][0])
    assert [each.cache.counts.hits for each in (config, fewer, plain, half)] == [0, 0, 0, 2]


def test_what_another_version_computed_is_not_served(teacher, images, monkeypatch):
    teacher().observe(images, SHAPES)
    monkeypatch.setattr('kd_det.teachers.teacher.VERSIONS', ('another', ))
    asked = teacher()
    asked.observe(images, SHAPES)
    assert asked.cache.counts.hits == 0


def test_a_batch_with_one_unknown_image_is_computed_as_a_whole(teacher, images):
    asked = teacher()
    asked.observe(images, SHAPES)
    mixed = torch.stack([images[0], images[0].flip(-1)])
    expected = teacher(cache=False).observe(mixed, [SHAPES[0]] * 2)
    for misses in (4, 4):  # the second time all is known
        assert torch.equal(asked.observe(mixed, [SHAPES[0]] * 2)[0]['neck'][0], expected[0]['neck'][0])
        assert asked.cache.counts.misses == misses
    assert asked.cache.counts.hits == 2


def test_a_damaged_entry_is_computed_anew_and_replaced(teacher, images, tmp_path):
    asked = teacher()
    expected = asked.observe(images, SHAPES)[0]['neck'][0]
    victim = sorted(tmp_path.glob('cache/??/*.entry'))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert torch.equal(asked.observe(images, SHAPES)[0]['neck'][0], expected) and asked.cache.counts.misses == 4
    assert torch.equal(_no_forward(asked).observe(images, SHAPES)[0]['neck'][0], expected)


def test_a_full_folder_is_still_read_and_says_so_once(teacher, images, tmp_path, monkeypatch):
    from kd_det.teachers import cache
    said = []
    monkeypatch.setattr(cache, 'print_log', lambda message, **options: said.append(message))
    asked = teacher()
    asked.observe(images, SHAPES)
    asked.cache.store.limit = asked.cache.store.size
    for flipped in (images.flip(-1), images.flip(-2), images.flip(-1)):
        asked.observe(flipped, SHAPES)
    assert len(said) == 1 and 'takes no more images' in said[0] and 'max_gb' in said[0]
    assert asked.cache.counts.misses == 8 and asked.cache.counts.hits == 0
    assert sum(file.stat().st_size for file in tmp_path.glob('cache/??/*')) == asked.cache.store.limit
    _no_forward(asked).observe(images, SHAPES)
    assert asked.cache.counts.hits == 2


def test_report_is_one_line_of_what_was_done_since_the_last(teacher, images):
    asked = teacher()
    asked.observe(images, SHAPES)
    asked.observe(images, SHAPES)
    line = asked.cache.report()
    assert '2 images read' in line and '2 computed' in line and '\n' not in line
    assert '0 images read' in asked.cache.report()


@pytest.mark.parametrize('fault, message',
                         [(dict(dtype='int8'), "dtype: expected one of float16, float32, got 'int8'"),
                                              (dict(max_gb=0), 'max_gb: expected a number above 0, got 0')])
def test_wrong_options(tmp_path, fault, message):
    with pytest.raises(ConfigurationError, match=message):
        TeacherCache(dir=str(tmp_path), **fault)


def test_a_folder_that_can_not_be_made(teacher, images, tmp_path):
    (tmp_path / 'cache').write_text('a file')
    with pytest.raises(ConfigurationError, match='cache.dir'):
        teacher().observe(images, SHAPES)


def test_an_unknown_option(retinanet):
    with pytest.raises(ConfigurationError, match=r'cache\.folder: there is no such key'):
        Teacher(retinanet(), random_teacher=True, cache=dict(folder='x'), taps=['neck'],
                student_preprocessor=MODELS.build(retinanet()['data_preprocessor']))


@pytest.mark.parametrize('name, kept', [('bbox_head', True), ('rpn_head', True), ('bbox_head.towers', True),
                                        ('bbox_head.positives', True), ('roi_head', False),
                                        ('bbox_head.queries', False), ('bbox_head.decoder', False)])
def test_what_can_be_kept(name, kept):
    assert can_be_kept(name) == kept
