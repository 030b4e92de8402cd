"""The student, seen from outside as an ordinary mmdet detector, plus its terms."""
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.rewards import Agent, Bandit
from kd_det.distillers.schedules import Balance, Decay, Schedule, SigmoidWarmup, Start, Stop, Warmup, build_schedule
from kd_det.distillers.turns import Confidence, Fixed, Random, Route, Sequence, Uniform

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['Agent', 'Balance', 'Bandit', 'Confidence', 'Decay', 'DetectionDistiller', 'Fixed', 'Random', 'Route',
           'Sequence', 'SigmoidWarmup', 'Start', 'Stop', 'Uniform', 'Warmup']
