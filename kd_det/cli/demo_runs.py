"""One training of the demo: done once, watched, and remembered."""
from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.progress import Progress

from kd_det.runner import build_runner

RESULT_FILE = 'result.json'


@dataclass(frozen=True)
class Run:
    """What came of a training.

    Attributes:
        identity: Hash of all that the run depends on; equal identities give equal results.
        start: Hash of the detector's weights before the first step.
        checkpoint: The trained detector.
        scalars: mmengine's log of losses and metrics.
        metrics: CocoMetric's numbers after the last epoch, 0 to 1.
        parameters: Number of the detector's parameters.
        seconds_per_iteration: Median over the training steps.
        epochs: Passes through the training images.
        iterations: Training steps.
    """
    identity: str
    start: str
    checkpoint: str
    scalars: str
    metrics: Dict[str, float]
    parameters: int
    seconds_per_iteration: float
    epochs: int
    iterations: int


def train_once(name: str, config: Config, inputs: Any, progress: Progress) -> Run:
    """Trains and evaluates, unless the same run was finished before.

    Args:
        name: Shown beside the progress.
        config: The config, with its work dir.
        inputs: What the result depends on beside the config (data, teacher); anything that JSON can hold.
        progress: Shows how far it is.
    """
    identity = _hash(json.dumps([config.to_dict(), inputs], sort_keys=True, default=str).encode())
    result_file = Path(config.work_dir, RESULT_FILE)
    if (run := _finished(result_file, identity)) is not None:
        progress.console.print(f"{name}: kept from before, mAP {100 * run.metrics['bbox_mAP']:.1f}")
        return run
    result_file.unlink(missing_ok=True)
    config.experiment_name = f'{name}_{time.time_ns()}'  # mmengine keeps loggers and visualizers by name
    config.visualizer.name = config.experiment_name
    runner = build_runner(config)
    watch = _Watch(name, progress)
    runner.register_hook(watch, priority='LOWEST')
    runner.train()
    detector = getattr(runner.model, 'student', runner.model)
    run = Run(
        identity=identity,
        start=watch.start,
        checkpoint=str(Path(config.work_dir, f'epoch_{runner.max_epochs}.pth')),
        scalars=os.path.relpath(Path(runner.log_dir, 'vis_data', 'scalars.json')),  # as the checkpoint, from here
        metrics=watch.metrics,
        parameters=sum(parameter.numel() for parameter in detector.parameters()),
        seconds_per_iteration=float(np.median(watch.seconds)),
        epochs=runner.max_epochs,
        iterations=runner.max_iters)
    partial = result_file.with_suffix('.partial')
    partial.write_text(json.dumps(asdict(run), indent=2))
    os.replace(partial, result_file)
    return run


def _finished(result_file: Path, identity: str) -> Optional[Run]:
    if not result_file.is_file():
        return None
    run = Run(**json.loads(result_file.read_text()))
    return run if run.identity == identity and Path(run.checkpoint).is_file() and Path(run.scalars).is_file() else None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Watch(Hook):
    """Shows the progress and takes notes."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.name, self.progress = name, progress
        self.seconds, self.metrics = [], {}

    def before_train(self, runner: Runner) -> None:
        state = runner.model.state_dict()  # of a distiller: the student's
        self.start = _hash(b''.join(key.encode() + value.cpu().numpy().tobytes() for key, value in state.items()))
        self.task = self.progress.add_task(self.name, total=runner.max_iters)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._began = time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.progress.advance(self.task)

    def after_train_epoch(self, runner: Runner) -> None:
        loss = runner.message_hub.get_scalar('train/loss').mean(len(runner.train_dataloader))
        pace = np.median(self.seconds)
        left = pace * (runner.max_iters - len(self.seconds))
        self._say(f'epoch {runner.epoch + 1}/{runner.max_epochs}, loss {loss:.3f}, {pace:.2f} s per iteration, '
                  f'about {left:.0f} s left')

    def after_val_epoch(self, runner: Runner, metrics: Optional[Dict[str, float]] = None) -> None:
        self.metrics = {name.split('/')[-1]: float(value) for name, value in metrics.items()}
        self._say(f"mAP {100 * self.metrics['bbox_mAP']:.1f}")

    def after_train(self, runner: Runner) -> None:
        self.progress.remove_task(self.task)

    def _say(self, text: str) -> None:
        self.progress.console.print(f'{self.name}: {text}', highlight=False)
