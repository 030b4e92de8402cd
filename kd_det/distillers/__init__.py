"""The student, seen from outside as an ordinary mmdet detector, plus its terms."""
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.weights import Decay, Stop, Warmup, build_weight

__all__ = ['Decay', 'DetectionDistiller', 'Stop', 'Warmup', 'build_weight']
