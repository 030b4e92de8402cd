"""What there is to report: finds the runs in work dirs, of a benchmark or of single trainings."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from mmengine.config import Config

from kd_det.benchmark.fidelity import FIDELITY_FILE, summarize_fidelity
from kd_det.benchmark.results import summarize
from kd_det.benchmark.runs import RESULT_FILE
from kd_det.benchmark.scheduling import CONFIG_FILE
from kd_det.benchmark.variants import PLAIN
from kd_det.configuration import ConfigurationError, is_distillation, load_config


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
    checkpoint: Optional[Path]
    scalars: List[Path]


@dataclass
class Study:
    """Runs that are told of together.

    Attributes:
        name: The work dir's.
        runs: All that have finished, or are single trainings.
        results: As in ``results.json`` of a benchmark, see :mod:`kd_det.benchmark.results`; None for single trainings.
        notes: What is missing, in sentences.
    """
    name: str
    runs: List[TrainedRun]
    results: Optional[dict] = None
    notes: List[str] = field(default_factory=list)

    @property
    def variants(self) -> Dict[str, List[TrainedRun]]:
        """The runs of each variant, by seed; the plain student first."""
        grouped: Dict[str, List[TrainedRun]] = {}
        for run in sorted(self.runs, key=lambda run: (run.variant != self.plain, run.seed)):
            grouped.setdefault(run.variant, []).append(run)
        names = [self.plain, *dict.fromkeys(run.variant for run in self.runs)]
        return {name: grouped[name] for name in dict.fromkeys(names) if name in grouped}

    @property
    def plain(self) -> Optional[str]:
        """What the others are shown beside: a benchmark's plain student, or the only run that distils nothing."""
        if self.results is not None:
            return PLAIN
        plain = [run.variant for run in self.runs if not is_distillation(run.config)]
        return plain[0] if len(plain) == 1 else None

    @property
    def teacher(self) -> Optional[dict]:
        """``config`` and ``checkpoint`` of the teacher of the first run that has one; of several teachers the first."""
        for run in self.runs:
            if is_distillation(run.config):
                teacher = run.config.model.teacher
                return dict(teacher if isinstance(teacher, dict) else teacher[0])
        return None


def read_studies(folders: Sequence[Path]) -> List[Study]:
    """Finds the runs.

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
        if (folder / 'results.json').is_file():
            studies.append(_finished_benchmark(folder))
        elif list(folder.glob(f'*/seed*/{RESULT_FILE}')):
            studies.append(_unfinished_benchmark(folder))
        else:
            singles.append(_single_training(folder))
    if singles:
        note = ('These are single trainings, not a benchmark: nothing tells whether they began alike and saw the same '
                'images, so no difference between them is claimed. kd-det benchmark makes runs that can be compared.')
        studies.append(Study(', '.join(run.variant for run in singles), singles, notes=[note]))
    return studies


def _finished_benchmark(folder: Path) -> Study:
    results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    if not {'runs', 'summary', 'pair'} <= set(results):
        raise ConfigurationError(f"'{folder / 'results.json'}' is not that of kd-det benchmark.")
    results.setdefault('fidelity', {})
    finished = [entry for entry in results['runs'] if entry['status'] == 'finished']
    notes = [f"{entry['variant']}, seed {entry['seed']} failed: {entry['error']}" for entry in results['runs']
             if entry['status'] == 'failed']
    return Study(folder.resolve().name, [_run(folder, entry) for entry in finished], results, notes)


def _unfinished_benchmark(folder: Path) -> Study:
    entries, notes = [], ['The benchmark has not finished, for there is no results.json: this is what has.']
    for run in sorted(path for path in folder.glob('*/seed*') if path.is_dir()):
        variant, seed = run.parent.name, int(run.name[len('seed'):])
        if not (run / RESULT_FILE).is_file():
            notes.append(f'{variant}, seed {seed} has not finished.')
            continue
        stored = json.loads((run / RESULT_FILE).read_text(encoding='utf-8'))
        paths = {name: str(run.relative_to(folder) / stored[name]) for name in ('checkpoint', 'scalars')}
        entry = dict(stored, variant=variant, seed=seed, status='finished', folder=str(run.relative_to(folder)),
                     **paths)
        if (run / FIDELITY_FILE).is_file():
            entry['fidelity'] = json.loads((run / FIDELITY_FILE).read_text(encoding='utf-8'))['splits']
        entries.append(entry)
    entries.sort(key=lambda entry: entry['variant'] != PLAIN)
    splits = list(dict.fromkeys(split for entry in entries for split in entry.get('fidelity', {})))
    results = dict(teacher=None, runs=entries, summary=summarize(entries), fidelity=summarize_fidelity(entries, splits))
    return Study(folder.resolve().name, [_run(folder, entry) for entry in entries], results, notes)


def _run(root: Path, entry: dict) -> TrainedRun:
    """A finished run of a benchmark."""
    folder, checkpoint = root / entry['folder'], root / entry['checkpoint']
    return TrainedRun(entry['variant'], entry['seed'], folder, load_config(folder / CONFIG_FILE),
                      checkpoint if checkpoint.is_file() else None, [root / entry['scalars']])


def _single_training(folder: Path) -> TrainedRun:
    logs = sorted(folder.glob('*/vis_data'))
    config = next((path / 'config.py' for path in reversed(logs) if (path / 'config.py').is_file()), None)
    if config is None:
        raise ConfigurationError(f"'{folder}' is no work dir of a benchmark (*/seed*/result.json) nor of a training "
                                 '(*/vis_data/config.py): give one that kd-det benchmark, distill or train wrote.')
    loaded, last = load_config(config), folder / 'last_checkpoint'
    checkpoint = folder / Path(last.read_text(encoding='utf-8').strip()).name if last.is_file() else None
    scalars = [path / 'scalars.json' for path in logs if (path / 'scalars.json').is_file()]
    return TrainedRun(folder.resolve().name, (loaded.get('randomness') or {}).get('seed') or 0, folder, loaded,
                      checkpoint if checkpoint and checkpoint.is_file() else None, scalars)
