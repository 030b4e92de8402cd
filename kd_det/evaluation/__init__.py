"""Metrics of distillation beside mAP; registered in MMDetection's METRICS."""
from kd_det.evaluation.fidelity import FidelityMetric
from kd_det.evaluation.measuring import SPLITS, measure_fidelity

__all__ = ['SPLITS', 'FidelityMetric', 'measure_fidelity']
