"""DIST: correlation within and across the images of a batch.

Its released weights, on pooled features: all levels of the neck.
"""
__about__ = dict(
    paper='arXiv 2205.10536',
    idea='correlation within and across the images of a batch',
    reads=['neck'],
    serves='all')
dist = dict(dist=dict(type='mmdet.DIST', tap='neck', temperature=1.0, inter=1.0, intra=1.0))
