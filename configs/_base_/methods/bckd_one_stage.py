"""BCKD: the classes of dense heads, and the boxes where the classes differ.

Its authors' weights for GFL.
"""
__about__ = dict(
    paper='arXiv 2308.14286',
    idea='the classes of dense heads, and the boxes where the classes differ',
    reads=['bbox_head'],
    serves='all')
bckd = dict(
    bckd_classes=dict(type='mmdet.DenseClassification', beta=1.0, weight=1.0),
    bckd_boxes=dict(type='mmdet.DenseRegression', form='giou', weighting='gap', weight=4.0))
