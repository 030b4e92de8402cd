"""MGD: the teacher's feature, generated from a part of the student's.

Its authors' weights for one-stage detectors: all levels of the neck.
"""
__about__ = dict(
    paper='arXiv 2205.01529',
    idea="the teacher's feature, generated from a part of the student's",
    reads=['neck'],
    serves='all')
mgd = dict(mgd=dict(type='mmdet.MGD', tap='neck', ratio=0.65, weight=2e-5))
