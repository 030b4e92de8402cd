"""Inspects the teachers of a config and the weights that it starts from."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from kd_det.checks.data import class_counts
from kd_det.checks.environment import Finding
from kd_det.checks.synthetic import synthetic_batch
from kd_det.compat.checkpoint import STATISTICS, CheckpointError, NotFiniteError, load_checkpoint, require_finite
from kd_det.compat.process import preserved_randomness
from kd_det.config.classes import find_training_classes, match_classes
from kd_det.config.detectors import check_student, guides_of, read_model_config, teachers_of
from kd_det.config.files import (
    DISTILL_HOOK,
    ConfigurationError,
    get_type_name,
    is_distillation,
    list_hooks,
    student_model,
)
from kd_det.registry import build_detector
from kd_det.teachers.guide import build_guide
from kd_det.teachers.loading import (
    ClassNamesError,
    check_some_fit,
    explain_model_errors,
    find_class_names,
    is_pretrained,
    load_strictly,
    remove_pretrained,
)

SET_TEACHER = ('Set it with --teacher-checkpoint where the command has that option, or with --cfg-options '
               'model.teacher.checkpoint=FILE')
EVALUATE_TEACHER = 'Evaluate it with kd-det test TEACHER_CONFIG CHECKPOINT'
NOISE_SIZE = (320, 320)  # pixels, an SSD's largest stride and more
RESUMED = ('ema_state_dict', 'distill', 'optimizer')  # what a resumed training reads beside the weights


def inspect_checkpoints(config: Config) -> Iterator[Finding]:
    """Whether the files of the teacher's and the student's initial weights exist; addresses are listed."""
    for name, teacher in guides_of(config):
        if 'type' in teacher:
            if teacher.get('checkpoint'):  # that it needs one, and a file, its kind says itself
                yield inspect_checkpoint(f'{name} checkpoint', teacher['checkpoint'], SET_TEACHER)
        elif teacher.get('checkpoint') and teacher.get('random_teacher'):
            yield Finding(f'{name} checkpoint', f"'{teacher['checkpoint']}' contradicts random_teacher=True",
                          'Remove one of the two', fault=True)
        elif teacher.get('checkpoint'):
            yield inspect_checkpoint(f'{name} checkpoint', teacher['checkpoint'], SET_TEACHER)
        elif not teacher.get('random_teacher'):
            yield Finding(f'{name} checkpoint', 'none is given', SET_TEACHER, fault=True)
    for checkpoint in _pretrained(student_model(config)):
        yield inspect_checkpoint('student init_cfg', checkpoint, 'Correct the init_cfg of the student')


def inspect_student(config: Config) -> Iterator[Finding]:
    """Whether the student of a distillation is a detector itself, and not what holds one."""
    try:
        if is_distillation(config):
            check_student(config.model.student, 'model.student')
    except ConfigurationError as error:
        yield Finding('student', str(error), 'Correct model.student', fault=True)


def inspect_start(config: Config) -> Iterator[Finding]:
    """Whether the checkpoint that is loaded or resumed exists."""
    if config.get('load_from'):
        yield inspect_checkpoint('checkpoint', config.load_from, 'Give the path of a checkpoint')


def inspect_start_weights(config: Config) -> Iterator[Finding]:
    """Builds the student and looks at how the checkpoint that is loaded or resumed fits, where that is a file."""
    checkpoint, resumes = config.get('load_from'), bool(config.get('resume'))
    if checkpoint and Path(checkpoint).is_file():
        try:
            student = build_detector(remove_pretrained(student_model(config)))
            check_checkpoint(student, checkpoint, whole=resumes, resumes=resumes)
        except Exception as error:  # whatever stops it here would stop the run
            yield Finding('checkpoint weights', str(error), 'Correct load_from, or leave it out', fault=True)


def inspect_teacher_classes(config: Config, names: Sequence[str] | None = None) -> Iterator[Finding]:
    """Which classes each teacher shares with the student: by name, or by their number where names are not known.

    Args:
        config: The config.
        names: See :func:`student_classes`.
    """
    expected, student = class_counts(student_model(config)), student_classes(config, names)
    preflight = any(hook.get('preflight') for hook in list_hooks(config) if get_type_name(hook) == DISTILL_HOOK)
    for name, teacher in teachers_of(config):
        try:
            found, names = known_classes(teacher)
        except ClassNamesError as error:
            yield Finding(f'{name} classes', str(error).rstrip('.'), 'Correct model.teacher.classes', fault=True)
            continue
        except (ValueError, OSError) as error:
            yield Finding(f'{name} config', str(error), "Give a config file, or 'mmdet::folder/file.py'", fault=True)
            continue
        if names and student:
            yield _shared(name, student, names, preflight)
        elif expected and found and expected != found:
            yield Finding(f'{name} classes', f'{_number(found)}, the student has {_number(expected)}',
                          "Name the teacher's classes, by label, with model.teacher.classes=[…]; or take a teacher of "
                          "the student's classes; one of others can teach features alone, with "
                          'default_hooks.distill.preflight=None', fault=preflight)


def known_classes(teacher: dict) -> tuple[set[int], Sequence[str] | None]:
    """How many classes a teacher's heads tell apart, and their names by label.

    Args:
        teacher: Its config within the distiller's.

    Returns:
        The numbers, and the names that its config, its checkpoint or ``classes`` tell; None where nothing does.

    Raises:
        ValueError: The config is none, or other names are given than it has classes.
        OSError: The config can not be read.
    """
    found = class_counts(read_model_config(teacher['config']))
    names = find_class_names(next(iter(found), None), teacher.get('classes', ()), _meta(teacher), teacher['config'])
    return found, names


def _shared(name: str, student: Sequence[str], teacher: Sequence[str], preflight: bool) -> Finding:
    try:
        return Finding(f'{name} classes', match_classes(student, teacher).report())
    except ConfigurationError as error:
        return Finding(f'{name} classes', str(error), 'To learn from its features alone, set '
                       'default_hooks.distill.preflight=None', fault=preflight)


def student_classes(config: Config, names: Sequence[str] | None = None) -> Sequence[str] | None:
    """The names of the student's classes, where they are as many as its heads tell apart.

    Args:
        config: The config.
        names: What the labels of the training data mean, where it was built; else what the config declares counts.
    """
    names = names or find_training_classes(config)
    return names if names and class_counts(student_model(config)) <= {len(names)} else None


def _meta(teacher: dict) -> dict:
    """What the teacher's checkpoint tells beside its weights, where it is a file that can be read."""
    checkpoint = teacher.get('checkpoint')
    if not checkpoint or not Path(checkpoint).is_file():
        return {}
    try:
        return load_checkpoint(checkpoint).get('meta') or {}
    except CheckpointError:
        return {}


def inspect_teacher_weights(config: Config) -> Iterator[Finding]:
    """Builds each teacher and loads its checkpoint where that is a file."""
    for name, teacher in guides_of(config):
        checkpoint = teacher.get('checkpoint')
        if checkpoint and Path(checkpoint).is_file():
            try:
                if 'type' in teacher:
                    fits = build_guide(teacher).try_weights()
                    if fits:
                        yield Finding(f'{name} weights', fits)
                    continue
                with explain_model_errors(teacher['config']):
                    model = build_detector(read_model_config(teacher['config']))
                load_strictly(model, checkpoint, teacher.get('allow_missing', ()), teacher.get('allow_unexpected', ()),
                              checkpoint_prefix=teacher.get('checkpoint_prefix'))
                broken = find_broken_levels(model)
                yield Finding(f'{name} weights', f'fit {type(model).__name__}') if not broken else Finding(
                    f'{name} weights', f'are finite, but its features of an image of noise are not: level {broken[0]}',
                    f'{EVALUATE_TEACHER}, and give one that detects', fault=True)
            except NotFiniteError as error:
                yield Finding(f'{name} weights', str(error), SET_TEACHER, fault=True)
            except Exception as error:  # whatever stops it here would stop the run
                yield Finding(f'{name} weights', str(error), 'Give config and checkpoint of the same model', fault=True)


@torch.no_grad()
def find_broken_levels(model: nn.Module) -> list[int]:
    """Finds the levels of a detector's features that are not finite, on an image of noise.

    Of a detector that asks for more than an image nothing is known.
    """
    with preserved_randomness(), suppress(Exception):
        data = model.eval().data_preprocessor(synthetic_batch(model, 1, NOISE_SIZE, 0), False)
        return [index for index, level in enumerate(model.extract_feat(data['inputs'])) if not level.isfinite().all()]
    return []


def _pretrained(node: object) -> Iterator[str]:
    """The checkpoints that a model dict names: of each ``init_cfg``, and each ``pretrained=``."""
    if isinstance(node, dict):
        named = node.get('checkpoint') if is_pretrained(node) else node.get('pretrained')
        if isinstance(named, str):
            yield named
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _pretrained(item)


def inspect_checkpoint(subject: str, checkpoint: str, remedy: str) -> Finding:
    """Whether the file of a checkpoint exists; an address is taken as it is."""
    if '://' in str(checkpoint):
        return Finding(subject, f'{checkpoint} (downloaded when first used)')
    if Path(checkpoint).is_file():
        return Finding(subject, str(checkpoint))
    return Finding(subject, f"there is no file '{checkpoint}'", remedy, fault=True)


def inspect_finite(subject: str, checkpoint: str) -> Iterator[Finding]:
    """Whether the weights of a checkpoint are finite, where it is a file that can be read."""
    with suppress(CheckpointError, OSError):
        loaded = load_checkpoint(checkpoint) if Path(checkpoint).is_file() else {}
        try:
            require_finite(dict(_list_tensors(loaded.get('state_dict', loaded))), checkpoint, 'teacher', ())
        except NotFiniteError as error:
            yield Finding(subject, str(error), SET_TEACHER, fault=True)


def _number(counts: set[int]) -> str:
    return ' and '.join(map(str, sorted(counts)))


def check_checkpoint(model: nn.Module, checkpoint: str, whole: bool, resumes: bool) -> None:
    """Checks that a checkpoint fits a student.

    A buffer that it lacks, as older versions of a module may have had none, keeps the value that the module gave it,
    and MMEngine names it; not so statistics that were learnt.

    Args:
        model: The student. Where the whole of it is asked for, that is loaded.
        checkpoint: A file, or an address that mmengine's ``CheckpointLoader`` knows.
        whole: Whether it must be of this detector; a training may start from that of another, of which something fits.
        resumes: Whether it must also tell where its training was.

    Raises:
        CheckpointError: It lacks weights, or has them in another shape, or not finite; or it lacks what tells where its
            training was, or what that needs is not finite. The message names them.
    """
    if not whole:
        check_some_fit(model, checkpoint)
        return
    constants = [name for name, _ in model.named_buffers() if not name.endswith(STATISTICS)]
    load_strictly(model, checkpoint, allow_missing=constants, allow_unexpected='*', role='student')
    if resumes:
        loaded = load_checkpoint(checkpoint)
        lacking = [f"meta['{key}']" for key in ('epoch', 'iter') if key not in loaded.get('meta', {})]
        lacking += ["'message_hub'"] if 'message_hub' not in loaded else []
        if lacking:
            raise CheckpointError(f"The checkpoint '{checkpoint}' can not be resumed: it has weights, but lacks "
                                  f"{', '.join(lacking)}, which MMEngine saves during training. To start a new "
                                  f"training from its weights, set load_from='{checkpoint}' and do not resume.")
        require_finite(dict(_list_tensors({key: loaded.get(key) for key in RESUMED})), checkpoint, 'student', ())


def _list_tensors(node: object, path: str = '') -> Iterator[tuple[str, Tensor]]:
    """The tensors within nested dicts and lists, each with its path."""
    if isinstance(node, Tensor):
        yield path, node
    elif isinstance(node, (dict, list, tuple)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _list_tensors(value, f'{path}.{key}' if path else str(key))
