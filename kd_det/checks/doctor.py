"""The inspections together: all of them for ``kd-det doctor``, the cheap ones at the start of a run."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from kd_det.checks.arguments import inspect_arguments, locate_unknown_key
from kd_det.checks.checkpoints import (
    inspect_checkpoints,
    inspect_start,
    inspect_start_weights,
    inspect_student,
    inspect_teacher_classes,
    inspect_teacher_weights,
)
from kd_det.checks.data import (
    SPLITS,
    build_data,
    inspect_annotations,
    inspect_cache,
    inspect_classes,
    inspect_labels,
    inspect_paths,
)
from kd_det.checks.environment import Finding, raise_faults
from kd_det.checks.image_reader import Memory
from kd_det.checks.images import inspect_images, student_channels
from kd_det.checks.instances import inspect_evaluated_images, inspect_instances
from kd_det.checks.step import inspect_step
from kd_det.config.classes import Names, find_label_names
from kd_det.config.files import UNKNOWN_ARGUMENT, ConfigurationError
from kd_det.registry import get_scope, within_scope


def inspect_config(config: Config, images: int | None = None) -> Iterator[Finding]:
    """All that can be told without training: reads annotations and images, loads the teacher's weights, tries a step.

    Args:
        config: The config.
        images: Look at so many images of each data set; at all by default.
    """
    # What a run has looked at is known; a work dir is not made for a diagnosis.
    work_dir = config.get('work_dir')
    memory = Memory(work_dir if work_dir and Path(work_dir).is_dir() else None)
    with within_scope(get_scope(config)):
        mistakes = list(inspect_arguments(config))
        if mistakes:  # what else there is to look at is read by them
            yield from mistakes
            return
        findings, names = _look_at_data(config, SPLITS, memory, images)
        yield from chain(_inspect_cheaply(config, SPLITS, names), findings, inspect_teacher_weights(config),
                         inspect_start_weights(config), inspect_step(config, names))


def inspect_data(config: Config, splits: Sequence[str] = SPLITS, memory: Memory | None = None,
                 images: int | None = None) -> list[Finding]:
    """Reads the annotations, then builds the data sets: what their labels mean, and whether their images can be read.

    Args:
        config: The config.
        splits: Of :data:`~kd_det.checks.data.SPLITS`.
        memory: The images that are known from before.
        images: Look at so many of each data set; at all by default.
    """
    return _look_at_data(config, splits, memory, images)[0]


def _look_at_data(config: Config, splits: Sequence[str], memory: Memory | None,
                  images: int | None) -> tuple[list[Finding], Names | None]:
    """As :func:`inspect_data`, with what the labels of the training data mean, where that is found out."""
    findings = list(inspect_annotations(config, splits))
    if any(finding.fault for finding in (*findings, *inspect_paths(config, splits))):
        return findings, None
    datasets, metrics, faults = build_data(config, splits)
    findings += [*faults, *inspect_labels(datasets, metrics), *inspect_instances(datasets),
                 *inspect_evaluated_images(datasets, metrics),
                 *inspect_images(datasets, student_channels(config), memory, images)]
    return findings, find_label_names(datasets['train']) if 'train' in datasets else None


def check_config(config: Config, splits: Sequence[str]) -> None:
    """Looks at what is cheap to look at: keys and values, paths, numbers of classes, and the annotation files.

    Args:
        config: The config.
        splits: Whose data a run needs, of :data:`~kd_det.checks.data.SPLITS`; weights matter where it trains.

    Raises:
        DiagnosisError: A key or a value does not fit, a file is missing or damaged, or class counts differ; all faults
            are listed.
    """
    raise_faults(inspect_arguments(config))
    with within_scope(get_scope(config)):
        raise_faults(chain(_inspect_cheaply(config, splits), inspect_annotations(config, splits, others=False)))


def warn_of_annotations(config: Config, splits: Sequence[str]) -> None:
    """Logs what is worth to know of the annotation files, which :func:`check_config` has read."""
    with within_scope(get_scope(config)):
        for finding in inspect_annotations(config, splits, others=False):
            if finding.mark == 'note':
                MMLogger.get_current_instance().warning(f'{finding.subject}: {finding.found}. {finding.remedy}.')


@contextmanager
def explain(config: Config) -> Iterator[None]:
    """Looks for the cause when building something from the config fails.

    Raises:
        DiagnosisError: The annotations are the cause.
        ConfigurationError: The config is.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if type(error).__module__.split('.')[0] == 'kd_det':
            raise
        raise_faults(inspect_annotations(config))
        unknown = UNKNOWN_ARGUMENT.search(str(error))
        if unknown:
            locate_unknown_key(config, unknown[1])
        raise ConfigurationError(f"The config '{config.filename}' can not be built: {type(error).__name__}: {error} "
                                 '(--debug shows where)') from error


def _inspect_cheaply(config: Config, splits: Sequence[str], names: Names | None = None) -> Iterator[Finding]:
    found = chain(inspect_student(config), inspect_paths(config, splits), inspect_classes(config, splits),
                  inspect_start(config))
    if 'train' in splits:
        found = chain(found, inspect_checkpoints(config), inspect_teacher_classes(config, names), inspect_cache(config))
    return found
