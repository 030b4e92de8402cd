"""Trains configs one after the other: ``train_each.py CONFIG EPOCHS …``, each interrupted after so many, 0 for not."""
import multiprocessing
import sys
from contextlib import nullcontext, suppress

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from kd_det.training.runner import ended_workers


class StopAfter(Hook):
    """Ends a run before the epoch after so many, as a user's Ctrl-C would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def before_train_epoch(self, runner) -> None:
        if runner.epoch == self.epochs:
            raise KeyboardInterrupt


if __name__ == '__main__':
    for config, epochs in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
        runner = Runner.from_cfg(Config.fromfile(config))
        if epochs:
            runner.register_hook(StopAfter(epochs), priority='LOWEST')
        with ended_workers(runner), suppress(KeyboardInterrupt) if epochs else nullcontext():
            runner.train()
        assert not multiprocessing.active_children()
