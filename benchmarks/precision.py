"""What a teacher's engine changes of its detections: its mAP on validation images, plain and under each option.

    python -m benchmarks.precision teacher.py teacher.pth --data-root /data/coco --out engine_precision.json

The teacher is fed as in the pre-flight. A file that is there already gets a row more. MMDetection rounds its metrics
to three digits, so pycocotools is asked for all of them.
"""
from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table

from kd_det.checks.preflight import evaluate_teacher
from kd_det.cli.common import add_config_options, apply_config_options
from kd_det.config.files import load_config
from kd_det.teachers import Teacher
from kd_det.training.runner import build_runner

ENGINES = dict(
    plain=dict(fuse=False, channels_last=False),
    default=dict(),
    bfloat16=dict(precision='bfloat16'),
    float16=dict(precision='float16'),
)


def measure(config: Config, checkpoint: str) -> dict:
    """COCO's AP and AP50, in points of 100, under each engine.

    Args:
        config: The teacher's, with validation data in COCO's format.
        checkpoint: Its weights.
    """
    points: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir, config.log_level = folder, 'ERROR'
        runner = build_runner(config)
        images = len(COCO(config.val_evaluator.ann_file).imgs)
        for name, engine in ENGINES.items():
            teacher = Teacher(config.model, checkpoint, taps=(), **engine,
                              student_preprocessor=runner.model.data_preprocessor)
            teacher.to_like(next(runner.model.parameters()))
            with contextlib.redirect_stdout(io.StringIO()):
                evaluate_teacher(runner, teacher, images, outfile_prefix=f'{folder}/found')
                points[name] = average_precision(COCO(f'{folder}/found.gt.json'), f'{folder}/found.bbox.json')
    return dict(images=images, points=points)


def average_precision(truth: COCO, results: str) -> dict[str, float]:
    """Over the classes that have a box."""
    evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(AP=100 * float(evaluation.stats[0]), AP50=100 * float(evaluation.stats[1]))


def table_of(row: dict) -> Table:
    table = Table(title=f"{row['config']}, {row['images']} images")
    for heading in ('engine', 'AP', 'less plain', 'AP50', 'less plain'):
        table.add_column(heading, justify='left' if heading == 'engine' else 'right')
    plain = row['points']['plain']
    for name, reached in row['points'].items():
        table.add_row(name, *(text for metric, value in reached.items()
                              for text in (f'{value:.2f}', f'{value - plain[metric]:+.2f}')))
    return table


def add_row(file: Path, row: dict) -> None:
    rows = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else []
    file.write_text(json.dumps([*rows, row], indent=2) + '\n', encoding='utf-8')


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help="the teacher's")
    parser.add_argument('checkpoint', help='its weights')
    add_config_options(parser)
    parser.add_argument('--out', type=Path, metavar='FILE', help='add the numbers to this JSON file')
    options: Namespace = parser.parse_args()

    config = load_config(options.config)
    apply_config_options(config, options)
    row = dict(config=options.config, checkpoint=Path(options.checkpoint).name, **measure(config, options.checkpoint),
               command=' '.join(['python -m benchmarks.precision', *sys.argv[1:]]), python=platform.python_version(),
               torch=torch.__version__, machine=platform.machine())
    Console().print(table_of(row))
    if options.out:
        add_row(options.out, row)


if __name__ == '__main__':
    main()
