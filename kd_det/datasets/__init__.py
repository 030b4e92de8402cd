"""The demo's generated data set, random augmentation that recurs, and images that nobody labelled."""

from kd_det.datasets.replay import ReplayedRandomness
from kd_det.datasets.scenes import CLASSES
from kd_det.datasets.shapes import generate_shapes
from kd_det.datasets.unlabelled import Unlabelled

__all__ = ['CLASSES', 'ReplayedRandomness', 'Unlabelled', 'generate_shapes']
