"""Metrics of distillation beside mAP; registered in MMDetection's METRICS."""
from kd_det.evaluation.fidelity import FidelityMetric

__all__ = ['FidelityMetric']
