"""Where to look: weights over the cells or the channels of a feature map.

Cell masks are (N, H, W), channel masks (N, C). Boxes are one ``(n, 4)`` tensor per image, ``x1, y1, x2, y2`` in pixels
of the padded batch; ``n`` may be 0. Attentions are differentiable, all other masks carry no gradient.
"""
# "as": to be imported from here by the other rooms, but no public names.
from kd_det.functional.masks.attention import attend_to_cells as attend_to_cells
from kd_det.functional.masks.attention import attend_to_channels as attend_to_channels
from kd_det.functional.masks.attention import channel_attention as channel_attention
from kd_det.functional.masks.attention import spatial_attention as spatial_attention
from kd_det.functional.masks.attention import spatial_softmax as spatial_softmax
from kd_det.functional.masks.foreground import box_foreground as box_foreground
from kd_det.functional.masks.foreground import normalized_background as normalized_background
from kd_det.functional.masks.foreground import region_foreground as region_foreground
from kd_det.functional.masks.foreground import valid_cells as valid_cells
from kd_det.functional.masks.predictions import prediction_difference as prediction_difference
from kd_det.functional.masks.predictions import prediction_quality as prediction_quality
from kd_det.functional.masks.predictions import prediction_quality_of_grids as prediction_quality_of_grids
from kd_det.functional.masks.predictions import teacher_confidence as teacher_confidence
from kd_det.functional.masks.pyramid import assign_levels as assign_levels
from kd_det.functional.masks.pyramid import level_foreground as level_foreground
from kd_det.functional.masks.pyramid import near_anchor_foreground as near_anchor_foreground
from kd_det.functional.masks.pyramid import valuable_region as valuable_region
from kd_det.functional.masks.pyramid import valuable_region_of_grids as valuable_region_of_grids
