"""PGD (arXiv 2203.05469): features of the neck from where the teacher detects each box best, and the background.

For heads without anchors; as for those with anchors.
"""
_base_ = './pgd_one_stage.py'
