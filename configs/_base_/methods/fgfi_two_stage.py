"""FGFI: features near the anchors that fit the boxes.

Its authors' weight and the anchors of Faster R-CNN: all levels of the neck.
"""
__about__ = dict(
    paper='arXiv 1906.03609',
    idea='features near the anchors that fit the boxes',
    reads=['neck'],
    serves='all')
fgfi = dict(
    fgfi=dict(
        type='mmdet.FeatureImitation', tap='neck', normalizer='twice_mask', weight=0.01,
        mask=dict(type='mmdet.NearAnchorForeground', phi=0.5, anchors=dict(scales=[8], ratios=[0.5, 1.0, 2.0]))))
