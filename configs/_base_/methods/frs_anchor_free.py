"""FRS: features and classes where the teacher sees objects.

Its authors' weights for FCOS.
"""
__about__ = dict(
    paper='arXiv 2111.00674',
    idea='features and classes where the teacher sees objects',
    reads=['neck', 'bbox_head'],
    serves='all')
_base_ = './frs_one_stage.py'
frs = dict(frs_features=dict(weight=dict(value=0.01)), frs_classes=dict(weight=dict(value=0.05)))
