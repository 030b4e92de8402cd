"""Which classes of two detectors are the same: matched by name, for their order and number may differ."""
from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.configuration import ConfigurationError, leaf_datasets
from kd_det.scopes import HOME, find_class

Names = Tuple[str, ...]


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
    of_student: Tuple[int, ...]
    of_teacher: Tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether the two have the same classes in the same order."""
        return self.of_student == tuple(range(len(self.teacher))) == self.of_teacher == tuple(range(len(self.student)))

    def shared(self, labels: Tensor) -> Tensor:
        """The student's labels as indices among the shared classes; -1 where the class is not shared."""
        return _look_up(labels, len(self.student), self.of_student, range(len(self.of_student)))

    def translated(self, detections: InstanceData) -> InstanceData:
        """The teacher's detections with the student's labels, without those of classes that the student lacks."""
        labels = _look_up(detections.labels, len(self.teacher), self.of_teacher, self.of_student)
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
        respelt = [f"'{student}' = '{teacher}'" for student, teacher in self._pairs() if student != teacher]
        if missing:
            sentences.append(f"Not shared: {', '.join(missing)}.")
        if respelt:
            sentences.append(f"Taken for the same: {', '.join(respelt)}.")
        return ' '.join(sentences)

    def _pairs(self) -> List[Tuple[str, str]]:
        return [(self.student[s], self.teacher[t]) for s, t in zip(self.of_student, self.of_teacher)]


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
    left = {_spelling(name): label for name, label in exact.items() if name not in set(student)}
    pairs = [(label, exact.get(name, left.get(_spelling(name)))) for label, name in enumerate(student)]
    pairs = [pair for pair in pairs if pair[1] is not None]
    if not pairs:
        raise ConfigurationError(
            f"The student's classes ({_listed(student)}) and the teacher's ({_listed(teacher)}) have no name in "
            "common. Name the teacher's in the student's words, by label, with teacher.classes=[…], or give another "
            'teacher.')
    return ClassMatch(tuple(student), tuple(teacher), *zip(*pairs))


def dataset_classes(dataset: dict) -> Optional[Sequence[str]]:
    """The class names of a data set's config: its own, a file's, or its type's; a text where that is the mistake."""
    classes = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str) and Path(classes).is_file():
        return Path(classes).read_text(encoding='utf-8').splitlines()
    if classes is None:
        classes = getattr(find_class(DATASETS, dataset, HOME), 'METAINFO', {}).get('classes')
    return classes


def training_classes(config: Config) -> Optional[Sequence[str]]:
    """The class names of a config's training data, see :func:`dataset_classes`; None without training data."""
    loader = config.get('train_dataloader')
    return dataset_classes(leaf_datasets(loader['dataset'])[0]) if loader else None


def number_of_classes(model: nn.Module) -> Optional[int]:
    """The number of classes that a detector tells apart, or None where its head does not say."""
    head = getattr(model, 'roi_head', None) or getattr(model, 'bbox_head', None)
    head = getattr(head, 'bbox_head', head)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


def _spelling(name: str) -> str:
    return ''.join(character for character in name.casefold() if character not in ' _-')


def _look_up(labels: Tensor, count: int, keys: Sequence[int], values: Sequence[int]) -> Tensor:
    table: Dict[int, int] = dict(zip(keys, values))
    return labels.new_tensor([table.get(label, -1) for label in range(count)])[labels]


def _listed(names: Sequence[str], most: int = 6) -> str:
    rest = len(names) - most
    return ', '.join(names[:most]) + (f', … and {rest} more' if rest > 0 else '')
