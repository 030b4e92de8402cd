"""Exported files in the place of the detector: on the data of a config, and on photographs."""
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MMLogger
from PIL import Image

import kd_det
from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.deploy.prediction import FileDetector, find_images, match_labels, name_pictures
from kd_det.deploy.runtime import open_model

DOCS = Path(__file__).parents[2] / 'docs' / 'deploy.md'
CLASSES = ('blue', 'green', 'red')


def evaluate(config, model, tmp_path, **arguments):
    """The predictions by image, and the metrics."""
    out = tmp_path / f'{Path(model).name}.pkl'
    found = kd_det.evaluate(config, model, work_dir=tmp_path / 'run', out=out, **arguments)
    return {each['img_id']: each['pred_instances'] for each in pickle.loads(out.read_bytes())}, found


def assert_same(found, expected):
    assert found.keys() == expected.keys() and sum(len(each['scores']) for each in expected.values()) > 20
    for image, theirs in expected.items():
        ours = found[image]
        assert torch.equal(ours['labels'], theirs['labels'])
        torch.testing.assert_close(ours['scores'], theirs['scores'], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours['bboxes'], theirs['bboxes'], atol=0.05, rtol=0)


@pytest.fixture(scope='module')
def expected():
    return {}


@pytest.fixture
def of_checkpoint(expected, files, tmp_path):
    """What the checkpoint predicts; asked for once."""
    if not expected:
        expected['found'] = evaluate(files.config, files.checkpoint, tmp_path)
    return expected['found']


# ---------------------------------------------------------------- kd-det test


@pytest.mark.parametrize('name', ['fixed.onnx', 'fixed.xml', 'open.onnx'])
def test_a_file_is_evaluated_as_its_checkpoint_is(name, files, of_checkpoint, tmp_path):
    predictions, result = evaluate(files.config, files[name], tmp_path)
    assert_same(predictions, of_checkpoint[0])
    assert result.metrics == pytest.approx(of_checkpoint[1].metrics, abs=1e-3)
    assert result.checkpoint == files[name] and result.config.name == 'run_test.py'


def test_the_command_paints_and_goes_without_the_hooks_of_training(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.fromfile(files.config)
    config.custom_hooks = [dict(type='EMAHook')]
    config.load_from = 'nowhere.pth'
    config.visualizer = dict(type='DetLocalVisualizer', name=str(tmp_path))
    config.default_hooks.visualization = dict(type='DetVisualizationHook')
    config.dump('run.py')
    assert main(['test', 'run.py', str(files['fixed.onnx']), '--work-dir', 'run', '--show-dir', 'painted']) == 0
    assert len(list(tmp_path.glob('run/*/painted/*.png'))) == 8


def test_flips_are_averaged(files, tmp_path):
    found, _ = evaluate(files.config, files['fixed.onnx'], tmp_path, tta=True)
    assert len(found) == 8 and any(len(each['scores']) for each in found.values())


def test_larger_images_are_made_smaller_and_that_is_told_once(files, tmp_path, caplog):
    detector = FileDetector(str(files['small.onnx']))
    sample = DetDataSample(metainfo=dict(scale_factor=(2., 1.5), ori_shape=(64, 64)))
    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with caplog.at_level('WARNING', 'mmengine'):
        MMLogger.get_current_instance().addHandler(caplog.handler)
        try:
            for _ in range(2):
                detector.test_step(dict(inputs=[image], data_samples=[sample]))
        finally:
            MMLogger.get_current_instance().removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if 'larger than' in record.getMessage()]
    assert len(told) == 1 and '96 × 128, are larger than the 64 × 96' in told[0]
    boxes = sample.pred_instances.bboxes
    assert len(boxes) and 32 < boxes.max() <= 64 and boxes.min() >= 0


def permuted(coco_folder, tmp_path) -> dict:
    """Options by which the same data numbers its classes in another order."""
    content = json.loads((coco_folder / 'all.json').read_text())
    content['categories'].reverse()
    file = tmp_path / 'permuted.json'
    file.write_text(json.dumps(content))
    return {'test_dataloader.dataset.ann_file': str(file), 'test_evaluator.ann_file': str(file),
            'test_dataloader.dataset.metainfo.classes': CLASSES[::-1]}


def test_labels_follow_the_names_of_the_data(files, of_checkpoint, coco_folder, tmp_path):
    predictions, result = evaluate(files.config, files['fixed.onnx'], tmp_path, options=permuted(coco_folder, tmp_path))
    for image, theirs in of_checkpoint[0].items():
        assert torch.equal(2 - predictions[image]['labels'], theirs['labels'])
    assert result.metrics == pytest.approx(of_checkpoint[1].metrics, abs=1e-3)


@pytest.mark.parametrize('classes, names, labels', [
    (('a', 'b'), ('a', 'b'), [0, 1]),
    (('a', 'b'), ('B', 'a'), [1, 0]),
    (('traffic light', 'b'), ('b', 'traffic_light'), [1, 0]),
    (('a', 'b'), (), [0, 1]),  # data that does not name its classes
    (('0', '1'), ('a', 'b'), [0, 1]),  # a file that does not
    (('a', 'b'), ('a', 'c'), "the data alone has c, the file alone has b"),
    (('a', 'b'), ('a', ), 'the file alone has b'),
    (('a', ), ('a', 'b'), 'the data alone has b'),
    (('a', ), ('b', ), 'the data alone has b, the file alone has a'),
    (('0', '1', '2'), ('a', 'b'), 'the data alone has a, b'),
])
def test_classes_are_matched_by_name(classes, names, labels):
    model = SimpleNamespace(file='m.onnx', info=SimpleNamespace(classes=classes))
    if isinstance(labels, str):
        with pytest.raises(ConfigurationError, match=f'm.onnx.*{labels}'):
            match_labels(model, names)
    else:
        assert match_labels(model, names).tolist() == labels


def test_masks_are_not_measured(files):
    detector = FileDetector(str(files['fixed.onnx']))
    metric = SimpleNamespace(metrics=['bbox', 'segm'])
    detector.adapt(SimpleNamespace(metainfo=dict(classes=CLASSES)), [metric, SimpleNamespace()])
    assert metric.metrics == ['bbox']
    with pytest.raises(ConfigurationError, match='masks alone'):
        detector.adapt(SimpleNamespace(metainfo=dict(classes=CLASSES)), [SimpleNamespace(metrics=['segm'])])


@pytest.mark.parametrize('name, arguments, message', [
    ('nowhere.onnx', {}, "nowhere.onnx': there is no such file"),
    ('foreign.onnx', {}, 'can not be run'),
    ('candidates.onnx', {}, 'export it without --no-nms'),
    ('fixed.onnx', dict(launcher='pytorch'), 'run by one process'),
    ('fixed.onnx', dict(options={'test_dataloader.dataset.metainfo.classes': ('blue', 'green')}),
     'the file alone has red'),
])
def test_what_can_not_be_evaluated_is_told(name, arguments, message, files, tmp_path, monkeypatch):
    (tmp_path / 'foreign.onnx').write_bytes(b'something else')
    monkeypatch.setattr('kd_det.training.runs.check_launcher', lambda launcher: None)
    file = files[name] if name in ('fixed.onnx', 'candidates.onnx') else tmp_path / name
    with pytest.raises(ConfigurationError, match=message) as error:
        kd_det.evaluate(files.config, file, work_dir=tmp_path / 'run', **arguments)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------- kd-det predict


def test_photographs_are_painted_and_results_are_cocos(files, of_checkpoint, photographs, coco_folder, tmp_path):
    found = kd_det.predict(files['fixed.onnx'], coco_folder, out=tmp_path / 'out', threshold=0.95)
    index = json.loads((tmp_path / 'out' / 'images.json').read_text())
    assert [(each['id'], each['file_name']) for each in index['images']] == [(k + 1, f'{k}.png') for k in range(8)]
    assert index['categories'] == [dict(id=k + 1, name=name) for k, name in enumerate(CLASSES)]
    results = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert results == list(found.results) and set(results[0]) == {'image_id', 'category_id', 'bbox', 'score'}
    for image, theirs in of_checkpoint[0].items():  # an image's id is its name there
        ours = [each for each in results if each['image_id'] == image + 1]
        boxes = np.array([each['bbox'] for each in ours])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, theirs['bboxes'], atol=0.05)
        assert [each['category_id'] - 1 for each in ours] == theirs['labels'].tolist()
    for file in photographs:
        picture = Image.open(tmp_path / 'out' / f'{file.name}.jpg')
        painted = any(each['score'] >= 0.95 for each in results if each['image_id'] == int(file.stem) + 1)
        change = np.abs(np.asarray(picture, int) - np.asarray(Image.open(file).convert('RGB'), int))
        assert picture.size == (64, 64) and (change.max() > 150) == painted
    assert kd_det.predict(files['fixed.onnx'], coco_folder, out=tmp_path / 'out').threshold == 0.3  # replaces its own
    assert json.dumps(found.to_dict()) and 'of a score of at least 0.95' in found._repr_html_()


def test_results_have_the_numbers_of_annotations(files, coco_folder, photographs, tmp_path):
    """Some of which were written on Windows."""
    content = dict(images=[dict(id=70, file_name='0.png'), dict(id=71, file_name=f'{coco_folder.name}\\1.png')],
                   categories=[dict(id=9, name='Red'), dict(id=4, name='blue')], annotations=[])
    (tmp_path / 'some.json').write_text(json.dumps(content))
    whole = kd_det.predict(files['fixed.onnx'], photographs[:2], out=tmp_path / 'whole').results
    found = kd_det.predict(files['fixed.onnx'], photographs[:2], out=tmp_path / 'out',
                           annotations=tmp_path / 'some.json')
    assert found.left_out == ('green', ) and 'left out' in found.tabulate().to_plain()
    expected = [(each['image_id'] + 69, {1: 4, 3: 9}[each['category_id']], each['bbox']) for each in whole
                if each['category_id'] != 2]
    assert len(expected) > 3
    assert [(each['image_id'], each['category_id'], each['bbox']) for each in found.results] == expected


@pytest.mark.parametrize('content, message', [
    ('nothing', 'there is no such file'),
    ('{"images": [', 'can not be read as COCO annotations'),
    ('[]', 'can not be read as COCO annotations'),
    (dict(images=[dict(id=1, file_name='9.png')], categories=[]), "has no image '0.png'"),
    (dict(images=[dict(id=1, file_name='val/0.png')], categories=[]), "has no image '0.png'"),
    (dict(images=[dict(id=1, file_name='0.png')], categories=[dict(id=1, name='car')]), "none of the file's classes"),
])
def test_annotations_that_do_not_fit_are_refused(content, message, files, photographs, tmp_path):
    file = tmp_path / 'some.json'
    if content != 'nothing':
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigurationError, match=message):
        kd_det.predict(files['fixed.onnx'], photographs[0], out=tmp_path / 'out', annotations=file)
    assert not (tmp_path / 'out').exists()


def test_one_image_of_the_annotations_is_not_two_photographs(files, photographs, tmp_path):
    (tmp_path / '0.png').write_bytes(photographs[0].read_bytes())
    content = dict(images=[dict(id=1, file_name='0.png')], categories=[dict(id=1, name='red')])
    (tmp_path / 'some.json').write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match='has one image for both'):
        kd_det.predict(files['fixed.onnx'], [photographs[0], tmp_path / '0.png'], out=tmp_path / 'out',
                       annotations=tmp_path / 'some.json')


def test_damaged_photographs_are_named_and_passed_over(files, photographs, tmp_path, capsys):
    folder = tmp_path / 'photographs'
    folder.mkdir()
    Image.open(photographs[0]).save(folder / 'cut.jpg')
    (folder / 'cut.jpg').write_bytes((folder / 'cut.jpg').read_bytes()[:-400])
    (folder / 'empty.png').touch()
    (folder / 'text.png').write_text('no picture, but text')
    (folder / 'noise.png').write_bytes(bytes(range(128, 256)))
    (folder / 'sound.png').write_bytes(photographs[1].read_bytes())
    assert main(['predict', str(files['fixed.onnx']), str(folder), '--out', str(tmp_path / 'out')]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [re.search("'(.*)' can", line)[1] for line in errors] == ['cut.jpg', 'empty.png', 'noise.png', 'text.png']
    assert {each.name for each in (tmp_path / 'out').iterdir()} == {'sound.png.jpg', 'images.json', 'predictions.json'}
    assert json.loads((tmp_path / 'out' / 'images.json').read_text())['images'][0]['id'] == 4
    (folder / 'sound.png').unlink()
    with pytest.raises(ConfigurationError, match='None of the images can be read'):
        kd_det.predict(files['fixed.onnx'], folder, out=tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_a_photograph_that_was_turned_is_turned_back(files, photographs, tmp_path):
    photograph = Image.open(photographs[2]).resize((96, 64))
    photograph.save(tmp_path / 'upright.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
    upright, turned = (kd_det.predict(files['fixed.onnx'], tmp_path / f'{name}.png', out=tmp_path / name).results
                       for name in ('upright', 'turned'))
    assert upright == turned and len(upright)


@pytest.mark.parametrize('name', ['0.png.jpg', 'predictions.json', 'images.json'])
def test_nothing_of_somebody_else_is_replaced(name, files, photographs, tmp_path, capsys):
    (tmp_path / name).write_text('mine')
    command = ['predict', str(files['fixed.onnx']), str(photographs[0]), '--out', str(tmp_path)]
    assert main(command) == 2 and name in capsys.readouterr().err
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(name, 'mine')]
    assert main([*command, '--force']) == 0 and len(list(tmp_path.iterdir())) == 3


def test_no_picture_is_painted_over_that_of_another(tmp_path):
    """Where one photograph is called as the picture of another would be."""
    names = ['a.png', 'a.png.jpg', 'A.PNG.JPG.jpg', 'b.jpg', 'b.webp', 'c/b.jpg']
    assert name_pictures(names, tmp_path) == {name: tmp_path / picture for name, picture in zip(names, (
        'a.png.jpg.jpg.jpg', 'a.png.jpg', 'A.PNG.JPG.jpg', 'b.jpg', 'b.webp.jpg', 'c/b.jpg'))}


def test_photographs_themselves_are_never_replaced(files, photographs, tmp_path):
    Image.open(photographs[0]).save(tmp_path / 'a.jpg')
    before = (tmp_path / 'a.jpg').read_bytes()
    with pytest.raises(ConfigurationError, match='the photographs themselves'):
        kd_det.predict(files['fixed.onnx'], tmp_path, out=tmp_path, force=True)
    assert (tmp_path / 'a.jpg').read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_images_have_names_of_their_own(tmp_path):
    names = ('a/1.png', 'a/deep/2.JPG', 'b/1.png', 'a/out/3.png', 'a/notes.txt', 'c/notes.txt')
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    a, b, out = tmp_path / 'a', tmp_path / 'b' / '1.png', tmp_path / 'a' / 'out'
    assert list(find_images([a], out)) == ['1.png', 'deep/2.JPG']
    assert list(find_images([a, b, a / '1.png'], out)) == ['a/1.png', 'a/deep/2.JPG', 'b/1.png']
    assert list(find_images([b], out)) == ['1.png']
    for places, message in (([tmp_path / 'c'], 'holds no images'), ([tmp_path / 'd'], 'no such image or folder'),
                            ([], 'There are no images')):
        with pytest.raises(ConfigurationError, match=message):
            find_images(places, out)


def test_what_can_not_be_predicted_is_told(files, photographs, tmp_path):
    with pytest.raises(ConfigurationError, match='export it without --no-nms'):
        kd_det.predict(files['candidates.onnx'], photographs, out=tmp_path / 'out')
    with pytest.raises(ConfigurationError, match='can not be run by onnxruntime'):
        kd_det.predict(files['fixed.xml'], photographs, out=tmp_path / 'out', runtime='onnxruntime')
    assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------- without PyTorch


def test_the_program_of_the_documentation_runs_without_torch(files, photographs, tmp_path):
    program = re.search(r'## Run it without PyTorch\n.*?```python\n(.*?)```', DOCS.read_text(encoding='utf-8'),
                        re.DOTALL)[1]
    assert len(program.splitlines()) <= 15 and not set(re.findall(r'import (\w+)', program)) & {'torch', 'kd_det'}
    blocked = "import sys\nfor name in ('torch', 'kd_det', 'mmdet', 'cv2'):\n    sys.modules[name] = None\n"
    (tmp_path / 'program.py').write_text(blocked + program)
    photograph = Image.open(photographs[3]).convert('RGB').resize((192, 144))
    photograph.save(tmp_path / 'photograph.png')
    ran = subprocess.run([sys.executable, 'program.py', str(files['fixed.onnx']), 'photograph.png'], cwd=tmp_path,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [line.rsplit(maxsplit=5) for line in ran.stdout.splitlines()]
    small = photograph.resize((96, 72), Image.Resampling.BILINEAR)
    expected = open_model(files['fixed.onnx']).detect(np.asarray(small))
    boxes = np.array([list(map(float, line[2:])) for line in found]).clip(0, (192, 144) * 2)
    real = (boxes[:, :2] < boxes[:, 2:] - 0.2).all(1)  # not of what was filled up
    assert [name for (name, *_), kept in zip(found, real) if kept] == [CLASSES[label] for label in expected.labels]
    np.testing.assert_allclose(boxes[real], 2 * expected.boxes, atol=0.06)
    assert len(expected.boxes) > 9
