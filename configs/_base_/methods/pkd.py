"""PKD (arXiv 2207.02039): correlation of each channel.

Its authors' weight for one-stage teachers: the neck's first four levels, at most.
"""
pkd = dict(pkd=dict(type='mmdet.PKD', tap='neck', levels=4, weight=10.0))
