"""FidelityHook: shows the student's modules to the metric that looks inside."""
from __future__ import annotations

from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from kd_det.evaluation import FidelityMetric


@HOOKS.register_module()
class FidelityHook(Hook):
    """Shows the model of the run to every :class:`~kd_det.evaluation.FidelityMetric` of its evaluators.

    A metric of mmengine gets detections alone; with this hook ``class_kl`` and ``cka_<stride>`` are measured too.
    """

    def before_val(self, runner: Runner) -> None:
        _attach(runner, runner.val_evaluator)

    def before_test(self, runner: Runner) -> None:
        _attach(runner, runner.test_evaluator)


def _attach(runner: Runner, evaluator) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for metric in evaluator.metrics:
        if isinstance(metric, FidelityMetric):
            metric.attach(model)
