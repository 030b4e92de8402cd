"""The student, seen from outside as an ordinary mmdet detector, plus its terms."""
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.schedules import Balance, Decay, Schedule, SigmoidWarmup, Start, Stop, Warmup, build_schedule

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['Balance', 'Decay', 'DetectionDistiller', 'SigmoidWarmup', 'Start', 'Stop', 'Warmup']
