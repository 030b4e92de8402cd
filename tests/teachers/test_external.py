"""A Python callable as teacher: what it is given, what it may answer, and what is said of anything else."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.config import Config
from torch import nn

from kd_det.config.files import ConfigurationError
from kd_det.context import LevelSpec
from kd_det.teachers import TeacherError
from kd_det.teachers.guide import Reading, build_guide

DOCUMENTATION = Path(__file__).parents[2] / 'docs' / 'methods.md'
NECK = Reading(('neck', ), ())
LEVELS = [dict(neck=(LevelSpec(8, 8), LevelSpec(8, 16)))]
NOTHING = Reading((), ())
SHAPES = [(48, 64), (64, 40)]


@pytest.fixture
def external(tmp_path):
    """Makes an External of what a callable answers to two images, from a file with these lines."""
    student = nn.Linear(1, 1)
    student.data_preprocessor = DetDataPreprocessor(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                                                    bgr_to_rgb=True)

    def make(answer, reading=NOTHING, before='', **config):
        (tmp_path / 'teacher.py').write_text(
            f'import torch\n{before}\ncalls = []\ndef build(**arguments):\n    calls.append(arguments)\n'
            f'    return lambda images, shapes: {answer}\n')
        guide = build_guide(dict(type='External', build=f'{tmp_path}/teacher.py:build', **config))
        guide.form = guide.probe(reading, [student], LEVELS).levels
        assert guide.start(reading, [student]) is guide
        return guide

    return make


def detect(guide):
    samples = [SimpleNamespace(img_shape=shape) for shape in SHAPES]
    return guide.detect(torch.zeros(2, 3, 64, 64), samples)


def boxes(count=2, labels='torch.tensor([1, 2])', scores='torch.tensor([0.9, 0.5])', boxes='torch.rand(2, 4)'):
    return f'[dict(boxes={boxes}, scores={scores}, labels={labels})] * {count}'


# ------------------------------------------------------------------------------------------- what it is given


def test_it_is_given_the_image_from_0_to_1_and_what_of_it_is_no_padding(external):
    guide = external('seen.append((images, shapes)) or []', before='seen = []', classes=['a'], pad_size_divisor=24)
    raw = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    preprocessor = DetDataPreprocessor(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
    images = preprocessor(dict(inputs=[raw], data_samples=None))['inputs']
    with pytest.raises(TeacherError):
        guide.detect(images, [SimpleNamespace(img_shape=(40, 56, 3))])
    (seen, shapes), = guide._build().__globals__['seen']
    assert seen.shape == (1, 3, 48, 72) and shapes == [(40, 56)] and not seen.requires_grad
    torch.testing.assert_close(seen[0, :, :40, :56], raw.flip(0) / 255, atol=1e-5, rtol=0)
    assert not seen[..., 40:, :].any() and not seen[..., 56:].any()


def test_mean_and_std_are_those_of_its_training(external):
    guide = external('[]', mean=[10, 20, 30], std=[2.0, 4, 5], bgr_to_rgb=False)
    seen = guide.bridge(torch.zeros(1, 3, 8, 8), [(8, 8)])[0, :, 0, 0]  # the student's mean colour, red first
    torch.testing.assert_close(seen, (torch.tensor([103.53, 116.28, 123.675]) - torch.tensor([10.0, 20, 30]))
                               / torch.tensor([2.0, 4, 5]))


def test_it_is_built_once_with_its_arguments_when_it_is_needed(external, tmp_path):
    guide = external('(torch.zeros(len(images), 4, 8, 8), )', NECK, arguments=dict(weights='x.pth'))
    guide.observe(torch.zeros(2, 3, 64, 64), SHAPES)
    assert guide._build().__globals__['calls'] == [dict(weights='x.pth')]
    (tmp_path / 'late.py').write_text('raise RuntimeError')
    build_guide(dict(type='External', build=f'{tmp_path}/late.py:build'))


# ------------------------------------------------------------------------------------------- boxes


def test_boxes_become_pseudo_labels(external):
    given = 'torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])'
    found = detect(external(boxes(boxes=given, labels='torch.tensor([1, 0])'), classes=['cat', 'dog']))
    assert len(found) == 2
    for each in found:
        assert torch.equal(each.bboxes, torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
        assert each.labels.tolist() == [1, 0] and each.scores.tolist() == pytest.approx([0.9, 0.5])


@pytest.mark.parametrize('classes, offset, labels, expected', [
    (['cat', 'dog'], 0, [0, 1], [0, 1]),
    (['cat', 'dog'], 1, [1, 2], [0, 1]),
    (['__background__', 'cat', 'dog'], 0, [1, 2], [0, 1]),
    (['__background__', 'cat', 'N/A', 'N/A', 'dog'], 0, [4, 1], [1, 0]),
    (['__background__', 'cat', 'N/A', 'dog'], 0, [2, 3], [1]),
    (['__background__', 'cat', 'dog'], 0, [0, 2], [1]),
    (['cat', 'dog', 'background'], 0, [2, 0], [0])])
def test_labels_are_those_of_the_names(classes, offset, labels, expected, external):
    guide = external(boxes(labels=f'torch.tensor({labels})'), classes=classes, label_offset=offset)
    assert guide.classes == ('cat', 'dog') and guide.num_classes == 2 and guide.detects
    assert [each.labels.tolist() for each in detect(guide)] == [expected] * 2
    assert all(len(each.bboxes) == len(each.scores) == len(expected) for each in detect(guide))


def test_images_without_boxes_have_none(external):
    empty = boxes(boxes='torch.zeros(0, 4)', scores='torch.zeros(0)', labels='torch.zeros(0)')
    assert [len(each) for each in detect(external(empty, classes=['cat']))] == [0, 0]


@pytest.mark.parametrize('answer, came', [
    ('None', 'gave None'), ('torch.zeros(2, 4)', r'gave a tensor \(2, 4\) of float32'),
    (boxes(1), r'gave a list of 1 \(a dict\)'), (boxes(3), r'gave a list of 3'),
    ('[torch.zeros(4)] * 2', r'gave a list of 2 \(a tensor \(4,\) of float32, a tensor'),
    ('dict(neck=(torch.zeros(2, 4, 8, 8), ))', 'gave a dict'),
    ('[dict(boxes=torch.zeros(2, 4))] * 2', "gave for image 0 as 'scores' None"),
    (boxes(scores='[0.1, 0.2]'), r"gave for image 0 as 'scores' a list of 2 \(a float, a float\)"),
    (boxes(boxes='torch.zeros(2, 5)'), r'boxes \(2, 5\), scores \(2,\), labels \(2,\)'),
    (boxes(boxes='torch.zeros(3, 4)'), r'boxes \(3, 4\)'), (boxes(scores='torch.zeros(2, 1)'), r'scores \(2, 1\)'),
    (boxes(labels='torch.tensor([1])'), r'labels \(1,\)'),
    (boxes(labels='torch.tensor([1.0, 2.0])'), 'labels of torch.float32'),
    (boxes(labels='torch.tensor([True, True])'), 'labels of torch.bool'),
    (boxes(labels='torch.tensor([1, 3])'), 'labels from 1 to 3, where classes names those from 0 to 2; label_offset'),
    (boxes(labels='torch.tensor([-1, 2])'), 'labels from -1 to 2'),
    (boxes(scores='torch.tensor([0.5, 50.0])'), 'scores from 0.5 to 50'),
    (boxes(scores='torch.tensor([-0.5, 0.5])'), 'scores from -0.5 to 0.5'),
    (boxes(scores='torch.tensor([float("nan"), 0.5])'), 'scores from nan to nan'),
    (boxes(boxes='torch.full((2, 4), float("nan"))'), 'boxes that are not finite'),
    (boxes(boxes='torch.zeros(2, 4, device="meta")'), "as 'boxes' a tensor .2, 4. of float32 on meta")])
def test_an_answer_that_is_no_boxes_is_one_error_that_says_what_came(answer, came, external):
    guide = external(answer, classes=['__background__', 'cat', 'dog'])
    with pytest.raises(TeacherError, match=rf'The External .*teacher\.py:build .*{came}.*Expected a list of 2 dicts'):
        detect(guide)


def test_boxes_without_names_are_refused(external):
    guide = external(boxes())
    assert not guide.detects
    with pytest.raises(TeacherError, match='names no classes'):
        detect(guide)


# ------------------------------------------------------------------------------------------- features

MAPS = '(torch.zeros(len(images), 6, 8, 8), torch.ones(len(images), 5, 4, 4))'


@pytest.mark.parametrize('answer, channels', [(MAPS, [6, 5]), (f'list({MAPS})', [6, 5]), (f'{MAPS}[0]', [6, 6]),
                                              (f'dict(neck={MAPS}, other=3)', [6, 5])])
def test_features_are_read_at_the_students_cells(answer, channels, external):
    guide = external(answer.replace('8, 8', 'images.shape[2] // 8, images.shape[3] // 8')
                     .replace('4, 4', 'images.shape[2] // 16, images.shape[3] // 16'), NECK)
    assert guide.form == dict(neck=(LevelSpec(channels[0], 8), LevelSpec(channels[1], 16)))
    features = guide.observe(torch.zeros(2, 3, 64, 64), SHAPES)[0]['neck']
    assert [tuple(level.shape) for level in features] == [(2, channels[0], 8, 8), (2, channels[1], 4, 4)]


def test_their_form_can_be_given_and_is_checked_before_training(external):
    guide = external(MAPS, NECK, levels=[(6, 8), (5, 16)])
    assert guide.form == dict(neck=((6, 8), (5, 16)))
    with pytest.raises(TeacherError, match=r"maps of \[6, 5\] channels for 'neck', where levels says \[6, 4\]"):
        external(MAPS, NECK, levels=[(6, 8), (4, 16)])


@pytest.mark.parametrize('answer, came', [
    (boxes(1), r"gave a list of 1 \(a dict\), where a term reads the features of 'neck'"),
    ('None', 'gave None, where a term'), ('()', r'gave a tuple of 0 \(nothing\)'),
    ('torch.zeros(1, 6, 8)', r'gave a tensor \(1, 6, 8\) of float32'),
    ('torch.zeros(1, 6, 8, 8).int()', r'gave a tensor \(1, 6, 8, 8\) of int32'),
    ('(torch.zeros(1, 6, 8, 8), None)', r'gave a tuple of 2 \(a tensor \(1, 6, 8, 8\) of float32, None\)'),
    ('dict(backbone=torch.zeros(1, 6, 8, 8))', "gave features of 'backbone', and a term reads 'neck'"),
    ('torch.zeros(3, 6, 8, 8)', r"gave as map 0 of 'neck' a tensor \(3, 6, 8, 8\) of float32 on cpu, for 1 images"),
    ('torch.zeros(1, 6, 8, 8, device="meta")', 'on meta, for 1 images on cpu')])
def test_an_answer_that_is_no_features_is_one_error_before_training(answer, came, external):
    with pytest.raises(TeacherError, match=f'{came}.*Expected a tuple of maps'):
        external(answer, NECK)


def test_other_channels_than_of_the_blank_image_are_an_error(external):
    guide = external('(torch.zeros(len(images), len(images) + 3, 8, 8), )', NECK)
    with pytest.raises(TeacherError, match=r"maps of \[5\] channels for 'neck', where a blank image gave \[4\]"):
        guide.observe(torch.zeros(2, 3, 64, 64), SHAPES)


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize('returned', ['Net()', 'Net().maps'])
def test_a_module_is_frozen_moved_and_watched(returned, external):
    before = f'''
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 8, 8), torch.nn.BatchNorm2d(4)
    def maps(self, images, shapes):
        return self.norm(self.conv(images))
    forward = maps
def make():
    return {returned}
'''
    guide = external('None', before=before)
    guide = build_guide(dict(type='External', build=guide.checkpoint.replace(':build', ':make')))
    student = nn.Linear(1, 1)
    student.data_preprocessor = DetDataPreprocessor()
    guide.probe(NECK, [student], LEVELS)
    guide.start(NECK, [student.double()])
    assert guide.num_parameters == 4 * 3 * 64 + 4 + 8
    assert not any(each.training for each in guide.weights.modules())
    assert not any(each.requires_grad for each in guide.weights.parameters())
    before = guide.fingerprint()
    assert guide.observe(torch.randn(2, 3, 64, 64).double(), SHAPES)[0]['neck'][0].dtype == torch.float64
    assert guide.fingerprint() == before != ''
    guide.weights.norm.running_mean += 1
    assert guide.fingerprint() != before


def test_a_callable_without_weights_has_nothing_to_watch(external):
    guide = external(MAPS, NECK)
    assert guide.fingerprint() == '' and guide.num_parameters == 0


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize('build, message', [
    ('teacher.py', "build: expected .*'module:name' or 'file.py:name'"), ('teacher:', 'build: expected'),
    ('nowhere/teacher.py:build', 'build: expected a file and a name in it, .*There is no file .*nowhere/teacher.py'),
    ('nowhere.teacher:build', "There is no module 'nowhere' on the path of Python"),
    ('teacher:build', "There is no module 'teacher'.*a file is named with its '.py'"),
    ('{tmp}/x.py:detect', r'build: expected the name of a function or class.*x\.py has make, broken\.'),
    ('{tmp}/x.py:NUMBER', r'x\.py has make, broken'),
    ('{tmp}/x.py:make', 'build: expected what returns a callable.*Called, it returned a dict')])
def test_what_can_not_be_built_is_one_error(build, message, tmp_path):
    (tmp_path / 'x.py').write_text('NUMBER = 3\ndef make():\n    return {}\ndef broken():\n    import nowhere\n')
    with pytest.raises(ConfigurationError, match=message):
        build_guide(dict(type='External', build=build.format(tmp=tmp_path))).probe(NECK, [], LEVELS)


def test_a_mistake_within_a_file_is_its_own(tmp_path):
    (tmp_path / 'x.py').write_text('def broken():\n    import nowhere_at_all\n')
    with pytest.raises(ModuleNotFoundError, match='nowhere_at_all'):
        build_guide(dict(type='External', build=f'{tmp_path}/x.py:broken')).probe(NECK, [], LEVELS)


@pytest.mark.parametrize('config, message', [
    (dict(classes=['cat', 'cat']), 'classes: expected the names of its classes by label, each once'),
    (dict(classes=['__background__']), 'classes: expected'), (dict(std=[255.0]), 'mean: expected the mean'),
    (dict(mean=[0.4], std=[0.2]), '255 times as large'), (dict(levels=[(8.5, 8)]), r'levels\[0\]'),
    (dict(levels=[(8, 8, 8)]), r'levels\[0\]: expected the number of channels and the stride'),
    (dict(levels=[(8, 0)]), r'levels\[0\]\[1\]: expected'),
    (dict(classe=['cat']), 'classe: there is no such key. Nearest: classes')])
def test_arguments_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ConfigurationError, match=message):
        build_guide(dict(type='External', build='x.py:build', **config))


# ------------------------------------------------------------------------------------------- in a run


def test_the_documented_detector_of_torchvision_teaches(run_config, retinanet, tmp_path, monkeypatch):
    from mmengine.runner import Runner
    section = DOCUMENTATION.read_text(encoding='utf-8').partition('## A teacher outside of MMDetection')[2]
    code, settings = re.findall(r'```python\n(.*?)```', section, re.DOTALL)[:2]
    (tmp_path / 'my_teacher.py').write_text(code)
    monkeypatch.chdir(tmp_path)
    model = Config.fromstring(f'model = dict(\n{settings})', '.py').model
    assert model.teacher.pop('arguments') == dict(weights='fasterrcnn.pth')  # random ones here
    model.update(type='DetectionDistiller', student=retinanet(),
                 pseudo_labels=dict(score=0.0, mode='replace', images='all'))
    runner = Runner.from_cfg(run_config(model, epochs=1, val=True, log_level='INFO',
                                        preflight=dict(images=2, min_map=0.0)))
    runner.train()
    log, = Path(runner.work_dir).glob('*/*.log')
    assert 'Pre-flight: teacher my_teacher.py:Teacher on up to 2 images: coco/bbox_mAP' in log.read_text()
    guide, = runner.model.teachers
    assert guide.classes == ('blue', 'green', 'red') and guide.num_parameters > 1e6
    assert runner.message_hub.log_scalars['train/distill/pseudo_boxes'].current() > 0
    found = guide.detect(torch.randn(2, 3, 64, 64), [SimpleNamespace(img_shape=(64, 64))] * 2)
    assert all(len(each) and each.labels.max() < 3 for each in found)


def test_the_truth_as_boxes_reaches_everything_at_any_scale(run_config, retinanet, external, coco_folder):
    from mmengine.runner import Runner

    from kd_det.checks.preflight import evaluate_teacher
    truth = f'''
import json
data = json.load(open(r"{coco_folder}/all.json"))
def answer(images, shapes):
    scale, own = shapes[0][0] / 64, []
    for _ in images:
        rows = [each for each in data["annotations"] if each["image_id"] == len(shown)]
        shown.append(0)
        x, y, w, h = torch.tensor([each["bbox"] for each in rows], dtype=torch.float).T * scale
        own.append(dict(boxes=torch.stack([x, y, x + w, y + h], 1), scores=torch.ones(len(rows)),
                        labels=torch.tensor([each["category_id"] for each in rows])))
    return own
shown = []
'''
    guide = external('answer(images, shapes)', before=truth, classes=['__background__', 'blue', 'green', 'red'])
    config = run_config(retinanet(), val=True)
    config.val_dataloader.dataset.pipeline[2].scale = (96, 96)
    assert evaluate_teacher(Runner.from_cfg(config), guide, 8).metrics['coco/bbox_mAP'] == 1.0
