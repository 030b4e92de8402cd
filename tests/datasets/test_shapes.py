import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kd_det.datasets import CLASSES, SHAPES, TEXTURES, UNIT, Stream, draw_scene, generate_shapes, write_bitmap


def digest(root):
    """One sha256 over the names and the bytes of all files."""
    total = hashlib.sha256()
    for file in sorted(root.rglob('*')):
        if file.is_file():
            total.update(file.relative_to(root).as_posix().encode() + b'\0' + file.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope='module')
def scenes():
    return [draw_scene(Stream(0, 0, index), 96, 128) for index in range(20)]


def test_the_bytes_are_the_same_on_every_machine(tmp_path):
    generate_shapes(tmp_path, train_images=3, val_images=2, size=64, seed=7)
    assert digest(tmp_path) == 'c9408d753b3576d4cc1291a8a83b69843350207912f200ea5f76bb126b57adec'


def test_a_larger_set_contains_the_smaller_and_splits_differ(tmp_path):
    generate_shapes(tmp_path / 'small', train_images=2, val_images=2, size=48)
    generate_shapes(tmp_path / 'large', train_images=4, val_images=2, size=48)
    for name in ('000000.bmp', '000001.bmp'):
        small, large, val = (tmp_path.joinpath(*parts, name).read_bytes()
                             for parts in (('small', 'train'), ('large', 'train'), ('small', 'val')))
        assert small == large != val


def test_generation_is_skipped_when_done_and_repeated_when_asked_for_another_set(tmp_path):
    calls = []
    arguments = dict(train_images=2, val_images=1, size=48, progress=lambda *count: calls.append(count))
    assert generate_shapes(tmp_path, **arguments)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert not generate_shapes(tmp_path, **arguments)
    assert len(calls) == 3
    assert generate_shapes(tmp_path, **{**arguments, 'seed': 1})


def test_an_interrupted_generation_leaves_no_annotations_and_can_be_repeated(tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    arguments = dict(train_images=4, val_images=1, size=48)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path / 'twice', **arguments, progress=interrupt)
    assert not list((tmp_path / 'twice' / 'annotations').iterdir())
    assert generate_shapes(tmp_path / 'twice', **arguments)
    generate_shapes(tmp_path / 'once', **arguments)
    assert digest(tmp_path / 'twice') == digest(tmp_path / 'once')


def test_annotations_that_are_damaged_are_written_anew(tmp_path):
    arguments = dict(train_images=1, val_images=1, size=48)
    generate_shapes(tmp_path, **arguments)
    file = tmp_path / 'annotations' / 'train.json'
    whole = file.read_bytes()
    for damaged in (whole + b'}', whole[:whole.index(b'"kd_det shapes"') + 20], b'["kd_det shapes"]'):
        file.write_bytes(damaged)
        assert generate_shapes(tmp_path, **arguments) and file.read_bytes() == whole


def test_annotations_are_coco_and_lie_within_the_images(tmp_path):
    generate_shapes(tmp_path, train_images=5, val_images=1, size=64)
    content = json.loads((tmp_path / 'annotations' / 'train.json').read_text())
    assert [category['name'] for category in content['categories']] == list(CLASSES)
    assert len({annotation['id'] for annotation in content['annotations']}) == len(content['annotations']) > 5
    images = {image['id']: image for image in content['images']}
    for annotation in content['annotations']:
        image = images[annotation['image_id']]
        assert cv2.imread(str(tmp_path / 'train' / image['file_name'])).shape == (64, 64, 3)
        x, y, width, height = annotation['bbox']
        assert 0 <= x < x + width <= 64 and 0 <= y < y + height <= 64
        assert 0 < annotation['area'] <= width * height
        assert 1 <= annotation['category_id'] <= len(CLASSES)


def test_mmdet_reads_every_class_and_box(tmp_path):
    """The classes of the demo's config are the generator's, in the same order."""
    from mmdet.datasets import CocoDataset
    from mmengine.config import Config

    generate_shapes(tmp_path, train_images=12, val_images=1, size=64)
    config = Config.fromfile(Path(__file__).parents[2] / 'configs' / 'demo' / '_base_' / 'shapes_detection.py')
    assert config.metainfo.classes == CLASSES and len(config.metainfo.palette) == len(CLASSES)
    dataset = CocoDataset(data_root=str(tmp_path), ann_file='annotations/train.json', data_prefix=dict(img='train/'),
                          metainfo=config.metainfo, pipeline=[])
    content = json.loads((tmp_path / 'annotations' / 'train.json').read_text())
    images = [dataset.get_data_info(index) for index in range(len(dataset))]
    labels = [instance['bbox_label'] for image in images for instance in image['instances']]
    assert labels == [annotation['category_id'] - 1 for annotation in content['annotations']]


def test_boxes_fit_what_was_drawn(scenes):
    """Pixels well inside the box of an unhidden object differ from those of the same scene's background."""
    for image, instances in scenes:
        assert image.shape == (96, 128, 3) and image.dtype == np.uint8
        for category, (x, y, width, height), area in instances:
            patch = image[int(y):int(np.ceil(y + height)), int(x):int(np.ceil(x + width))].astype(int).mean(2)
            assert np.ptp(patch) > 50, f'nothing like a {CLASSES[category]} at {x, y}'


def test_every_class_and_all_sizes_occur(scenes):
    instances = [instance for _, instances in scenes for instance in instances]
    assert {instance.category for instance in instances} == set(range(len(CLASSES)))
    lengths = [max(instance.bbox[2:]) for instance in instances]
    assert min(lengths) < 20 and max(lengths) > 40


def test_shapes_stay_within_the_reach_of_their_radius():
    """A figure is drawn in a window of 1.5 times its radius."""
    u, v = np.meshgrid(*[np.arange(-3 * UNIT, 3 * UNIT + 1, 16)] * 2)
    for name, covers in SHAPES.items():
        covered = covers(u, v)
        assert covered.any() and (u * u + v * v)[covered].max() <= (1.5 * UNIT)**2, name


def test_textures_show_both_colours():
    u, v = np.meshgrid(*[np.arange(-UNIT, UNIT, 16)] * 2)
    for name, texture in TEXTURES.items():
        share = texture(u, v, UNIT // 2).mean()
        assert share == 0 if name == 'plain' else 0.3 < share < 0.7, name


def test_stream_covers_its_range_and_depends_on_the_whole_seed():
    values = Stream(0, 1).integers(-2, 3, (1000, ))
    assert set(values) == set(range(-2, 4))
    assert (values != Stream(0, 2).integers(-2, 3, (1000, ))).any()
    assert (values == Stream(0, 1).integers(-2, 3, (1000, ))).all()


def test_bitmap_is_read_as_written(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype(np.uint8)  # rows of 21 bytes need padding
    write_bitmap(tmp_path / 'image.bmp', image)
    assert (cv2.imread(str(tmp_path / 'image.bmp'))[..., ::-1] == image).all()


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match='val_images=0'):
        generate_shapes(tmp_path, val_images=0)
    with pytest.raises(ValueError, match='size=8'):
        generate_shapes(tmp_path, size=8)
    with pytest.raises(ValueError, match=r'\(4, 4\)'):
        write_bitmap(tmp_path / 'image.bmp', np.zeros((4, 4), np.uint8))
    assert not list(tmp_path.iterdir())
