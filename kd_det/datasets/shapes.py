"""The demo's data set: textured shapes in COCO format, the same bytes on every machine."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Callable

from kd_det.datasets.bitmap import write_bitmap
from kd_det.datasets.scenes import CLASSES, Stream, draw_scene

_SPLITS = ('train', 'val')
_VERSION = 1  # of the drawing; raise it when the same arguments give other pixels


def generate_shapes(root: str | Path,
                    train_images: int = 240,
                    val_images: int = 80,
                    size: int = 128,
                    seed: int = 0,
                    progress: Callable[[int, int], None] | None = None) -> bool:
    """Writes the shapes data set under ``root`` unless it is already there.

    The layout is COCO's: ``annotations/{train,val}.json`` beside ``train/*.bmp`` and ``val/*.bmp``. An image depends on
    the seed, its split and its index alone, so a larger set contains the smaller ones. The annotations of a split are
    written last; an interrupted call can be repeated.

    Args:
        root: Directory to write, made if needed.
        train_images: Images of the train split.
        val_images: Images of the val split.
        size: Height and width of the images in pixels.
        seed: Seed of the whole set, at least 0.
        progress: Called after each image with the number of images done and the number of all.

    Returns:
        Whether anything had to be written.

    Raises:
        ValueError: If a split would be empty, the images smaller than 32 pixels, or the seed negative.
    """
    if min(train_images, val_images) < 1 or size < 32 or seed < 0:
        raise ValueError('expected at least 1 image in each split, a size of at least 32 and a seed of at least 0, got '
                         f'train_images={train_images}, val_images={val_images}, size={size}, seed={seed}')
    counts = dict(zip(_SPLITS, (train_images, val_images)))
    done, written = 0, False
    for split, count in counts.items():
        info = dict(description='kd_det shapes', split=split, images=count, size=size, seed=seed, version=_VERSION)
        annotation_file = Path(root, 'annotations', f'{split}.json')
        if _info(annotation_file) != info:
            written = True
            folder = Path(root, split)
            folder.mkdir(parents=True, exist_ok=True)
            annotation_file.parent.mkdir(exist_ok=True)
            annotation_file.unlink(missing_ok=True)
            images, annotations = [], []
            for index in range(count):
                image, instances = draw_scene(Stream(seed, _SPLITS.index(split), index), size, size)
                name = f'{index:06d}.bmp'
                write_bitmap(folder / name, image)
                images.append(dict(id=index + 1, file_name=name, height=size, width=size))
                annotations += [
                    dict(id=len(annotations) + number, image_id=index + 1, category_id=instance.category + 1,
                         bbox=instance.bbox, area=instance.area, iscrowd=0)
                    for number, instance in enumerate(instances, start=1)
                ]
                if progress:
                    progress(done + index + 1, sum(counts.values()))
            categories = [dict(id=index, name=name) for index, name in enumerate(CLASSES, start=1)]
            _write_json(annotation_file,
                        dict(info=info, images=images, annotations=annotations, categories=categories))
        done += count
    return written


def _info(annotation_file: Path) -> dict | None:
    return json.loads(annotation_file.read_bytes())['info'] if annotation_file.is_file() else None


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix('.partial')
    partial.write_bytes(json.dumps(content, sort_keys=True).encode())
    os.replace(partial, path)
