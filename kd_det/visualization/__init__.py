"""Pictures: boxes, masks and attentions over the image, learning curves. Each function returns a matplotlib figure."""

from kd_det.visualization.channels import draw_channels
from kd_det.visualization.curves import draw_curves, read_scalars
from kd_det.visualization.detections import draw_detections
from kd_det.visualization.maps import draw_maps, overlay_map
from kd_det.visualization.text import names_to_draw, save_figure

__all__ = ['draw_channels', 'draw_curves', 'draw_detections', 'draw_maps', 'names_to_draw',
           'overlay_map', 'read_scalars', 'save_figure']
