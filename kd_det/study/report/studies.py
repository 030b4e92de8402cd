"""The runs that a report tells of, as their work dirs hold them: configs, checkpoints, logs; and what is kept there."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmengine.config import Config

from kd_det.compat.writing import write_whole
from kd_det.config import ConfigurationError
from kd_det.config.detectors import teachers_of
from kd_det.config.files import get_type_name, is_distillation, load_config, student_model
from kd_det.distillers import build_schedule
from kd_det.study.fidelity import FIDELITY_FILE, Splits
from kd_det.study.identity import sha256
from kd_det.study.results import RESULTS_FILE, summarize, summarize_fidelity
from kd_det.study.runs import RESULT_FILE, check_run, check_shape, read_json
from kd_det.study.scheduling import CONFIG_FILE
from kd_det.study.variants import PLAIN
from kd_det.training.pictures import Curve

FOLDER = 'report'

Scalars = Mapping[str, Curve]


class TrainedRun(NamedTuple):
    """A training that has left something behind.

    Attributes:
        variant: The method in its setting; of a single training the name of its work dir.
        seed: Its seed.
        folder: Its work dir.
        config: What it was trained with.
        checkpoint: The trained detector; None if there is none.
        scalars: mmengine's logs, of the run and of those that resumed it, oldest first.
    """
    variant: str
    seed: int
    folder: Path
    config: Config
    checkpoint: Path | None
    scalars: list[Path]


@dataclass
class Study:
    """Runs that are told of together.

    Attributes:
        name: The work dir's.
        runs: All that have finished, or are single trainings.
        results: As in ``results.json`` of a benchmark, see :mod:`kd_det.study.results`; None for single trainings.
        notes: What is missing, in sentences.
    """
    name: str
    runs: list[TrainedRun]
    results: dict | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def variants(self) -> dict[str, list[TrainedRun]]:
        """The runs of each variant, by seed; the plain student first."""
        grouped: dict[str, list[TrainedRun]] = {}
        for run in sorted(self.runs, key=lambda run: (run.variant != self.plain, run.seed)):
            grouped.setdefault(run.variant, []).append(run)
        names = [self.plain, *dict.fromkeys(run.variant for run in self.runs)]
        return {name: grouped[name] for name in dict.fromkeys(names) if name in grouped}

    @property
    def plain(self) -> str | None:
        """What the others are shown beside: a benchmark's plain student, or the only run that distils nothing."""
        if self.results is not None:
            return PLAIN
        plain = [run.variant for run in self.runs if not is_distillation(run.config)]
        return plain[0] if len(plain) == 1 else None

    @property
    def teacher(self) -> dict | None:
        """``config`` and ``checkpoint`` of the teacher of the first run that has one; of several teachers the first."""
        for run in self.runs:
            for _, teacher in teachers_of(run.config):
                return dict(teacher)
        return None


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """Reads the runs of work dirs.

    Args:
        folders: Work dirs: of benchmarks, finished or not, each of which becomes a study; and of single trainings,
            which become one together.

    Raises:
        FileNotFoundError: There is no such folder.
        ConfigurationError: A folder holds neither.
    """
    studies, singles = [], []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no work dir '{folder}'.")
        if (folder / RESULTS_FILE).is_file():
            studies.append(_read_finished_benchmark(folder))
        elif _find_runs(folder):
            studies.append(_read_unfinished_benchmark(folder))
        else:
            singles.append(_read_training(folder))
    if singles:
        note = ('These are single trainings, not a benchmark: nothing tells whether they began alike and saw the same '
                'images, so no difference between them is claimed. kd-det benchmark makes runs that can be compared.')
        studies.append(Study(', '.join(run.variant for run in singles), singles, notes=[note]))
    return studies


def collect_term_curves(config: Config, scalars: list[Scalars]) -> dict[str, dict]:
    """Collects what was logged of each term, in the order of the config.

    Args:
        config: Of the runs.
        scalars: What each of them logged, see :func:`kd_det.training.pictures.read_scalars`.

    Returns:
        Term -> ``loss``: the weighted loss of each run; ``parts``: name -> the weighted part of each run; ``pull``: of
        each run that logged it the gradient of the weighted term, as a multiple of the task's; ``unweighted_pull``: the
        same without the weight, where a Balance's weight tells it, else None.
    """
    curves = {}
    for name, term in (config.model.get('distill') or {} if is_distillation(config) else {}).items():
        loss, prefix = f'loss_{name}', f'distill/{name}_'
        logged = [each for each in scalars if loss in each]
        if not logged:
            continue
        others = tuple(f'distill/{other}_' for other in config.model.distill if other.startswith(f'{name}_'))
        no_parts = (f'{prefix}weight', f'{prefix}gradient')
        parts = [key for key in logged[0]
                 if key.startswith(prefix) and key not in no_parts and not key.startswith(others)]
        curves[name] = dict(
            loss=[each[loss] for each in logged],
            parts={key[len(prefix):]: [each[key] for each in logged if key in each] for key in parts},
            pull=[each[f'{prefix}gradient'] for each in logged if f'{prefix}gradient' in each],
            unweighted_pull=_unweighted_pull(term.get('weight', 1.0), [each.get(f'{prefix}weight') for each in logged]))
    return curves


def collect_task_curves(scalars: list[Scalars], terms: list[str]) -> dict[str, list[Curve]]:
    """Collects the student's own losses, by name, of each run."""
    names = [key for key in (scalars[0] if scalars else ())
             if key.startswith('loss_') and key not in {f'loss_{term}' for term in terms}]
    return {name: [each[name] for each in scalars if name in each] for name in names}


def collect_policy_curves(scalars: list[Scalars]) -> dict[str, dict[str, list[Curve]]]:
    """Collects what a policy logged of each run: ``weights`` of its arms, and the student's ``score`` on the probe."""
    logged = {key.partition('/')[2]: [each[key] for each in scalars if key in each]
              for key in dict.fromkeys(key for each in scalars for key in each) if key.startswith('policy/')}
    score = logged.pop('probe', None)
    return dict(weights=logged, score={'score': score} if score else {})


def subtract_terms(scalars: Scalars, terms: list[str]) -> Curve:
    """Subtracts from the loss of a run what its terms added to it: what is left all variants have in common."""
    return {epoch: value - sum(scalars.get(f'loss_{term}', {}).get(epoch, 0.0) for term in terms)
            for epoch, value in scalars['loss'].items()}


def load_or_make(folder: Path, name: str, depends_on: Any, make: Callable[[], Any]) -> Any:
    """Loads what was kept beside a run, or makes and keeps it.

    Args:
        folder: The run's work dir; the file is ``report/<name>.json`` within.
        name: Of the file.
        depends_on: What it follows from, as JSON can hold it: with anything else it is made anew.
        make: Makes it; returns what JSON can hold.
    """
    file = folder / FOLDER / f'{name}.json'
    identity = _hash(depends_on)
    with suppress(ConfigurationError):  # what can not be read is made anew
        stored = read_json(file)
        if stored.get('identity') == identity and stored.get('checksum') == _hash(stored.get('content')):
            return stored['content']
    content = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(dict(identity=identity, checksum=_hash(content), content=content)))
    return content


def _hash(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=str).encode())


def identify_file(file: Path) -> list:
    """Tells a file from what it was before it was written again: returns its name, size and time."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


@dataclass
class Entry:
    """What is read of an element of ``runs`` in ``results.json``, beside its :class:`~kd_det.study.runs.Run`."""
    variant: str
    seed: int
    folder: str
    status: Literal['finished', 'failed', 'running', 'missing']


def _read_finished_benchmark(folder: Path) -> Study:
    file, notes = folder / RESULTS_FILE, []
    try:
        results = read_json(file)
        if not {'runs', 'summary', 'pair'} <= set(results):
            raise ConfigurationError(f"'{file}' is not that of kd-det benchmark.")
        check_shape(results['runs'], list, f"'{file}': runs")
    except ConfigurationError as error:
        if not _find_runs(folder):
            raise
        return _read_unfinished_benchmark(folder, f'{error} This is what its runs left.')
    entries, splits = [], []
    for index, entry in enumerate(results['runs']):
        try:
            check_shape(entry, Entry)
            if entry['status'] == 'finished':
                check_run(entry)
                check_shape(entry.get('fidelity', {}), Splits, 'fidelity')
        except ConfigurationError as error:
            notes.append(f"A run is left out, for '{file}' can not be read there: runs.{index}.{error}")
            continue
        entries.append(entry)
        splits += entry.get('fidelity', {})
        if entry['status'] != 'finished':
            notes.append(f"{entry['variant']}, seed {entry['seed']} {entry['status']}: {entry.get('error')}")
    teachers: dict = dict(teacher=None, further_teachers=[])
    try:
        if results.get('teacher') is not None:
            check_run(results['teacher'])
            check_shape(results.get('further_teachers', []), list[dict], 'further_teachers')
            for further in results.get('further_teachers', ()):
                check_run(further.get('run'))
            teachers = {name: results[name] for name in teachers if name in results}
    except ConfigurationError as error:
        notes.append(f"The teacher's run is left out, for '{file}' can not be read there: {error}")
    # What the file sums up follows from its runs, of which some may be left out.
    results = dict(results, **teachers, runs=entries, summary=summarize(entries),
                   fidelity=summarize_fidelity(entries, list(dict.fromkeys(splits))))
    return _make_study(folder, results, notes)


def _read_unfinished_benchmark(folder: Path, note: str = 'The benchmark has not finished, for there is no '
                               f'{RESULTS_FILE}: this is what has.') -> Study:
    entries, notes = [], [note]
    for run in _find_runs(folder):
        variant, seed = run.parent.name, int(run.name[len('seed'):])
        if not (run / RESULT_FILE).is_file():
            notes.append(f'{variant}, seed {seed} has not finished.')
            continue
        try:
            stored = read_json(run / RESULT_FILE)
            check_run(stored, f"'{run / RESULT_FILE}': ")
        except ConfigurationError as error:
            notes.append(f'{variant}, seed {seed} is left out: {error}')
            continue
        paths = {name: str(run.relative_to(folder) / stored[name]) for name in ('checkpoint', 'scalars')}
        entry = dict(stored, variant=variant, seed=seed, status='finished', folder=str(run.relative_to(folder)),
                     **paths)
        if (run / FIDELITY_FILE).is_file():
            try:
                measured = read_json(run / FIDELITY_FILE)
                check_shape(measured.get('splits'), Splits, f"'{run / FIDELITY_FILE}': splits")
                entry['fidelity'] = measured['splits']
            except ConfigurationError as error:
                notes.append(f'{variant}, seed {seed}: its fidelity is left out: {error}')
        entries.append(entry)
    entries.sort(key=lambda entry: entry['variant'] != PLAIN)
    splits = list(dict.fromkeys(split for entry in entries for split in entry.get('fidelity', {})))
    results = dict(teacher=None, runs=entries, summary=summarize(entries), fidelity=summarize_fidelity(entries, splits))
    return _make_study(folder, results, notes)


def _make_study(folder: Path, results: dict, notes: list[str]) -> Study:
    """A study of the runs that have finished; those whose config can not be read are in its table alone."""
    runs = []
    for entry in results['runs']:
        if entry['status'] == 'finished':
            try:
                runs.append(_read_run(folder, entry))
            except (ConfigurationError, OSError) as error:
                notes.append(f"{entry['variant']}, seed {entry['seed']}: its curves and boxes are left out: {error}")
    if not runs:
        raise ConfigurationError(f"'{folder}' has no run that has finished and can be read. " + ' '.join(notes))
    return Study(folder.resolve().name, runs, results, notes)


def _find_runs(folder: Path) -> list[Path]:
    """The folders of a benchmark's runs."""
    return sorted(path for path in folder.glob('*/seed*') if path.name[len('seed'):].isdecimal() and path.is_dir())


def _read_run(root: Path, entry: dict) -> TrainedRun:
    """Reads a finished run of a benchmark."""
    folder, checkpoint = root / entry['folder'], root / entry['checkpoint']
    config = load_config(folder / CONFIG_FILE)
    student_model(config)  # raises without a model
    return TrainedRun(entry['variant'], entry['seed'], folder, config, checkpoint if checkpoint.is_file() else None,
                      [root / entry['scalars']])


def _read_training(folder: Path) -> TrainedRun:
    logs = sorted(folder.glob('*/vis_data'))
    configs = [path / 'config.py' for path in reversed(logs) if (path / 'config.py').is_file()]
    if not configs:
        raise ConfigurationError(f"'{folder}' is no work dir of a benchmark (*/seed*/result.json) nor of a training "
                                 '(*/vis_data/config.py): give one that kd-det benchmark, distill or train wrote.')
    loaded, last = load_config(configs[0]), folder / 'last_checkpoint'
    student_model(loaded)
    name = last.read_text(encoding='utf-8', errors='replace').strip() if last.is_file() else ''
    checkpoint = folder / Path(name).name
    scalars = [path / 'scalars.json' for path in logs if (path / 'scalars.json').is_file()]
    return TrainedRun(folder.resolve().name, (loaded.get('randomness') or {}).get('seed') or 0, folder, loaded,
                      checkpoint if name and checkpoint.is_file() else None, scalars)


def _unweighted_pull(weight, logged: list[Curve | None]) -> list[Curve] | None:
    """Balance sets a weight of ratio · task / term, so that term / task is ratio / weight."""
    balanced = weight if isinstance(weight, dict) else {}
    if get_type_name(balanced) != 'Balance' or isinstance(balanced.get('ratio'), dict) or None in logged:
        return None
    ratio = build_schedule(balanced).full
    return [{epoch: ratio / value for epoch, value in curve.items() if value > 0} for curve in logged]
