"""PKD: correlation of each channel.

Its authors' weight for two-stage teachers: the first four levels of the neck.
"""
__about__ = dict(
    paper='arXiv 2207.02039',
    idea='correlation of each channel',
    reads=['neck'],
    serves='all')
pkd = dict(pkd=dict(type='mmdet.PKD', tap='neck', levels=4, weight=6.0))
