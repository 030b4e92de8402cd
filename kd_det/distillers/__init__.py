"""The student, seen from outside as an ordinary mmdet detector, plus its terms."""
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.weights import Balance, Decay, Start, Stop, Warmup, Weight, build_weight

__all__ = ['Balance', 'Decay', 'DetectionDistiller', 'Start', 'Stop', 'Warmup', 'Weight', 'build_weight']
