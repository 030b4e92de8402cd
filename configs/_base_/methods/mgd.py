"""MGD (arXiv 2205.01529): the teacher's feature, generated from a part of the student's.

Its authors' weights for one-stage detectors: all levels of the neck.
"""
mgd = dict(mgd=dict(type='mmdet.MGD', tap='neck', ratio=0.65, weight=2e-5))
