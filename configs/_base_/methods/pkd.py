"""PKD: correlation of each channel.

Its authors' weight for one-stage teachers: the neck's first four levels, at most.
"""
__about__ = dict(
    paper='arXiv 2207.02039',
    idea='correlation of each channel',
    reads=['neck'],
    serves='all')
pkd = dict(pkd=dict(type='mmdet.PKD', tap='neck', levels=4, weight=10.0))
