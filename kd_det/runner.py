"""MMEngine's Runner for a config."""
from __future__ import annotations

from typing import Optional

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint

from kd_det.classes import metainfo_of
from kd_det.compat import log_operator_backend
from kd_det.scopes import add_nodes
from kd_det.teachers import load_strictly

STATISTICS = ('running_mean', 'running_var')  # buffers that training fills


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


def use_one_metainfo(loop: Optional[BaseLoop]) -> None:
    """Lets metrics and pictures of a loop have one ``metainfo`` where joined data sets have several, as with palettes of
    their own: MMDetection takes it for a dict, and would end after the last image of the first validation."""
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    if isinstance(getattr(dataset, 'metainfo', None), (list, tuple)):
        loop.runner.visualizer.dataset_meta = metainfo_of(dataset)
        if hasattr(loop, 'evaluator'):
            loop.evaluator.dataset_meta = metainfo_of(dataset)


def check_start(runner: Runner) -> None:
    """Checks that the checkpoint that is tested or resumed is of this detector: MMEngine loads what fits and goes on.

    A buffer that it lacks, as older versions of a module may have had none, keeps the value that the module gave it,
    and MMEngine names it; not so statistics that were learnt. A ``FlexibleRunner``, which has no model yet, goes
    unchecked.

    Raises:
        CheckpointError: It lacks weights, or has them in another shape; the message names them.
    """
    if not isinstance(runner, Runner):
        return
    checkpoint = runner._load_from or find_latest_checkpoint(runner.work_dir)
    model = runner.model
    while hasattr(model, 'module'):  # within wrappers for several processes, or for test-time augmentation
        model = model.module
    if checkpoint:
        given = [name for name, _ in model.named_buffers() if not name.endswith(STATISTICS)]
        load_strictly(model, checkpoint, allow_missing=given, allow_unexpected='*', role='student')
