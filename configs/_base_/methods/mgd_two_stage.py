"""MGD: the teacher's feature, generated from a part of the student's.

Its authors' weights for two-stage detectors: the FPN's strides 4 to 32.
"""
__about__ = dict(
    paper='arXiv 2205.01529',
    idea="the teacher's feature, generated from a part of the student's",
    reads=['neck'],
    serves='all')
mgd = dict(mgd=dict(type='mmdet.MGD', tap='neck', levels=(0, 1, 2, 3), ratio=0.45, weight=5e-7))
