"""The demo's generated data set."""

from kd_det.datasets.scenes import CLASSES
from kd_det.datasets.shapes import generate_shapes

__all__ = ['CLASSES', 'generate_shapes']
