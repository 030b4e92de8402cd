"""``--track``: sends logs to experiment trackers beside mmengine's own files, through its visualizer backends."""
from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

# Tracker -> (what to install, the module that has to be there).
PACKAGES = dict(tensorboard=('tensorboard', 'tensorboard'), wandb=('wandb', 'wandb'), mlflow=('mlflow', 'mlflow'))


def track(config: Config, trackers: Sequence[str], name: str | None = None) -> None:
    """Adds trackers to the backends of the config's visualizer; those that it has stay as they are.

    TensorBoard writes into the work dir, MLflow too (``mlflow.db``) unless ``MLFLOW_TRACKING_URI`` names a server;
    Weights & Biases asks for an account unless ``WANDB_MODE=offline``.

    Args:
        config: With its ``work_dir``; changed.
        trackers: Some of :data:`PACKAGES`.
        name: What Weights & Biases and MLflow call the run; that of its work dir by default.

    Raises:
        ConfigurationError: The tracker's package is not installed.
    """
    from kd_det.config.files import ConfigurationError, type_name
    from kd_det.registry import HOME
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
        package, module = PACKAGES[tracker]
        if find_spec(module) is None:
            raise ConfigurationError(f'--track {tracker}: its package is not installed: pip install {package}')
        if type_name(backends[tracker]) not in map(type_name, present):
            present.append(backends[tracker])
    config.visualizer.vis_backends = present
