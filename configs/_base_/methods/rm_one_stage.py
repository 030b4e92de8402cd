"""Rank mimicking (arXiv 2112.04840): the ranking of a box's candidates.

The weight is not its authors': at the task's own gradient it did harm (docs/results.md), so its share is a fifth.
"""
rm = dict(rm=dict(type='mmdet.RankMimicking', head='bbox_head', weight=dict(type='mmdet.Balance', ratio=0.2)))
