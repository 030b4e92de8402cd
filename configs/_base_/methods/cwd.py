"""CWD: each channel as a distribution over the cells.

The published weight for necks: all levels.
"""
__about__ = dict(
    paper='arXiv 2011.13256',
    idea='each channel as a distribution over the cells',
    reads=['neck'],
    serves='all')
cwd = dict(cwd=dict(type='mmdet.CWD', tap='neck', temperature=1.0, weight=10.0))
