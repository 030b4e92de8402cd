"""PFI (arXiv 2112.04840): features where the predictions differ.

For heads without anchors; as for those with anchors.
"""
_base_ = './pfi_one_stage.py'
