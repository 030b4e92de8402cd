"""Where student and teacher are compared: registered modules over :mod:`kd_det.functional.masks`; they combine."""
from kd_det.masks.attention import ChannelAttention, SpatialAttention
from kd_det.masks.base import Mask, MaskProduct, MaskSum, build_mask
from kd_det.masks.boxes import BoxBackground, BoxForeground, LevelForeground, NearAnchorForeground
from kd_det.masks.predictions import (
           PredictionDifference,
           PredictionQuality,
           QueryConfidence,
           RoIPredictionDifference,
           TeacherConfidence,
)

__all__ = ['BoxBackground', 'BoxForeground', 'ChannelAttention', 'LevelForeground', 'Mask', 'MaskProduct', 'MaskSum',
           'NearAnchorForeground', 'PredictionDifference', 'PredictionQuality', 'QueryConfidence',
           'RoIPredictionDifference', 'SpatialAttention', 'TeacherConfidence', 'build_mask']
