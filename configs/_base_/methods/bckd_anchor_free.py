"""BCKD (arXiv 2308.14286) for heads without anchors, with its authors' weights for GFL."""
_base_ = './bckd_one_stage.py'
