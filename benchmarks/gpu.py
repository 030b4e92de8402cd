"""All that only a GPU can show, in one run of at most eight minutes on one card: a table, and with --out a JSON.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --sections operators waits
    python -m benchmarks.gpu --dry                        # the same on the CPU with tiny sizes, for the script's sake

It needs neither data nor checkpoints nor a network: images and weights are random. The sections, in
benchmarks/gpu_checks.py and benchmarks/gpu_costs.py, run in a process of their own. What fails in one is recorded with
its traceback, and the others go on: also where it hangs, ends the process, or leaves the GPU unusable. Exit code 1 if
any failed, 2 if there is no GPU.
"""
from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

# The seconds that each may take, in the order in which they run.
SECTIONS = dict(operators=60, terms=60, amp=60, waits=60, losses=60, steps=120, stream=60, engine=150, resume=60)
MODULES = ('benchmarks.gpu_checks', 'benchmarks.gpu_costs')
NO_GPU = 2
TAIL = 6000  # characters of what a process has said when it ended too soon


class Found(NamedTuple):
    """What a check found: a line for the table, the numbers behind it, and why it failed if it did."""
    text: str
    numbers: Mapping[str, Any] = MappingProxyType({})
    failed: str = ''


class Check(NamedTuple):
    """One check of a section."""
    name: str
    call: Callable[[], Found]


@dataclass(frozen=True)
class Setting:
    """Where it is run: on the first GPU, or dry on the CPU."""
    dry: bool = False

    @property
    def device(self) -> str:
        return 'cpu' if self.dry else 'cuda'

    def choose(self, large: Any, small: Any) -> Any:
        """The first on a GPU, the second in a dry run."""
        return small if self.dry else large


Section = Callable[[Setting], Iterator[Check]]


def target(reached: bool, aim: str) -> str:
    """What is said of an aim; missing one is no failure."""
    return f" (target {aim}: {'reached' if reached else 'missed'})"


# ------------------------------------------------------------------------------------------ the process of the sections


def run_section(name: str, section: Section, setting: Setting) -> Iterator[dict]:
    """Runs the checks of a section one after another; a row for each.

    Raises:
        SystemExit: The GPU no longer answers.
    """
    checks = section(setting)
    while True:
        start, check, found = time.monotonic(), '', None
        try:
            following = next(checks, None)
            if following is None:
                return
            check = following.name
            found = following.call()
        except Exception:  # whatever it is, it is recorded
            found = Found('', failed=traceback.format_exc())
        seconds = time.monotonic() - start
        yield dict(section=name, check=check, text=found.text, seconds=seconds, failed=found.failed,
                   numbers=dict(found.numbers))
        if found.failed and not is_usable():
            yield dict(section=name, check='', text='', seconds=0.0, numbers={},
                       failed='The GPU no longer answers after that; the rest of the section was left out.')
            raise SystemExit(3)


def is_usable() -> bool:
    """Whether the GPU still answers: after some errors it does not, until the process ends."""
    torch = sys.modules.get('torch')
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def work(names: Sequence[str], setting: Setting, rows: Path, seconds: float, sections: dict[str, Section]) -> None:
    """Runs sections, and appends what happens to a file as lines of JSON.

    Args:
        names: Of the sections.
        setting: Where.
        rows: The file.
        seconds: That are left for all together. Where one takes longer than it may, the process ends, and says where
            it was. In a dry run each may take what is left.
        sections: The sections by name.
    """
    end = time.monotonic() + seconds

    def write(**row: Any) -> None:
        with rows.open('a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')

    for name in names:
        left = end - time.monotonic()
        faulthandler.dump_traceback_later(max(left if setting.dry else min(SECTIONS[name], left), 0.1), exit=True)
        for row in run_section(name, sections[name], setting):
            write(row=row)
            state = f"FAILED: {row['failed'].strip().splitlines()[-1]}" if row['failed'] else row['text']
            print(f"{name}, {row['check']}: {state}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        write(ended=name)
        gc.collect()


def load_sections() -> dict[str, Section]:
    """The sections by name; imports PyTorch and MMDetection."""
    modules = [importlib.import_module(name) for name in MODULES]
    return {name: next(getattr(module, name) for module in modules if hasattr(module, name)) for name in SECTIONS}


def describe_machine(setting: Setting) -> dict[str, Any]:
    """What it runs on, and the versions.

    Raises:
        SystemExit: There is no GPU, and it is no dry run.
    """
    import torch

    from kd_det.compat import operator_backend
    if not setting.dry and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    import torchvision
    found = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                 system=platform.platform(), cores=os.cpu_count(), operators=operator_backend())
    if not setting.dry:
        gpu = torch.cuda.get_device_properties(0)
        found.update(gpu=gpu.name, memory=gpu.total_memory, capability=f'{gpu.major}.{gpu.minor}',
                     cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    return found


# ----------------------------------------------------------------------------------------------- the process that asks


def run_all(names: Sequence[str], seconds: float, command: Sequence[str]) -> tuple[dict[str, Any], list[dict]]:
    """Runs sections in a process, and those that are left in another one where it ends too soon.

    Args:
        names: Of the sections.
        seconds: That all may take.
        command: Starts the process; it is given the names, the file for its rows, and the seconds left, see
            :func:`work`.

    Returns:
        The machine, and the rows.

    Raises:
        SystemExit: There is no GPU.
    """
    end, machine, rows, left = time.monotonic() + seconds, {}, [], list(names)
    while left:
        remaining = end - time.monotonic()
        if remaining < 1:
            rows += [failure(name, f'Left out: the {seconds:.0f} seconds were over.') for name in left]
            break
        with tempfile.TemporaryDirectory() as folder:
            file, errors = Path(folder, 'rows'), Path(folder, 'errors')
            file.touch()
            with errors.open('wb') as stream:
                code = subprocess.run([*command, '--sections', *left, '--rows', str(file), '--seconds', str(remaining)],
                                      stderr=stream).returncode
            lines = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
            said = errors.read_text(encoding='utf-8', errors='replace')[-TAIL:]
        if code == NO_GPU:
            raise SystemExit(NO_GPU)
        machine = next((line['machine'] for line in lines if 'machine' in line), machine)
        rows += [line['row'] for line in lines if 'row' in line]
        ended = [line['ended'] for line in lines if 'ended' in line]
        left = [name for name in left if name not in ended]
        if left:
            rows.append(failure(left[0], f'Its process ended with code {code}:\n{said}'))
            left = left[1:]
    return machine, rows


def failure(section: str, reason: str) -> dict:
    """The row of a section that did not come to its end."""
    return dict(section=section, check='', text='', seconds=0.0, failed=reason, numbers={})


def report(machine: dict[str, Any], rows: Sequence[dict]) -> None:
    """Prints the table, and below it the whole of what failed."""
    from rich.console import Console
    from rich.table import Table
    failed = [row for row in rows if row['failed']]
    caption = f'{len(rows) - len(failed)} of {len(rows)} checks passed'
    caption += f"; failed: {', '.join(dict.fromkeys(row['section'] for row in failed))}" if failed else ''
    table = Table(title=f"{machine.get('gpu', 'CPU, dry')}, PyTorch {machine.get('torch')}", caption=caption)
    for heading in ('section', 'check', 'seconds', 'found'):
        table.add_column(heading, justify='right' if heading == 'seconds' else 'left', overflow='fold')
    for row in rows:
        reason = row['failed'].strip().splitlines()[-1:] or ['']
        table.add_row(row['section'], row['check'], f"{row['seconds']:.1f}",
                      ' '.join([row['text'], f'FAILED: {reason[0]}' if row['failed'] else '']).strip())
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    for row in failed:
        console.print(f"\n{row['section']}, {row['check']} failed:\n{row['failed']}", highlight=False)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections that are asked for; returns the exit code."""
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument('--dry', action='store_true', help='on the CPU, with tiny sizes')
    parser.add_argument('--seconds', type=float, default=480, help='that all may take (480)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the numbers to this file, as JSON')
    parser.add_argument('--rows', type=Path, metavar='FILE', help='what its own process is started with')
    options = parser.parse_args(arguments)
    setting = Setting(options.dry)
    if options.rows:
        machine = describe_machine(setting)
        options.rows.write_text(json.dumps(dict(machine=machine)) + '\n', encoding='utf-8')
        work(options.sections, setting, options.rows, options.seconds, load_sections())
        return 0
    command = [sys.executable, '-m', 'benchmarks.gpu', *(['--dry'] if options.dry else [])]
    try:
        machine, rows = run_all(options.sections, options.seconds, command)
    except SystemExit:
        print('There is no GPU. The script itself is tried on the CPU with --dry.', file=sys.stderr)
        return NO_GPU
    report(machine, rows)
    if options.out:
        record = dict(command=' '.join(['python -m benchmarks.gpu', *(arguments or sys.argv[1:])]), machine=machine,
                      rows=rows)
        options.out.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
    return int(any(row['failed'] for row in rows))


if __name__ == '__main__':
    sys.exit(main())
