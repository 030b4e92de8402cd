"""PGD: features of the neck from where the teacher detects each box best, and the background.

For heads without anchors; as for those with anchors.
"""
__about__ = dict(
    paper='arXiv 2203.05469',
    idea='features of the neck from where the teacher detects each box best, and the background',
    reads=['neck', 'bbox_head'],
    serves='all')
_base_ = './pgd_one_stage.py'
