"""The operators are tested through ``mmcv.ops``, as mmdet calls them."""
import kd_det.compat

kd_det.compat.install()
