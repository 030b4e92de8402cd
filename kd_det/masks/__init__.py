"""Where student and teacher are compared: registered modules over :mod:`kd_det.functional.masks`; they combine."""
from kd_det.masks.attention import ChannelAttention, SpatialAttention
from kd_det.masks.base import Mask, build_mask
from kd_det.masks.boxes import BoxBackground, BoxForeground
from kd_det.masks.combine import MaskProduct, MaskSum
from kd_det.masks.predictions import PredictionDifference, PredictionQuality, TeacherConfidence
from kd_det.masks.pyramid import LevelForeground, NearAnchorForeground
from kd_det.masks.queries import QueryConfidence
from kd_det.masks.regions import RoIPredictionDifference

__all__ = ['BoxBackground', 'BoxForeground', 'ChannelAttention', 'LevelForeground', 'Mask', 'MaskProduct', 'MaskSum',
           'NearAnchorForeground', 'PredictionDifference', 'PredictionQuality', 'QueryConfidence',
           'RoIPredictionDifference', 'SpatialAttention', 'TeacherConfidence', 'build_mask']
