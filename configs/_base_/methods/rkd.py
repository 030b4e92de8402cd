"""RKD: distances and angles between the images of a batch.

Its authors' weights, which are for classifiers: all levels of the neck.
"""
__about__ = dict(
    paper='arXiv 1904.05068',
    idea='distances and angles between the images of a batch',
    reads=['neck'],
    serves='all')
rkd = dict(rkd=dict(type='mmdet.RKD', tap='neck', distance_weight=25.0, angle_weight=50.0))
