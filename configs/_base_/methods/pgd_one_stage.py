"""PGD: features of the neck from where the teacher detects each box best, and the background.

The mask is its authors', with their ξ, top_k, T and their teacher's attentions; the weights are not. Theirs, 0.04 for
the foreground of FCOS and GFL (ATSS 0.08) and half of it for the background, are for features within the head.
"""
__about__ = dict(
    paper='arXiv 2203.05469',
    idea='features of the neck from where the teacher detects each box best, and the background',
    reads=['neck', 'bbox_head'],
    serves='all')
pgd = dict(
    pgd_foreground=dict(
        type='mmdet.FeatureImitation', tap='neck', normalizer='mask', weight=0.005,
        mask=dict(type='mmdet.MaskProduct', masks=[
            dict(type='mmdet.PredictionQuality', head='bbox_head', xi=0.8, top_k=30),
            dict(type='mmdet.SpatialAttention', temperature=0.8),
            dict(type='mmdet.ChannelAttention', temperature=0.8)])),
    pgd_background=dict(
        type='mmdet.FeatureImitation', tap='neck', mask='mmdet.BoxBackground', normalizer='mask', weight=0.0025))
