"""Builds MMEngine's Runner for a config, and checks what it would only find out late, or not at all."""
from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from itertools import count
from pathlib import Path
from token import COMMENT
from tokenize import TokenError, tokenize

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner

from kd_det.checks.checkpoints import check_checkpoint
from kd_det.compat import log_operator_backend
from kd_det.compat.writing import refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.config.classes import get_metainfo
from kd_det.config.files import get_type_name
from kd_det.registry import HOME, add_nodes
from kd_det.teachers.loading import find_weights
from kd_det.training.finiteness import add_finite_hook
from kd_det.training.saving import choose_checkpoint, keep_checkpoints_whole


def build_runner(config: Config) -> Runner:
    """Builds the runner that the config asks for, within the config's own scope.

    Raises:
        WritingError: It would save its config over one that somebody wrote by hand.
    """
    if config.filename:
        refuse_to_replace(find_saved_config(config), is_saved_config, 'a config of a run',
                          advice='Give another --work-dir: a run saves its config there, under that name.')
    setup_cache_size_limit_of_dynamo()
    if config.get('default_scope'):
        add_nodes(config.default_scope)
    _rename_visualizer(config)
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    log_operator_backend()  # into the log that the runner has opened
    add_finite_hook(runner)
    keep_checkpoints_whole(runner)
    return runner


def find_saved_config(config: Config) -> Path:
    """Finds where MMEngine's Runner saves a config that has a file name, written in full."""
    return Path(config.work_dir, Path(config.filename).name)


def is_saved_config(content: bytes) -> bool:
    """Tells what a Runner has saved from what somebody wrote: sorted assignments, without a comment or a base."""
    try:
        nodes = ast.parse(content).body
        comments = any(token.type == COMMENT for token in tokenize(BytesIO(content).readline))
    except (SyntaxError, ValueError, TokenError):
        return False
    names = [ast.unparse(node.targets[0]) for node in nodes if isinstance(node, ast.Assign)]
    return not comments and len(names) == len(nodes) and names == sorted(names) and '_base_' not in names


_visualizers: set[str] = set()  # the names of those of earlier runs of this process


def _rename_visualizer(config: Config) -> None:
    """Gives a visualizer another name where an earlier run of this process had the same.

    MMEngine keeps visualizers by name, and this run would log into the folder of that one.
    """
    name = (config.get('visualizer') or {}).get('name')
    if name is not None:
        if name in _visualizers:
            config.visualizer.name = next(each for each in (f'{name}_{number}' for number in count(2))
                                          if each not in _visualizers)
        _visualizers.add(config.visualizer.name)


# What MMEngine reads of each process that a launcher starts, and what sets it; those of NUMBERS are numbers.
LAUNCHED_WITH = dict(
    pytorch=(('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'), 'torchrun --nproc_per_node=GPUS -m '
             'kd_det …'),
    slurm=(('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'), 'srun'),
    mpi=(('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'MASTER_ADDR'), 'mpirun (and '
         'MASTER_ADDR, the address of the first machine, yourself)'))
LOCAL_NUMBERS = dict(pytorch='LOCAL_RANK', slurm='SLURM_LOCALID', mpi='OMPI_COMM_WORLD_LOCAL_RANK')
NUMBERS = ('RANK', 'SIZE', 'PROCID', 'NTASKS', 'PORT')


def check_launcher(launcher: str) -> None:
    """Checks that this process was started as one of several, where it is to be one.

    Raises:
        ConfigurationError: What its launcher would have told it is not there, or can not be; or it has no GPU.
    """
    if launcher == 'none' or torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    if launcher not in LAUNCHED_WITH:
        raise ConfigurationError(f"--launcher: expected none, {', '.join(LAUNCHED_WITH)}, got '{launcher}'.")
    names, program = LAUNCHED_WITH[launcher]
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigurationError(f"--launcher {launcher}: there is no environment variable {', '.join(missing)}. Start "
                                 f'the processes with {program}, or leave the option out.')
    for name in names:
        if name.endswith(NUMBERS) and not os.environ[name].isdecimal():
            raise ConfigurationError(f"--launcher {launcher}: expected a number in the environment variable {name}, "
                                     f"got '{os.environ[name]}'.")
    rank, size = (int(os.environ[name]) for name in names[:2])
    if rank >= size:
        raise ConfigurationError(f'--launcher {launcher}: expected {names[0]} below {names[1]}, got {rank} of {size}.')
    if get_device() == 'cpu':
        raise ConfigurationError(f'--launcher {launcher}: each process needs a GPU, and there is none. Leave the '
                                 'option out to train on the CPU.')
    local = os.environ.get(LOCAL_NUMBERS[launcher], '0')
    if get_device() == 'cuda' and int(local) >= torch.cuda.device_count():
        raise ConfigurationError(f'--launcher {launcher}: this is process {local} of this machine, counted from 0, '
                                 f'which has {torch.cuda.device_count()} GPUs. Start one process for each.')


def build_optimizer(runner: Runner) -> None:
    """Builds the optimizer, which a Runner does much later, so that a mistake in its config is told at once.

    A ``FlexibleRunner`` leaves it, and the model, to its strategy: there nothing is done.
    """
    if isinstance(runner, Runner):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)


@contextmanager
def ended_workers(runner: Runner) -> Iterator[None]:
    """Ends the persistent workers of a runner's loaders when the block ends.

    Else they live on until the runner, which is part of a cycle, is collected; the queues by which PyTorch tells them
    to end may be collected before, and then it waits 5 s for each of them.
    """
    try:
        yield
    finally:
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            loader = getattr(loop, 'dataloader', None)
            iterator = getattr(loader, '_iterator', None)  # there while workers are persistent
            if hasattr(iterator, '_shutdown_workers'):
                iterator._shutdown_workers()
                loader._iterator = None


def use_one_metainfo(loop: BaseLoop | None) -> None:
    """Lets metrics and pictures of a loop have one ``metainfo`` where joined data sets have several.

    They do where each has a palette of its own. MMDetection takes it for a dict, and would end after the last image of
    the first validation.
    """
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    if loop is not None and isinstance(getattr(dataset, 'metainfo', None), (list, tuple)):
        loop.runner.visualizer.dataset_meta = get_metainfo(dataset)
        if hasattr(loop, 'evaluator'):
            loop.evaluator.dataset_meta = get_metainfo(dataset)


def add_trackers(config: Config, trackers: Sequence[str], name: str | None = None) -> None:
    """Adds trackers to the backends of the config's visualizer; those that it has stay as they are.

    TensorBoard writes into the work dir, MLflow too (``mlflow.db``) unless ``MLFLOW_TRACKING_URI`` names a server;
    Weights & Biases asks for an account unless ``WANDB_MODE=offline``.

    Args:
        config: With its ``work_dir``; changed.
        trackers: Some of :data:`~kd_det.config.choices.TRACKERS`.
        name: What Weights & Biases and MLflow call the run; that of its work dir by default.

    Raises:
        ConfigurationError: The tracker's package is not installed.
    """
    work_dir = Path(config.work_dir).resolve()
    name = name or work_dir.name
    backends = dict(
        tensorboard=dict(type='TensorboardVisBackend'),
        wandb=dict(type='WandbVisBackend', init_kwargs=dict(project='kd_det', name=name)),
        # A parameter of MLflow is a short text, a config is not: MMEngine stores the whole of it as config.py.
        mlflow=dict(type='MLflowVisBackend', exp_name='kd_det', run_name=name, tracked_config_keys=(),
                    tracking_uri=os.environ.get('MLFLOW_TRACKING_URI', f'sqlite:///{work_dir}/mlflow.db'),
                    artifact_location=None if 'MLFLOW_TRACKING_URI' in os.environ else str(work_dir / 'mlflow')))
    if not config.get('visualizer'):
        config.visualizer = dict(type=f'{HOME}.DetLocalVisualizer', name='visualizer')
    present = list(config.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ConfigurationError(f'--track {tracker}: its package is not installed: pip install {tracker}')
        if get_type_name(backends[tracker]) not in map(get_type_name, present):
            present.append(backends[tracker])
    config.visualizer.vis_backends = present


def check_start(runner: Runner, whole: bool = True) -> None:
    """Checks the checkpoint that is tested, resumed or started from: MMEngine loads what fits and goes on.

    A run that goes on from its work dir does so from the newest checkpoint that is whole. Weights that a wrapper
    renamed, or that stand elsewhere in the file than MMEngine looks, are put where it does. A ``FlexibleRunner``, which
    has no model yet, goes unchecked.

    Args:
        runner: The runner.
        whole: See :func:`~kd_det.checks.checkpoints.check_checkpoint`.

    Raises:
        CheckpointError: See :func:`~kd_det.checks.checkpoints.check_checkpoint` and
            :func:`~kd_det.training.saving.choose_checkpoint`.
    """
    if not isinstance(runner, Runner):
        return
    choose_checkpoint(runner)
    checkpoint = runner._load_from
    model = runner.model
    while hasattr(model, 'module'):  # within wrappers for several processes, or for test-time augmentation
        model = model.module
    if checkpoint:
        check_checkpoint(model, checkpoint, whole, runner._resume)
        runner.register_hook(FindWeightsHook(), priority='HIGHEST')


class FindWeightsHook(Hook):
    """Puts the weights of a checkpoint where MMEngine looks for them, before other hooks and the model get it."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['state_dict'] = find_weights(checkpoint, str(runner._load_from), 'student', None, ())
