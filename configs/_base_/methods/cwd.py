"""CWD (arXiv 2011.13256): each channel as a distribution over the cells.

The published weight for necks: all levels.
"""
cwd = dict(cwd=dict(type='mmdet.CWD', tap='neck', temperature=1.0, weight=10.0))
