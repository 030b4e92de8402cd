"""A slim RTMDet on the demo's data: a student for ``kd-det benchmark``."""
_base_ = ['./_base_/rtmdet_slim.py', './_base_/shapes_detection.py', './_base_/schedule.py']
