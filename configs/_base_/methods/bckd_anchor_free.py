"""BCKD (arXiv 2308.14286): the classes of dense heads, and the boxes where the classes differ.

For heads without anchors, with its authors' weights for GFL.
"""
_base_ = './bckd_one_stage.py'
