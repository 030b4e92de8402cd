"""Rank mimicking (arXiv 2112.04840): the ranking of a box's candidates.

The weight is not its authors'.
"""
rm = dict(rm=dict(type='RankMimicking', head='bbox_head', weight=1.0))
