"""Rank mimicking (arXiv 2112.04840). The weight is not its authors'."""
rm = dict(rm=dict(type='RankMimicking', head='bbox_head', weight=1.0))
