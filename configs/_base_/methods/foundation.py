"""Foundation features: the direction of each cell's feature.

After RT-DETRv4, whose teacher is a frozen DINOv3: model.teacher=dict(type='Backbone', ...). The last level of the
backbone through a 1×1 convolution. Its authors keep the weight by a share of gradients, too; the ratio is not theirs.
"""
__about__ = dict(
    paper='arXiv 2510.25257',
    idea="the direction of each cell's feature",
    reads=['backbone'],
    serves='all')
foundation = dict(
    foundation=dict(
        type='mmdet.FeatureImitation', tap='backbone', levels=(-1, ), adapter='conv1x1', distance='cosine',
        normalizer='mask', weight=dict(type='mmdet.Balance', ratio=0.5)))
