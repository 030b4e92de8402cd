"""Rank mimicking: the ranking of a box's candidates.

For heads without anchors; as for those with anchors.
"""
__about__ = dict(
    paper='arXiv 2112.04840',
    idea="the ranking of a box's candidates",
    reads=['bbox_head'],
    serves='all')
_base_ = './rm_one_stage.py'
