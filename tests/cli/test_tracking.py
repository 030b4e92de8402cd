"""``--track``: what a run logs arrives in the trackers, without a network."""
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from kd_det.config.files import ConfigurationError
from kd_det.training import runner
from kd_det.training.runner import add_trackers


@pytest.fixture
def tracked_run(run_config, retinanet, monkeypatch):
    """Trains a tiny distillation with a tracker; returns its work dir."""
    def run(tracker: str) -> Path:
        config = run_config(
            dict(type='DetectionDistiller', student=retinanet(),
                 teacher=dict(config=retinanet(depth=50), random_teacher=True),
                 distill=dict(features=dict(type='PKD', tap='neck', weight=1.0))),
            epochs=1, name=tracker)
        config.default_hooks.logger = dict(type='LoggerHook', interval=1)
        config.pop('visualizer')
        add_trackers(config, [tracker])
        config.visualizer.name = config.work_dir
        runner = Runner.from_cfg(config)
        runner.train()
        return Path(config.work_dir)

    return run


def test_tensorboard_holds_losses_and_parts(tracked_run):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    file, = tracked_run('tensorboard').rglob('events.out.*')
    events = EventAccumulator(str(file))
    events.Reload()
    tags = events.Tags()['scalars']
    assert {'loss', 'loss_cls', 'loss_features', 'distill/features_pearson'} <= set(tags)
    assert all(event.value > 0 for event in events.Scalars('distill/features_pearson'))


def test_mlflow_holds_losses_parts_and_the_config(tracked_run, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    folder = tracked_run('mlflow')
    run, = mlflow.search_runs(experiment_names=['kd_det'], output_format='list')
    assert {'loss', 'loss_features', 'distill/features_pearson'} <= set(run.data.metrics)
    assert [file for file in folder.rglob('config.py')]


def test_wandb_writes_a_run_offline(tracked_run, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    assert [file for file in tracked_run('wandb').rglob('*.wandb') if file.stat().st_size > 0]


def test_backends_that_the_config_has_stay():
    own = dict(type='TensorboardVisBackend', save_dir='elsewhere')
    config = Config(dict(work_dir='work_dirs/run', visualizer=dict(type='Visualizer', vis_backends=[own])))
    add_trackers(config, ['tensorboard'])
    assert config.visualizer.vis_backends == [own]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(runner, 'find_spec', lambda module: None)
    with pytest.raises(ConfigurationError, match='--track mlflow.*pip install mlflow'):
        add_trackers(Config(dict(work_dir='run')), ['mlflow'])
