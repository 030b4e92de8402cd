"""BCKD: the classes of dense heads, and the boxes where the classes differ.

For heads without anchors, with its authors' weights for GFL.
"""
__about__ = dict(
    paper='arXiv 2308.14286',
    idea='the classes of dense heads, and the boxes where the classes differ',
    reads=['bbox_head'],
    serves='all')
_base_ = './bckd_one_stage.py'
