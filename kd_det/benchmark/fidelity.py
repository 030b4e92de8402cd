"""The fidelity of the students that a benchmark trained: measured once for each, and summed up over seeds."""
from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Callable, Dict, List, Sequence

from mmdet.utils import register_all_modules

from kd_det.benchmark.pair import weights_hash
from kd_det.benchmark.scheduling import CONFIG_FILE
from kd_det.benchmark.statistics import mean_and_std
from kd_det.configuration import load_config
from kd_det.evaluation import FidelityMetric, measure_fidelity
from kd_det import __version__

FIDELITY_FILE = 'fidelity.json'


def add_fidelity(entries: List[dict], root: Path, teacher: dict, splits: Sequence[str],
                 say: Callable[[str], None]) -> None:
    """Adds ``fidelity`` to every finished run of ``results.json``: split -> number -> value.

    What was measured lies beside ``result.json``, with all that it depends on, and is kept while that is the same: the
    identity of the run (in a plain student's there is no teacher), the teacher, and version and settings of the metric.

    Args:
        entries: The runs; changed.
        root: The work dir of the benchmark.
        teacher: ``config`` and ``checkpoint``.
        splits: ``'val'`` and ``'train'``, or one of them; none to measure nothing.
        say: Told what is measured.
    """
    if not splits:
        return
    register_all_modules(init_default_scope=True)
    metric = dict(teacher=dict(config=teacher['config'], checkpoint_hash=weights_hash(teacher['checkpoint'])),
                  settings=dict(FidelityMetric(teacher).settings, kd_det=__version__))
    for entry in entries:
        if entry['status'] != 'finished':
            continue
        file = root / entry['folder'] / FIDELITY_FILE
        of = dict(identity=entry['identity'], **metric)
        stored = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
        measured = stored['splits'] if {key: stored.get(key) for key in of} == of else {}
        for split in splits:
            if split not in measured:
                say(f"{entry['variant']}, seed {entry['seed']}: fidelity on {split}")
                config = load_config(file.parent / CONFIG_FILE)
                with redirect_stdout(StringIO()):  # of pycocotools
                    measured[split] = measure_fidelity(config, str(root / entry['checkpoint']), teacher, split)
                file.write_text(json.dumps(dict(of, splits=measured), indent=2) + '\n', encoding='utf-8')
        entry['fidelity'] = {split: measured[split] for split in splits}


def summarize_fidelity(entries: Sequence[dict], splits: Sequence[str]) -> Dict[str, Dict[str, Dict[str, dict]]]:
    """Split -> variant -> number -> mean and standard deviation over the seeds that have it."""
    values: Dict[str, Dict[str, Dict[str, list]]] = {split: {} for split in splits}
    for entry in entries:
        for split, numbers in entry.get('fidelity', {}).items():
            by_name = values[split].setdefault(entry['variant'], {})
            for name, value in numbers.items():
                by_name.setdefault(name, []).append(value)
    return {split: {variant: {name: mean_and_std(each) for name, each in by_name.items()}
                    for variant, by_name in variants.items()} for split, variants in values.items()}
