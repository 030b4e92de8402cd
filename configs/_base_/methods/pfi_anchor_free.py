"""PFI: features where the predictions differ.

For heads without anchors; as for those with anchors.
"""
__about__ = dict(
    paper='arXiv 2112.04840',
    idea='features where the predictions differ',
    reads=['neck', 'bbox_head'],
    serves='all')
_base_ = './pfi_one_stage.py'
