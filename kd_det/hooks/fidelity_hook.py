"""FidelityHook: shows the student's modules, and what labels mean, to the metric that looks inside."""
from __future__ import annotations

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner

from kd_det.classes import label_names, metainfo_of
from kd_det.evaluation import FidelityMetric


@HOOKS.register_module()
class FidelityHook(Hook):
    """Shows the model of the run to every :class:`~kd_det.evaluation.FidelityMetric` of its evaluators.

    A metric of mmengine gets detections alone; with this hook ``class_kl`` and ``cka_<stride>`` are measured too, and
    classes are matched by what the labels of the data mean, see :func:`~kd_det.classes.read_label_names`.
    """

    def before_val(self, runner: Runner) -> None:
        _attach(runner, runner.val_loop)

    def before_test(self, runner: Runner) -> None:
        _attach(runner, runner.test_loop)


def _attach(runner: Runner, loop: BaseLoop) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for metric in loop.evaluator.metrics:
        if isinstance(metric, FidelityMetric):
            metric.attach(model)
            metric.dataset_meta = dict(metainfo_of(loop.dataloader.dataset), classes=label_names(loop.dataloader.dataset))
