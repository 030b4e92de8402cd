"""Rank mimicking: the ranking of a box's candidates.

The weight is not its authors': at the task's own gradient it did harm (docs/results.md), so its share is a fifth.
"""
__about__ = dict(
    paper='arXiv 2112.04840',
    idea="the ranking of a box's candidates",
    reads=['bbox_head'],
    serves='all')
rm = dict(rm=dict(type='mmdet.RankMimicking', head='bbox_head', weight=dict(type='mmdet.Balance', ratio=0.2)))
