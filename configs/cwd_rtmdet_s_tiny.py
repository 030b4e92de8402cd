"""RTMDet-S teaches RTMDet-tiny with CWD by MMYOLO's recipe, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_s_tiny.py', './_base_/recipes/cwd_rtmdet.py']
model = dict(distill=_base_.cwd_rtmdet)
