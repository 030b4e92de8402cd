"""User CPU time and memory of what should answer at once: imports, help, a wrong option.

    python -m benchmarks.startup --out docs/results/startup.json

Each is a process of its own; all take turns, round by round, after one that fills the caches of files. What else the
machine does weighs little on user time. That of ``import kd_det`` is told beside ``import torch``, and beside what a
program comes to that goes on to build one of its types.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

KD_DET = ['-m', 'kd_det']
TORCH = 'import torch'
PROGRAMS = {
    'nothing': ['-c', ''],
    TORCH: ['-c', TORCH],
    'import kd_det': ['-c', 'import kd_det'],
    'import kd_det, torch': ['-c', 'import kd_det, torch'],
    'import kd_det; a type': ['-c', "import kd_det; from mmdet.registry import MODELS; MODELS.get('FGD')"],
    'kd-det --help': [*KD_DET, '--help'],
    'kd-det --version': [*KD_DET, '--version'],
    'kd-det methods': [*KD_DET, 'methods'],
    'kd-det distill --help': [*KD_DET, 'distill', '--help'],
    'kd-det train --wrong': [*KD_DET, 'train', 'config.py', '--wrong'],
}
MEGABYTE = 2**20


def spend(arguments: Sequence[str]) -> tuple[float, int]:
    """User CPU seconds and largest resident memory in bytes of one process of this Python."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # it was waited for here
    return usage.ru_utime, usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def measure(rounds: int) -> list[dict]:
    """One row for each program, from that many rounds."""
    spent = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name, arguments in PROGRAMS.items():
            one = spend(arguments)
            if number:
                spent[name].append(one)
    rows = [dict(program=name, user_s=median(seconds for seconds, _ in each), fastest_s=min(each)[0],
                 memory=max(memory for _, memory in each)) for name, each in spent.items()]
    torch = next(row['user_s'] for row in rows if row['program'] == TORCH)
    return [dict(row, of_torch=row['user_s'] / torch) for row in rows]


def table_of(rows: Sequence[dict]) -> Table:
    table = Table(title='What should answer at once')
    for heading in ('program', 'user time, median', 'fastest', f'of {TORCH}', 'memory'):
        table.add_column(heading, justify='left' if heading == 'program' else 'right')
    for row in rows:
        table.add_row(row['program'], f"{row['user_s']:.2f} s", f"{row['fastest_s']:.2f} s", f"{row['of_torch']:.2f} ×",
                      f"{row['memory'] / MEGABYTE:.0f} MiB")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', type=Path, help='write the numbers to this file, as JSON')
    options = parser.parse_args()
    rows = measure(options.rounds)
    Console().print(table_of(rows))
    if options.out:
        from benchmarks.engine import processor  # imports PyTorch, whose memory the processes above would begin with
        command = ' '.join(['python -m benchmarks.startup', *sys.argv[1:]])
        machine = dict(processor=processor(), cores=os.cpu_count(), system=platform.platform())
        versions = dict(python=platform.python_version(), **{name: version(name) for name in ('torch', 'mmengine')})
        record = dict(command=command, settings=dict(rounds=options.rounds), versions=versions, machine=machine,
                      rows=rows)
        options.out.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
