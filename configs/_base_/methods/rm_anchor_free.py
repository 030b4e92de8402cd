"""Rank mimicking (arXiv 2112.04840) for heads without anchors; as for those with anchors."""
_base_ = './rm_one_stage.py'
