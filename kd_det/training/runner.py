"""MMEngine's Runner for a config."""
from __future__ import annotations

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint

from kd_det.checks.checkpoints import check_checkpoint
from kd_det.compat import log_operator_backend
from kd_det.config.classes import metainfo_of
from kd_det.registry import add_nodes
from kd_det.teachers.loading import find_weights


def build_runner(config: Config) -> Runner:
    """Builds the runner that the config asks for, within the config's own scope."""
    setup_cache_size_limit_of_dynamo()
    if config.get('default_scope'):
        add_nodes(config.default_scope)
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    log_operator_backend()  # into the log that the runner has opened
    return runner


def build_optimizer(runner: Runner) -> None:
    """Builds the optimizer, which a Runner does much later, so that a mistake in its config is told at once.

    A ``FlexibleRunner`` leaves it, and the model, to its strategy: there nothing is done.
    """
    if isinstance(runner, Runner):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)


def use_one_metainfo(loop: BaseLoop | None) -> None:
    """Lets metrics and pictures of a loop have one ``metainfo`` where joined data sets have several.

    They have as with palettes of their own. MMDetection takes it for a dict, and would end after the last image of the
    first validation.
    """
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    if isinstance(getattr(dataset, 'metainfo', None), (list, tuple)):
        loop.runner.visualizer.dataset_meta = metainfo_of(dataset)
        if hasattr(loop, 'evaluator'):
            loop.evaluator.dataset_meta = metainfo_of(dataset)


def check_start(runner: Runner, whole: bool = True) -> None:
    """Checks the checkpoint that is tested, resumed or started from: MMEngine loads what fits and goes on.

    Weights that a wrapper renamed, or that stand elsewhere in the file than MMEngine looks, are put where it does. A
    ``FlexibleRunner``, which has no model yet, goes unchecked.

    Args:
        runner: The runner.
        whole: See :func:`~kd_det.checks.checkpoints.check_checkpoint`.

    Raises:
        CheckpointError: See :func:`~kd_det.checks.checkpoints.check_checkpoint`.
    """
    if not isinstance(runner, Runner):
        return
    checkpoint = runner._load_from or (find_latest_checkpoint(runner.work_dir) if whole else None)
    model = runner.model
    while hasattr(model, 'module'):  # within wrappers for several processes, or for test-time augmentation
        model = model.module
    if checkpoint:
        check_checkpoint(model, checkpoint, whole, runner._resume)
        runner.register_hook(WeightsHook(), priority='HIGHEST')


class WeightsHook(Hook):
    """Puts the weights of a checkpoint where MMEngine looks for them, before other hooks and the model are given it."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['state_dict'] = find_weights(checkpoint, str(runner._load_from), 'student', None, ())
