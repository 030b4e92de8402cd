"""The file of a suite: YAML, whose keys are those of :class:`Suite` and, of each data set, of :class:`DataSet`."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Lengths, Name, Parts, Ratio, Seeds, at, check_arguments, refuse
from kd_det.config.choices import Split
from kd_det.config.layouts import list_sets


@dataclass(frozen=True)
class DataSet:
    """A data set of a suite, and the pair that trains on it. What it lacks the suite's own keys say.

    Attributes:
        name: Its name in tables, and its folder in the work dir.
        root: Its folder, within the suite's ``folder``; its name by default. Without a ``folder`` relative to the file,
            and where neither is given the data is that of the configs.
        pair: Config of a distillation; see :func:`~kd_det.study.benchmark.benchmark`, as for the following.
        student: Config of the student.
        teacher: Config of the teacher, or of several.
        teacher_checkpoint: Weights of the teacher, or of several; without any they are trained on the data.
        epochs: Of the students.
        teacher_epochs: Of the teachers that are trained.
        options: Settings of every student's config, by dotted key, beside the suite's.
    """
    name: Name
    root: Name | None = None
    pair: Name | None = None
    student: Name | None = None
    teacher: Name | Sequence[Name] | None = None
    teacher_checkpoint: Name | Sequence[Name] = ()
    epochs: Count | Lengths | None = None
    teacher_epochs: Count | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Suite:
    """What a suite's file says; the keys that a :class:`DataSet` has, too, hold for all that have none of their own.

    Attributes:
        datasets: The data sets, as dicts or by their names; all of the folder by default.
        folder: That holds them, relative to the file.
        methods: See :func:`~kd_det.study.benchmark.benchmark`, as for the following.
        seeds: How many, or which.
        balance: Ratio of each method's gradient to the task's.
        inherit: Parts of the students that start from the teacher's weights.
        fidelity: On which images to measure how closely the students follow the teacher.
        pair: Config of a distillation.
        student: Config of the student.
        teacher: Config of the teacher, or of several.
        teacher_checkpoint: Weights of the teacher, or of several.
        epochs: Of the students.
        teacher_epochs: Of the teachers that are trained.
        options: Settings of every student's config, by dotted key.
    """
    datasets: Sequence[Name | dict[str, Any]] | None = None
    folder: Name | None = None
    methods: Name | Sequence[Name] = 'none,kd,fgd,pkd'
    seeds: Count | Seeds = 3
    balance: Ratio | None = None
    inherit: Parts = 'auto'
    fidelity: Sequence[Split] = ()
    pair: Name | None = None
    student: Name | None = None
    teacher: Name | Sequence[Name] | None = None
    teacher_checkpoint: Name | Sequence[Name] = ()
    epochs: Count | Lengths | None = None
    teacher_epochs: Count | None = None
    options: dict[str, Any] | None = None


def read_suite_file(file: Path, given: Mapping[str, Any],
                    data_root: str | Path | None = None) -> tuple[Suite, list[DataSet]]:
    """Reads a suite's file.

    Args:
        file: Of YAML.
        given: What counts in place of the suite's own, by key.
        data_root: The folder that holds the data sets, in place of the suite's.

    Returns:
        What holds for all, and the data sets; names of files are as seen from here, and what a data set lacks is filled
        in.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: It is no YAML, or a key or a value does not fit; the message tells which.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no suite '{file}'.")
    try:
        content = yaml.safe_load(file.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, 'problem_mark', None)
        place = f' in line {mark.line + 1}' if mark else ''
        raise ConfigurationError(f"'{file}' is no YAML{place}: {getattr(error, 'problem', None) or error}.") from None
    try:
        if not isinstance(content, dict):
            refuse('', content, 'keys and values, such as datasets: […] and methods: none,fgd')
        check_arguments(Suite, content)
        common = Suite(**{**content, **given})
        folder = Path(data_root) if data_root is not None else _find(file, common.folder)
        if common.datasets is None and folder is None:
            refuse('datasets', None, 'the data sets, or a folder that holds them')
        named = ([dict(name=each.name) for each in list_sets(folder)] if common.datasets is None else
                 [dict(name=each) if isinstance(each, str) else each for each in common.datasets])
        sets = [_read_data_set(file, f'datasets[{index}]', each, common, folder) for index, each in enumerate(named)]
        names = [name_folder(each.name) for each in sets]
        if not names or len(set(names)) < len(names) or not all(name.strip('.') for name in names):
            refuse('datasets', names, 'data sets, no two of the same name, which is that of a folder')
    except ConfigurationError as error:
        raise ConfigurationError(f"'{file}': {error}") from None
    return common, sets


def _read_data_set(file: Path, place: str, content: dict[str, Any], common: Suite, folder: Path | None) -> DataSet:
    with at(place):
        check_arguments(DataSet, content)
    shared = {each.name: getattr(common, each.name) for each in fields(DataSet) if each.name not in ('name', 'root')}
    if content.get('pair'):  # of which no part is to be exchanged by the suite's
        shared.update(student=None, teacher=None, teacher_checkpoint=None)
    elif content.get('teacher'):
        shared.update(teacher_checkpoint=None)
    made = {**shared, **content, 'options': {**(common.options or {}), **(content.get('options') or {})}}
    for key in ('pair', 'student', 'teacher', 'teacher_checkpoint'):
        value = made.get(key) or ()
        made[key] = [_find_config(file, each) for each in ([value] if isinstance(value, str) else value)]
    root = made.get('root')
    if folder is not None:
        root = str(folder / (root or made['name']))
    elif root is not None:
        root = str(_find(file, root))
    return DataSet(**{**made, 'root': root, 'pair': next(iter(made['pair']), None),
                      'student': next(iter(made['student']), None), 'teacher': made['teacher'] or None})


def _find(file: Path, name: str | None) -> Path | None:
    """A path that is relative to the suite's file, as seen from here."""
    return None if name is None else Path(os.path.normpath(file.parent / name))


def _find_config(file: Path, name: str) -> str:
    """As :func:`_find`, of what may be ``'package::file.py'`` or an address, too."""
    return name if '::' in name or '://' in name else str(_find(file, name))


def name_folder(name: str) -> str:
    """The folder of a data set within the work dir."""
    return re.sub(r'[^\w.+-]', '_', name)
