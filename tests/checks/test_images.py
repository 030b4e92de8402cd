"""Before training every image is read by what will read it in training."""
import io
import json
import random
import shutil
import threading

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from PIL import Image

from kd_det.checks import image_reader
from kd_det.checks.doctor import inspect_data
from kd_det.checks.environment import DiagnosisError
from kd_det.checks.image_reader import MEMORY_FILE, Memory
from kd_det.checks.images import check_images, look_at_images, student_channels

CLASSES = ('blue', 'green', 'red')
LOAD = dict(type='LoadImageFromFile')


@pytest.fixture
def folder(coco_folder, tmp_path):
    """A copy of the shared data, to damage."""
    return shutil.copytree(coco_folder, tmp_path / 'coco')


@pytest.fixture
def build(folder):
    """Builds a data set of the folder."""

    def make(*pipeline, **settings):
        return DATASETS.build(dict(type='CocoDataset', data_root=str(folder), ann_file='all.json',
                                   data_prefix=dict(img=''), metainfo=dict(classes=CLASSES),
                                   pipeline=list(pipeline) or [LOAD],
                                   **dict(dict(serialize_data=False), **settings)))  # it takes a second to clean up

    return make


@pytest.fixture
def loads(monkeypatch):
    """The paths that MMDetection's loader has read, in this test."""
    read, plain = [], mmcv.transforms.LoadImageFromFile.transform
    monkeypatch.setattr(image_reader.LoadImageFromFile, 'transform',
                        lambda self, results: read.append(results['img_path']) or plain(self, results))
    return read


def replace(folder, name, write):
    """Puts another file in place of an image, under a name of its own."""
    content = json.loads((folder / 'all.json').read_text())
    image = next(image for image in content['images'] if image['file_name'] == '5.png')
    image['file_name'] = name
    (folder / 'all.json').write_text(json.dumps(content))
    write(Image.open(folder / '5.png').convert('RGB'), folder / name)


def jpeg_bytes(image, **settings):
    output = io.BytesIO()
    image.resize((64, 64)).save(output, 'JPEG', quality=95, **settings)
    return output.getvalue()


def keep(share, **settings):
    return lambda image, path: path.write_bytes((data := jpeg_bytes(image, **settings))[:int(len(data) * share)])


# ---------------------------------------------------------------- what is read, and what is not


@pytest.mark.parametrize('name, write', [
    ('gray.png', lambda image, path: image.convert('L').save(path)),
    ('rgba.png', lambda image, path: image.convert('RGBA').save(path)),
    ('palette.png', lambda image, path: image.convert('P').save(path)),
    ('one_bit.png', lambda image, path: image.convert('1').save(path)),
    ('cmyk.jpg', lambda image, path: image.convert('CMYK').save(path)),
    ('progressive.jpg', keep(1, progressive=True)),
    ('trailing zeros.jpg', lambda image, path: path.write_bytes(jpeg_bytes(image) + bytes(5000))),
    ('trailing text.jpg', lambda image, path: path.write_bytes(jpeg_bytes(image) + b'SEFH' * 9)),
    ('exif.jpg', lambda image, path: path.write_bytes(jpeg_bytes(image, exif=turned()))),
    ('x.webp', lambda image, path: image.save(path)),
    ('16 bit.png', lambda image, path: cv2.imwrite(str(path), np.asarray(image).astype(np.uint16) * 257)),
    ('wrong.jpg', lambda image, path: image.save(path, 'PNG')),
    ('猫 [1].bmp', lambda image, path: image.save(path)),
])
def test_what_the_loader_reads_passes(name, write, build, folder):
    replace(folder, name, write)
    report = look_at_images(build(), Memory())
    assert (report.faults, report.images) == ([], 8)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize('name, write, said', [
    ('gone.jpg', lambda image, path: None, "gone.jpg' does not exist"),
    ('empty.jpg', lambda image, path: path.write_bytes(b''), 'the file is empty'),
    ('half.jpg', keep(0.5), 'the end of its JPEG data is missing'),
    ('most.jpg', keep(0.97), 'the end of its JPEG data is missing'),
    ('half progressive.jpg', keep(0.5, progressive=True), 'the end of its JPEG data is missing'),
    ('thumbnail.jpg', lambda image, path: path.write_bytes(with_thumbnail(image)[:-400]),
     'the end of its JPEG data is missing'),
    ('hole.jpg', lambda image, path: path.write_bytes((data := jpeg_bytes(image))[:600] + bytes(len(data) - 600)),
     'the end of its JPEG data is missing'),
    ('half.png', lambda image, path: (image.save(path), path.write_bytes(path.read_bytes()[:60])),
     'LoadImageFromFile: '),
    ('pointer.jpg', lambda image, path: path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d\n'),
     'git lfs pull'),
    ('page.jpg', lambda image, path: path.write_text('<!DOCTYPE html>\n<html>'), "it holds text: '<!DOCTYPE html>'"),
    ('array.npy', lambda image, path: np.save(path, np.asarray(image)), 'LoadImageFromFile: '),
])
def test_what_the_loader_can_not_read_is_named(name, write, said, build, folder):
    replace(folder, name, write)
    with pytest.raises(DiagnosisError) as error:
        check_images(build())
    assert name in str(error.value) and said in str(error.value)
    assert 'take it out of the annotations' in str(error.value)


@pytest.mark.parametrize('backend, package', [('tifffile', 'tifffile'), ('turbojpeg', 'PyTurboJPEG')])
def test_a_decoder_that_is_not_installed_is_named(backend, package, build, monkeypatch):
    monkeypatch.setattr(image_reader, 'find_spec', lambda name: None)
    monkeypatch.setattr(mmcv.image.io, 'tifffile', None)
    with pytest.raises(DiagnosisError, match=rf"\(imdecode_backend='{backend}' needs .*: pip install {package}\)"):
        check_images(build(dict(LOAD, imdecode_backend=backend)))


def with_thumbnail(image):
    """A JPEG that holds another one, with an end of its own, in its header."""
    small = jpeg_bytes(image)
    return b'\xff\xd8\xff\xe1' + (len(small) + 2).to_bytes(2, 'big') + small + jpeg_bytes(image)[2:]


def test_opencv_4_fills_half_a_jpeg_with_grey(build, folder, monkeypatch):
    replace(folder, 'half.jpg', keep(0.5))
    whole = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(mmcv, 'imfrombytes', lambda *args, **settings: whole)
    report = look_at_images(build(), Memory())
    assert len(report.faults) == 1 and 'half.jpg' in report.faults[0]


def test_all_faults_are_told_up_to_a_number(build, folder):
    for name in ('2.png', '5.png'):
        (folder / name).write_text('no image')
    with pytest.raises(DiagnosisError) as error:
        check_images(build())
    assert str(error.value).count('can not be read') == 2 and str(error.value).count('Replace it') == 1


def test_of_many_images_some_may_do(build, folder):
    (folder / '5.png').write_text('no image')
    check_images(build(), most=0)
    check_images(build(), most=2)  # 0.png and 4.png
    with pytest.raises(DiagnosisError, match='5.png'):
        check_images(DATASETS.build(dict(type='RepeatDataset', times=2, dataset=build(serialize_data=True))))


# ---------------------------------------------------------------- loaders of users


@TRANSFORMS.register_module()
class LoadOwnArray(BaseTransform):
    """Reads what NumPy wrote, of any number of channels."""

    def __init__(self, channels=3):
        self.channels = channels

    def transform(self, results):
        image = np.load(results['img_path'])[..., :self.channels]
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return results


@TRANSFORMS.register_module()
class LoadInMainThread(BaseTransform):
    """Can not be copied, and bears no other thread, as what holds a connection to a data base."""

    def __init__(self, lock=True):
        self.lock = threading.Lock() if lock else None

    def transform(self, results):
        assert threading.current_thread() is threading.main_thread()
        return dict(results, img=mmcv.imread(results['img_path']))


@TRANSFORMS.register_module()
class Skips(BaseTransform):

    def __init__(self, every=('5.png', )):
        self.every = every

    def transform(self, results):
        skipped = any(results['img_path'].endswith(name) for name in self.every)
        return None if skipped else dict(results, img=np.zeros((64, 64, 3)))


def test_own_loaders_read_what_they_like(build, folder):
    for file in folder.glob('*.png'):
        image = np.asarray(Image.open(file))
        np.save(file, np.concatenate([image, image], 2))
        shutil.move(f'{file}.npy', file)
    assert look_at_images(build(dict(type='LoadOwnArray')), Memory()).faults == []
    (folder / '5.png').write_text('no image')
    fault, = look_at_images(build(dict(type='LoadOwnArray')), Memory()).faults
    assert '5.png' in fault and ('LoadOwnArray' in fault or 'holds text' in fault)


@pytest.mark.parametrize('lock', [True, False])
def test_a_loader_that_bears_no_threads(lock, build, monkeypatch):
    monkeypatch.setattr(image_reader, '_threads', lambda: 3)
    report = look_at_images(build(dict(type='LoadInMainThread', lock=lock)), Memory())
    assert (report.faults, report.images) == ([], 8)


def test_images_that_the_loader_passes_over(build):
    report = look_at_images(build(dict(type='Skips')), Memory())
    assert not report.faults and '1 of 8 images are skipped' in report.notes[0] and '5.png' in report.notes[0]
    report = look_at_images(build(dict(type='Skips'), test_mode=True), Memory())
    assert "5.png' is skipped by Skips, which only a training can bear" in report.faults[0]
    report = look_at_images(build(dict(type='Skips', every=('.png', ))), Memory())
    assert '8 of 8 images are skipped' in report.faults[0]


def test_what_no_transform_loads_is_not_asked_for(build, folder):
    (folder / '5.png').unlink()
    dataset = build(dict(type='LoadAnnotations', with_bbox=True))
    assert look_at_images(dataset, Memory()).images == 0
    check_images(build(dict(LOAD, backend_args=dict(backend='petrel'))))
    with pytest.raises(DiagnosisError, match='5.png'):
        check_images(build(dict(LOAD, backend_args=dict(backend='local'))))


def test_a_data_set_that_brings_its_images():
    """As MMEngine's: the pipeline begins with an array."""

    class Arrays(BaseDataset):

        def load_data_list(self):
            return [dict(img=np.zeros((4, 4, 3)), img_id=0)]

    check_images(Arrays(pipeline=[]))
    check_images([dict()])  # somebody's own list


@pytest.mark.parametrize('shape, fault', [((4, ), True), ((2, 4, 4, 3), True), ((0, 4, 3), True), ((4, 4), False)])
def test_arrays_that_are_no_images(shape, fault, build, folder):
    for file in folder.glob('*.png'):
        np.save(file, np.zeros(shape))
        shutil.move(f'{file}.npy', file)
    loader = dict(type='LoadOwnArray', channels=None)
    assert bool(look_at_images(build(loader), Memory()).faults) is fault


# ---------------------------------------------------------------- channels and sizes


def test_numbers_of_channels(build, folder):
    replace(folder, 'rgba.png', lambda image, path: image.resize((64, 64)).convert('RGBA').save(path))
    pipeline = [dict(LOAD, color_type='unchanged'), dict(type='LoadAnnotations', with_bbox=True),
                dict(type='PackDetInputs')]
    fault, = look_at_images(build(*pipeline), Memory()).faults
    assert "3 in '" in fault and "4 in '" in fault and 'rgba.png' in fault
    assert look_at_images(build(LOAD), Memory(), channels=3).faults == []
    gray = [dict(LOAD, color_type='grayscale'), *pipeline[1:]]
    assert look_at_images(build(*gray), Memory()).faults == []
    assert 'has 1 channels, and the student' in look_at_images(build(*gray), Memory(), channels=3).faults[0]


def test_channels_of_a_student(retinanet):
    assert student_channels(Config(dict(model=retinanet()))) == 3
    assert student_channels(Config(dict(model=dict(retinanet(), data_preprocessor=dict(mean=[0.0]))))) is None
    assert student_channels(Config(dict(model=dict(type='X')))) is None


def test_sizes_that_differ_from_the_annotations_are_a_note(build, folder):
    content = json.loads((folder / 'all.json').read_text())
    for image in content['images']:
        image.update(height=64, width=48) if image['file_name'] == '5.png' else None
    (folder / 'all.json').write_text(json.dumps(content))
    Image.open(folder / '5.png').resize((64, 48)).save(folder / '5.png')
    report = look_at_images(build(), Memory())
    assert not report.faults and '1 of 8 images have another size' in report.notes[0]
    assert 'read as 64 x 48 pixels, its annotations say 48 x 64 (turned by 90 degrees' in report.notes[0]


# ---------------------------------------------------------------- what is remembered


def test_what_was_read_is_remembered(build, folder, tmp_path, loads):
    check_images(build(), Memory(tmp_path / 'work'))
    assert len(set(loads)) == 8
    loads.clear()
    report = look_at_images(build(), Memory(tmp_path / 'work'))
    assert report.known == 8 and len(loads) <= 1  # the first image tells which transforms load
    (folder / '5.png').write_bytes((folder / '4.png').read_bytes() + b' ')
    assert look_at_images(build(), Memory(tmp_path / 'work')).known == 7
    assert look_at_images(build(dict(LOAD, color_type='grayscale')), Memory(tmp_path / 'work')).known == 0
    (folder / '5.png').write_text('no image')
    for _ in range(2):  # faults are not remembered
        assert len(look_at_images(build(), Memory(tmp_path / 'work')).faults) == 1


@pytest.mark.parametrize('content', ['', '[]', '{"format": 1}', '{"format": 1, "checked": {"x": 3}}',
                                     '{"format": 2, "checked": {}}', '\udcff'])
def test_a_memory_of_something_else_is_passed_over(content, build, tmp_path):
    (tmp_path / MEMORY_FILE).write_bytes(content.encode('utf-8', 'surrogateescape'))
    assert look_at_images(build(), Memory(tmp_path)).known == 0
    assert look_at_images(build(), Memory(tmp_path)).known == 8


def test_a_memory_that_can_not_be_written_is_no_error(build, tmp_path):
    (tmp_path / MEMORY_FILE).mkdir()
    check_images(build(), Memory(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if 'partial' in path.name] == []


def test_an_interrupted_check_keeps_what_it_has(build, tmp_path, monkeypatch):
    monkeypatch.setattr(image_reader, 'CHUNK', 2)
    monkeypatch.setattr(image_reader, '_threads', lambda: 1)
    plain = image_reader.Reader._look

    def interrupted(self, index, transforms):
        if index == 5:
            raise KeyboardInterrupt
        return plain(self, index, transforms)

    with monkeypatch.context() as patch:
        patch.setattr(image_reader.Reader, '_look', interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_images(build(), Memory(tmp_path))
    assert look_at_images(build(), Memory(tmp_path)).known == 4


def test_each_rank_reads_its_share_and_all_end_with_the_same_error(build, folder, tmp_path, monkeypatch):
    (folder / '5.png').write_text('no image')
    shares = {}
    for rank in (1, 0):
        monkeypatch.setattr(image_reader, 'get_dist_info', lambda: (rank, 2))
        monkeypatch.setattr(image_reader, 'all_gather_object', lambda looks: shares.setdefault(rank, looks) and [
            shares[each] for each in sorted(shares)])
        memory = Memory(tmp_path)
        report = look_at_images(build(), memory)
    assert [look.index for look in shares[0]] == [0, 2, 4, 6] and [look.index for look in shares[1]] == [1, 3, 5, 7]
    assert report.images == 8 and len(report.faults) == 1
    assert sum(map(len, Memory(tmp_path).checked.values())) == 7


def test_random_numbers_stay(build):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    check_images(build(LOAD, dict(type='RandomFlip', prob=0.5)))
    assert states[0] == random.getstate() and (states[1] == np.random.get_state()[1]).all()
    assert torch.equal(states[2], torch.random.get_rng_state())


# ---------------------------------------------------------------- the doctor


def test_the_doctor_asks_the_same_loader(folder, retinanet):
    dataset = dict(type='CocoDataset', data_root=str(folder), ann_file='all.json', data_prefix=dict(img=''),
                   metainfo=dict(classes=CLASSES), pipeline=[LOAD])
    config = Config(dict(model=retinanet(), train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2,
                                                                               dataset=dataset)),
                         val_dataloader=dict(dataset=dict(dataset, test_mode=True)),  # the same image is told once
                         test_dataloader=dict(dataset=dict(dataset, pipeline=[dict(type='Skips', every=())]))))
    assert [finding for finding in inspect_data(config) if finding.fault] == []
    (folder / '5.png').write_text('no image')
    finding, = (finding for finding in inspect_data(config) if finding.fault)
    assert finding.fault and finding.subject == 'train images' and '5.png' in finding.found and finding.remedy
    assert [finding for finding in inspect_data(config, ('train', ), images=0) if finding.fault] == []
    config.train_dataloader.dataset.dataset.pipeline = [dict(type='NoSuchLoader')]
    finding, = (finding for finding in inspect_data(config, ('train', )) if finding.fault)
    assert 'can not be built' in finding.found and 'NoSuchLoader' in finding.found


def test_progress_is_told_in_the_log(build, monkeypatch):
    said = []
    monkeypatch.setattr(image_reader, 'PAUSE', -1.0)
    dataset = build()
    monkeypatch.setattr(image_reader.MMLogger, 'get_current_instance', lambda: type('Log', (), dict(info=said.append)))
    check_images(dataset)
    assert said == ['Images: 8 of 8 read, about 0 s left']
