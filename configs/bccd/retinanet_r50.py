"""A slim RetinaNet R50 on BCCD_Dataset, trained from scratch: the teacher of retinanet_r18.py."""
_base_ = './retinanet_r18.py'
model = dict(backbone=dict(depth=50, base_channels=32, stem_channels=32), neck=dict(in_channels=[128, 256, 512, 1024]))
