"""What a teacher calls its classes."""
from __future__ import annotations

from pathlib import Path
from typing import Iterator, Optional, Sequence

from kd_det.classes import Names, dataset_classes, first_metainfo
from kd_det.configuration import leaf_datasets, load_config
from kd_det.scopes import scope_of, within_scope
from kd_det.teachers.loading import ModelConfig, TeacherError


class ClassNamesError(TeacherError):
    """``teacher.classes`` names no classes of this teacher."""


def teacher_classes(count: Optional[int], given: Sequence[str], meta: dict, config: ModelConfig) -> Optional[Names]:
    """Finds the names of a teacher's classes, by label.

    Args:
        count: How many classes its head tells apart; None where that is not known.
        given: The names that ``teacher.classes`` gives, or none.
        meta: The checkpoint's ``meta``, where mmengine keeps the names of the training data.
        config: The teacher's, which may also name its data; as for
            :func:`~kd_det.teachers.loading.read_model_config`.

    Returns:
        The first of these that has ``count`` names; None where none has.

    Raises:
        ClassNamesError: As many names are given as the teacher has not, one twice, or a text.
    """
    if isinstance(given, str) or given and len(set(given)) != len(given):
        raise ClassNamesError(f'teacher.classes={given!r} is no list of names: name each class once, by label.')
    if given and count not in (None, len(given)):
        raise ClassNamesError(f'teacher.classes gives {len(given)} names, but the teacher tells {count} classes apart: '
                           'name all of them, by label.')
    for names in _candidates(given, meta, config):
        if names and not isinstance(names, str) and count in (None, len(names)):
            return tuple(map(str, names))
    return None


def _candidates(given: Sequence[str], meta: dict, config: ModelConfig) -> Iterator[Optional[Sequence[str]]]:
    yield given
    trained = first_metainfo(meta.get('dataset_meta'))
    yield trained.get('classes', trained.get('CLASSES', meta.get('CLASSES')))  # capitals: mmdet 2 and early 3
    config = load_config(config) if isinstance(config, (str, Path)) else config
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        for dataset in leaf_datasets(loader['dataset']) if loader else ():
            with within_scope(scope_of(config)):
                classes = dataset_classes(dataset)
            yield classes
