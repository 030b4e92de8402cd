"""Rank mimicking (arXiv 2112.04840): the ranking of a box's candidates.

For heads without anchors; as for those with anchors.
"""
_base_ = './rm_one_stage.py'
