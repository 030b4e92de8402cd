"""PKD (arXiv 2207.02039): correlation of each channel.

Its authors' weight for two-stage teachers: the first four levels of the neck.
"""
pkd = dict(pkd=dict(type='mmdet.PKD', tap='neck', levels=4, weight=6.0))
