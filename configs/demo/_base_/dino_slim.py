"""DINO with a layer of encoder, two of decoder and 30 queries, for images of about 128 pixels, from scratch.

Its features begin at stride 8: at 16 it hardly learns within the demo's few steps. They have 256 channels, the only width that
MMDetection's code for DINO knows.
"""
_base_ = './resnet_fpn_slim.py'
width, levels = 256, 3
sampling = dict(embed_dims=width, num_heads=4, num_levels=levels, num_points=2, dropout=0.0)
ffn = dict(embed_dims=width, feedforward_channels=256, ffn_drop=0.0)
model = dict(
    type='DINO',
    num_queries=30,
    num_feature_levels=levels,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(pad_size_divisor=1),
    backbone=dict(out_indices=(1, 2, 3)),
    neck=dict(
        _delete_=True,
        type='ChannelMapper',
        kernel_size=1,
        out_channels=width,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
        num_outs=levels),
    encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=sampling, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=width, num_heads=4, dropout=0.0), cross_attn_cfg=sampling, ffn_cfg=ffn),
        post_norm_cfg=None),
    positional_encoding=dict(num_feats=width // 2, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type='DINOHead',
        num_classes=6,
        sync_cls_avg_factor=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0)),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20)),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0)
            ])),
    test_cfg=dict(max_per_img=30))
