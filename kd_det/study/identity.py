"""What tells trainings apart: the identity of a run, and the hashes of its data, of weights and of its teacher's model.

What a run depends on counts, and where that lies does not: a benchmark that was moved, or whose data was, goes on.
"""
from __future__ import annotations

import copy
import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kd_det.config.detectors import read_model_config
from kd_det.config.files import is_distillation, list_leaf_datasets, map_strings

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
OF_DESKTOPS = ('Thumbs.db', 'desktop.ini')  # which, as names that begin with a dot, are no data
WEIGHTS = ('.pth', '.pt', '.ckpt', '.bin', '.pkl', '.safetensors')


def sha256(content: bytes) -> str:
    """Returns the SHA-256 hash of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def identify_run(config: Config, inputs: Any = None) -> str:
    """Returns the hash of all that a run depends on.

    Args:
        config: The run's config. Where the run, its data and its teachers lie does not count; of a file of weights,
            such as one that a backbone starts from, its content does.
        inputs: What the result depends on beside the config: the hashes of its data and of its teachers' models and
            weights; anything that JSON holds.
    """
    settings = copy.deepcopy(config.to_dict())
    settings.pop('work_dir', None)
    if is_distillation(config):
        teachers = settings['model'].get('teacher', ())
        for teacher in [teachers] if isinstance(teachers, dict) else teachers:
            for key in ('config', 'checkpoint'):
                if isinstance(teacher.get(key), str):
                    del teacher[key]
    settings = map_strings(_name_data(settings), _name_weights)
    return sha256(json.dumps([settings, inputs], sort_keys=True, default=str).encode())


def _name_weights(text: str) -> str:
    """The hash of the weights in place of the name of a file that has some; any other text as it is."""
    return f'<weights {hash_weights(text)}>' if text.endswith(WEIGHTS) and Path(text).is_file() else text


@lru_cache(maxsize=64)
def _hash_unchanged(file: str, time: int, size: int) -> str:
    return sha256(Path(file).read_bytes())


def _name_data(settings: dict) -> dict:
    """The settings with numbers for the folders of the data, wherever they begin the name of a file."""
    loaders = [settings[key] for key in LOADERS if isinstance(settings.get(key), dict)]
    leaves = [leaf for loader in loaders for leaf in list_leaf_datasets(loader.get('dataset') or {})]
    roots = [_spell(str(root)) for root in (settings.get('data_root'), *(leaf.get('data_root') for leaf in leaves))
             if root]
    names = {root: f'<data {number}>' for number, root in enumerate(dict.fromkeys(roots))}

    def name(text: str) -> str:
        path = _spell(text) if text else text
        within = [root for root in names if f'{path}/'.startswith(f'{root}/')]
        longest = max(within, key=len, default='')
        return names[longest] + path[len(longest):] if within else text

    return map_strings(settings, name)


def _spell(path: str) -> str:
    """A path in the one way that it is spelt: ``data`` for ``./data/`` and, on Windows, ``a/b`` for a backslash."""
    return os.path.normpath(path).replace(os.sep, '/')


def name_data(config: Config) -> str:
    """Names the files that :func:`hash_data` reads: configs of the same data have the same."""
    leaves = (leaf for split in ('train', 'val') for leaf in list_leaf_datasets(config[f'{split}_dataloader'].dataset))
    return json.dumps([[leaf.get(key) for key in ('data_root', 'ann_file', 'data_prefix')] for leaf in leaves],
                      default=str)


def hash_data(config: Config) -> str:
    """Returns the hash of a config's training and validation data: annotations by content, images by name and size.

    The images are those of the folder; where it holds folders, the files that the annotations name, for a work dir may
    be among them. Of a list of names, as VOC has them, all files of these names count, XML by content.
    """
    parts = []
    for split in ('train', 'val'):
        for dataset in list_leaf_datasets(config[f'{split}_dataloader'].dataset):
            root, prefix = Path(dataset.get('data_root') or ''), dataset.get('data_prefix') or {}
            annotations = Path(root, dataset['ann_file']).read_bytes()
            images = Path(root, prefix.get('img', ''))
            if str(dataset['ann_file']).endswith('.txt'):
                parts += [annotations, *_describe_named(Path(root, prefix.get('sub_data_root', '')), annotations)]
                continue
            within = list(images.iterdir())
            names = [file.name for file in within if file.is_file()]
            if any(file.is_dir() for file in within):
                names = _list_images(annotations) or names
            names = [name for name in names if not (name.startswith('.') or name in OF_DESKTOPS)]
            sizes = [f'{name} {file.stat().st_size if (file := images / name).is_file() else None}'
                     for name in sorted(names)]
            parts += [annotations, '\n'.join(sizes).encode(errors='surrogateescape')]
    return sha256(b'\0'.join(parts))


def _describe_named(folder: Path, names: bytes) -> list[bytes]:
    """Of each file under a folder whose name is in a list of them: XML's content, another's size."""
    listed = set(names.decode(errors='replace').split())
    files = (file for file in folder.rglob('*') if file.stem in listed and file.is_file())
    found = {file.relative_to(folder).as_posix(): file for file in files}
    described = []
    for name, file in sorted(found.items()):
        content = file.read_bytes() if file.suffix == '.xml' else str(file.stat().st_size).encode()
        described.append(name.encode(errors='surrogateescape') + b' ' + content)
    return described


def _list_images(annotations: bytes) -> list[str]:
    """The names of the images that COCO's annotations have; none of another format."""
    try:
        return [str(image['file_name']) for image in json.loads(annotations)['images']]
    except (ValueError, TypeError, KeyError):
        return []


def hash_weights(checkpoint: str) -> str:
    """Returns the hash of a file of weights; of an address the address itself."""
    file = Path(checkpoint)
    if not file.is_file():
        return checkpoint
    state = file.stat()
    return _hash_unchanged(str(file.resolve()), state.st_mtime_ns, state.st_size)


def hash_model(config: str | Path) -> str:
    """Returns the hash of the model of a detector's config, however that is spelt or inherits it.

    Raises:
        ConfigurationError: See :func:`~kd_det.config.detectors.read_model_config`.
    """
    return sha256(json.dumps(read_model_config(config).to_dict(), sort_keys=True, default=str).encode())
