"""Where to look: weights over the cells or the channels of a feature map.

Cell masks are (N, H, W), channel masks (N, C). Boxes are one ``(n, 4)`` tensor per image, ``x1, y1, x2, y2`` in pixels
of the padded batch; ``n`` may be 0. Attentions are differentiable, all other masks carry no gradient.
"""
from kd_det.functional.masks.attention import channel_attention, spatial_attention, spatial_softmax
from kd_det.functional.masks.foreground import box_foreground, normalized_background, region_foreground, valid_cells
from kd_det.functional.masks.predictions import prediction_difference, prediction_quality, teacher_confidence
from kd_det.functional.masks.pyramid import assign_levels, level_foreground, near_anchor_foreground, valuable_region

__all__ = [
    'assign_levels', 'box_foreground', 'channel_attention', 'level_foreground', 'near_anchor_foreground',
    'normalized_background', 'prediction_difference', 'prediction_quality', 'region_foreground', 'spatial_attention',
    'spatial_softmax', 'teacher_confidence', 'valid_cells', 'valuable_region'
]
