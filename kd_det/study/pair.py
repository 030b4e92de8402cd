"""The pair that a benchmark is about: a student and its teacher, and their configs."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.config.files import is_distillation, load_config, set_data_root, student_config
from kd_det.config.options import resolve_config, set_epochs


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    Attributes:
        student: Config of the plain student: it decides data, classes, schedule and evaluation of all runs but the
            teacher's.
        teacher: Name of the teacher's config.
        checkpoints: The weights of the teacher, or of several of its config; addresses or files; none if they are to be
            trained.
        further: The names of the configs of further teachers that are unlike it.
    """
    student: Config
    teacher: str
    checkpoints: tuple[str, ...] = ()
    further: tuple[str, ...] = ()

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of all teachers' configs; none where one config is that of all."""
        return (self.teacher, *self.further) if self.further else ()

    def teacher_config(self, index: int = 0) -> Config:
        """The config that trains the teacher, or one of several."""
        return student_config(load_config(self.teachers[index] if self.further else self.teacher))


def read_pair(pair: str | Path | Config | None = None, student: str | Path | Config | None = None,
              teacher: str | Path | Sequence[str | Path] | None = None, checkpoints: Sequence[str] = ()) -> Pair:
    """Reads a pair.

    Args:
        pair: Config of a distillation, such as ``configs/_base_/pairs/retinanet_r101_r18.py``; its terms do not count.
        student: Config of a plain detector, in place of ``pair`` or of its student.
        teacher: Config of the teacher, in place of the pair's; or of several, for ``@teachers=N``.
        checkpoints: The teacher's weights, or those of several. By default the pair's, if it names an address or a file
            that is there.

    Raises:
        ConfigurationError: There is no student or no teacher, the pair is no distillation, or it has several teachers.
    """
    config, named, further = None, {}, ()
    if teacher is not None and not isinstance(teacher, (str, Path)):
        teacher, *further = teacher or (None, )
    if pair is not None:
        config = resolve_config(pair)
        pair = config.filename if isinstance(pair, Config) else pair
        if not is_distillation(config):
            raise ConfigurationError(f"PAIR '{pair}' is no distillation: give the config of one (its model a "
                                     'DetectionDistiller), or --student and --teacher in its place.')
        named = config.model.get('teacher', ())
        if isinstance(named, dict) and 'type' in named:
            raise ConfigurationError(f"PAIR '{pair}' has no detector as its teacher, but a guide of type "
                                     f"{named['type']}: expected one.")
        if not isinstance(named, dict):
            raise ConfigurationError(f"PAIR '{pair}' has {len(named)} teachers: expected one. To learn from several, "
                                     'give the weights of each with --teacher-checkpoint, and a method with '
                                     '@teachers=N.')
        config = student_config(config)
    config = student_config(resolve_config(student)) if student else config
    if not checkpoints and teacher is None and _exists(named.get('checkpoint')):
        checkpoints = [named['checkpoint']]
    teacher = str(teacher) if teacher else named.get('config')
    if config is None or not teacher:
        raise ConfigurationError('There is no pair: give the config of a distillation, or --student and --teacher.')
    if not isinstance(teacher, str):
        raise ConfigurationError(f"PAIR '{pair}' holds its teacher as a model dict: give the file that trains it with "
                                 '--teacher.')
    return Pair(config, teacher, tuple(checkpoints), tuple(map(str, further)))


def _exists(checkpoint: str | None) -> bool:
    return bool(checkpoint) and ('://' in checkpoint or Path(checkpoint).is_file())


def adapt_config(config: Config, data_root: str | None = None, epochs: int | None = None) -> Config:
    """Returns a copy of a config with another data root and with other epochs, its schedules stretched with them.

    Raises:
        ConfigurationError: It does not count in epochs, or has no CocoMetric.
    """
    config = copy.deepcopy(config)
    if data_root is not None:
        set_data_root(config, data_root)
    if epochs is not None:
        set_epochs(config, epochs)
    return config
