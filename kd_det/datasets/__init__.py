"""The demo's generated data set, and random augmentation that recurs."""

from kd_det.datasets.replay import ReplayedRandomness
from kd_det.datasets.scenes import CLASSES
from kd_det.datasets.shapes import generate_shapes

__all__ = ['CLASSES', 'ReplayedRandomness', 'generate_shapes']
