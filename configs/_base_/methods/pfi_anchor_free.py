"""PFI (arXiv 2112.04840) for heads without anchors; as for those with anchors."""
_base_ = './pfi_one_stage.py'
