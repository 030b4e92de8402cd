"""The student, seen from outside as an ordinary mmdet detector, plus its terms."""
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.schedules import Balance, Decay, Schedule, Start, Stop, Warmup, build_schedule

__all__ = ['Balance', 'Decay', 'DetectionDistiller', 'Schedule', 'Start', 'Stop', 'Warmup', 'build_schedule']
