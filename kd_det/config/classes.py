"""What the labels of data and detectors mean, and which classes of two detectors are the same: matched by name."""
from __future__ import annotations

import json
import mmap
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import get_local_path, load
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.config.files import ConfigurationError, iterate_built_datasets, list_leaf_datasets
from kd_det.registry import HOME, find_class

Names = tuple[str, ...]

CATEGORIES = re.compile(rb'"categories"\s*:\s*(?=\[)')


class ClassMatch(NamedTuple):
    """The classes that a student shares with a teacher. A class is a label: its index among the names.

    Attributes:
        student: Names of the student's classes, by label.
        teacher: Names of the teacher's classes, by label.
        of_student: The student's labels of the shared classes, in ascending order.
        of_teacher: The teacher's label of each.
    """
    student: Names
    teacher: Names
    of_student: tuple[int, ...]
    of_teacher: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether the two have the same classes in the same order."""
        return self.of_student == tuple(range(len(self.teacher))) == self.of_teacher == tuple(range(len(self.student)))

    def index_shared(self, labels: Tensor) -> Tensor:
        """The student's labels as indices among the shared classes; -1 where the class is not shared."""
        return _map_labels(labels, len(self.student), self.of_student, range(len(self.of_student)))

    def find_own(self, labels: Tensor) -> Tensor:
        """The student's labels as the teacher's own; -1 where the class is not shared."""
        return _map_labels(labels, len(self.student), self.of_student, self.of_teacher)

    def translate(self, detections: InstanceData) -> InstanceData:
        """The teacher's detections with the student's labels, without those of classes that the student lacks."""
        labels = _map_labels(detections.labels, len(self.teacher), self.of_teacher, self.of_student)
        kept = detections[labels >= 0]
        kept.labels = labels[labels >= 0]
        return kept

    def report(self, restricted: str = 'distillation') -> str:
        """What matches and what does not, for the log.

        Args:
            restricted: What only the shared classes take part in.
        """
        if self.is_identity:
            return f"the teacher's {len(self.teacher)} are the student's, in the same order."
        shared, ours, theirs = len(self.of_student), len(self.student), len(self.teacher)
        sentences = [f"the teacher's {theirs} are the student's, in another order; its outputs follow the names."
                     if shared == ours == theirs else
                     f"{shared} of the student's {ours} are among the teacher's {theirs}; {restricted} is restricted "
                     'to them, and follows their names.']
        missing = [name for label, name in enumerate(self.student) if label not in self.of_student]
        pairs = [(self.student[label], self.teacher[other]) for label, other in zip(self.of_student, self.of_teacher)]
        respelt = [f"'{student}' = '{teacher}'" for student, teacher in pairs if student != teacher]
        if missing:
            sentences.append(f"Not shared: {', '.join(missing)}.")
        if respelt:
            sentences.append(f"Taken for the same: {', '.join(respelt)}.")
        return ' '.join(sentences)


def match_classes(student: Sequence[str], teacher: Sequence[str]) -> ClassMatch:
    """Matches classes by name.

    A name without an equal among the teacher's is compared again without regard to case, spaces, '_' and '-'.

    Args:
        student: Names of the student's classes, by label.
        teacher: Names of the teacher's classes, by label.

    Raises:
        ConfigurationError: No class is shared.
    """
    exact = {name: label for label, name in reversed(list(enumerate(teacher)))}
    left = {normalize_name(name): label for name, label in exact.items() if name not in set(student)}
    pairs = [(label, exact.get(name, left.get(normalize_name(name)))) for label, name in enumerate(student)]
    pairs = [pair for pair in pairs if pair[1] is not None]
    if not pairs:
        raise ConfigurationError(
            f"The student's classes ({_join_names(student)}) and the teacher's ({_join_names(teacher)}) have no name "
            "in common. Name the teacher's in the student's words, by label, with teacher.classes=[…], or give another "
            'teacher.')
    return ClassMatch(tuple(student), tuple(teacher), *zip(*pairs))


def find_dataset_classes(dataset: dict) -> Sequence[str] | None:
    """The class names of a data set's config: its own, a file's, or its type's; a text where that is the mistake.

    Those of things, where a panoptic data set has stuff too, for that has no boxes.
    """
    classes = _find_box_classes(dataset.get('metainfo') or {})
    if isinstance(classes, str) and Path(classes).is_file():
        return Path(classes).read_text(encoding='utf-8').splitlines()
    if classes is None:
        classes = _find_box_classes(getattr(find_class(DATASETS, dataset, HOME), 'METAINFO', {}))
    return classes


def _find_box_classes(metainfo: Mapping[str, Any]) -> Sequence[str] | None:
    return metainfo.get('thing_classes') or metainfo.get('classes')


class LabelNames(NamedTuple):
    """What the labels of a data set mean.

    Attributes:
        meant: The name of the category that the boxes of each label have.
        declared: The names in the data set's ``metainfo``, by label as its writer believes.
        known: All categories of the annotations, in the order in which they are numbered; ``meant`` where that is all.
    """
    meant: Names
    declared: Names
    known: Names

    @property
    def agree(self) -> bool:
        """Whether no label has boxes of another name than the metainfo says, up to spelling."""
        return len(self.meant) <= len(self.declared) and mean_the_same(self.meant, self.declared)

    @property
    def absent(self) -> list[str]:
        """The declared names that no category has, letter by letter, where labels are missing for it."""
        if len(self.meant) >= len(self.declared):
            return []
        return [name for name in self.declared if name not in self.known]


def mean_the_same(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether labels that two lists of names both have mean the same in both, up to spelling."""
    return all(normalize_name(one) == normalize_name(other) for one, other in zip(first, second))


def read_label_names(leaf: Any) -> LabelNames | None:
    """Reads what the labels of a built data set mean from its annotations.

    MMDetection numbers the labels of COCO files and their kin in the order of the *file's* categories, whatever order
    ``metainfo.classes`` has, and passes over a name that is no category, so that all later labels shift. A file in
    MMEngine's own form holds labels and names them; ODVG has a file of names. All other data sets number by their
    metainfo.

    Args:
        leaf: A data set that is no wrapper.

    Returns:
        The names; None where nothing tells them.
    """
    getattr(leaf, 'full_init', lambda: None)()  # as a Runner does, where lazy_init left it
    declared = tuple(map(str, get_metainfo(leaf).get('classes') or ()))
    labels, named, known = getattr(leaf, 'cat2label', None), getattr(leaf, 'label_map', None), ()
    meant: dict[int, str] = dict(enumerate(declared))
    if isinstance(labels, dict) and hasattr(leaf, 'cat_ids'):
        categories = _find_categories(leaf)
        # A data set of one's own may unite categories, and name what they are together.
        if labels.keys() <= categories.keys() and len(set(labels.values())) == len(labels):
            meant, known = {label: categories[category] for category, label in labels.items()}, categories.values()
    elif isinstance(named, dict) and all(isinstance(name, str) for name in named.values()):
        meant = {int(label): name for label, name in named.items()}
    elif getattr(type(leaf), 'load_data_list', None) is BaseDataset.load_data_list and leaf.ann_file:
        meant = dict(enumerate(load(leaf.ann_file)['metainfo'].get('classes') or declared))
    names = tuple(str(meant.get(label, '')) for label in range(max(meant, default=-1) + 1))
    return LabelNames(names, declared or names, tuple(known) or names) if names or known else None


def find_label_names(dataset: Any) -> Names | None:
    """What the labels of a built data set mean, see :func:`read_label_names`; of joined ones those of the first.

    Args:
        dataset: Of MMDetection or MMEngine, wrappers included.
    """
    found = map(read_label_names, iterate_built_datasets(dataset))
    return next((names.meant for names in found if names and names.meant), None)


def get_metainfo(dataset: Any) -> dict:
    """The ``metainfo`` of a built data set, see :func:`get_first_metainfo`."""
    return get_first_metainfo(getattr(dataset, 'metainfo', None))


def get_first_metainfo(metainfo: dict | Sequence[dict] | None) -> dict:
    """Returns the first ``metainfo``: joined data sets that differ in it, as in a palette, have several; else {}."""
    given = [metainfo] if isinstance(metainfo, dict) else metainfo or ()
    return next((each for each in given if isinstance(each, dict)), {})


def _find_categories(leaf: Any) -> dict[int, str]:
    """The categories of a data set of COCO's kin by id, in the order in which it numbers them; none if not readable."""
    try:
        categories = read_categories(leaf.ann_file, getattr(leaf, 'backend_args', None))
    except (OSError, ValueError, KeyError, TypeError):  # a data set of COCO's kin may read a form of its own
        return {}
    used = [category for category in categories if category in leaf.cat_ids]
    return categories if used == list(leaf.cat_ids) else dict(sorted(categories.items()))  # as Objects365 does


def read_categories(file: str, backend_args: dict | None = None) -> dict[int, str]:
    """Reads the categories of a COCO file: names by id, in the order of the file.

    Such files are large, and several checks ask: a file that has not changed is read once, and where the list can be
    told from all else, it alone is decoded.

    Args:
        file: The annotation file.
        backend_args: Where it lies, as for mmengine.

    Raises:
        ValueError: It is no JSON file.
        KeyError: It has no categories.
    """
    with get_local_path(file, backend_args=backend_args) as path:
        state = os.stat(path)
        return dict(_read_categories(str(path), state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=8)
def _read_categories(path: str, changed: int, size: int) -> dict[int, str]:
    with open(path, 'rb') as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        starts = [match.end() for match in CATEGORIES.finditer(content)]
        found = _decode_list(content, starts[0]) if len(starts) == 1 else json.loads(content[:])['categories']
    return {category['id']: str(category['name']) for category in found}


def _decode_list(content: mmap.mmap, start: int, size: int = 2**16) -> list:
    """The JSON list that begins there."""
    while True:
        try:
            return json.JSONDecoder().raw_decode(content[start:start + size].decode('utf-8', errors='ignore'))[0]
        except json.JSONDecodeError:
            if start + size >= len(content):
                raise
            size *= 8


def find_training_classes(config: Config) -> Sequence[str] | None:
    """The class names that a config's training data declares, see :func:`find_dataset_classes`; None without such data.

    What its labels mean is known once the data is read, see :func:`find_label_names`.
    """
    loader = config.get('train_dataloader')
    return find_dataset_classes(list_leaf_datasets(loader['dataset'])[0]) if loader else None


def count_classes(model: nn.Module) -> int | None:
    """The number of classes that a detector tells apart, or None where its head does not say."""
    head = getattr(model, 'roi_head', None) or getattr(model, 'bbox_head', None)
    head = getattr(head, 'bbox_head', head)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


def normalize_name(name: str) -> str:
    """A name without regard to case, spaces, '_' and '-', and to how Unicode composes its signs."""
    return ''.join(each for each in unicodedata.normalize('NFKC', name).casefold() if each not in ' _-')


def _map_labels(labels: Tensor, count: int, keys: Sequence[int], values: Sequence[int]) -> Tensor:
    table: dict[int, int] = dict(zip(keys, values))
    return labels.new_tensor([table.get(label, -1) for label in range(count)])[labels]


def _join_names(names: Sequence[str], most: int = 6) -> str:
    rest = len(names) - most
    return ', '.join(names[:most]) + (f', … and {rest} more' if rest > 0 else '')
