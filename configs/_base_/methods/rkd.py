"""RKD (arXiv 1904.05068): distances and angles between the images of a batch.

Its authors' weights, which are for classifiers: all levels of the neck.
"""
rkd = dict(rkd=dict(type='mmdet.RKD', tap='neck', distance_weight=25.0, angle_weight=50.0))
