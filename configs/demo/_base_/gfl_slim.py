"""GFL with a neck and towers of 64 channels, for images of about 128 pixels, from scratch.

Its boxes are distributions, which ``ld`` distils. As the RetinaNet beside it, it begins at stride 4, with a wider
initialisation of the towers.
"""
_base_ = './resnet_fpn_slim.py'
model = dict(
    type='GFL',
    bbox_head=dict(
        type='GFLHead',
        num_classes=6,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
        init_cfg=dict(
            type='Normal', layer='Conv2d', std=0.05,
            override=dict(type='Normal', name='gfl_cls', std=0.01, bias_prob=0.01)),
        anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[4, 8, 16, 32]),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        reg_max=16,
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0)),
    train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=200, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50))
