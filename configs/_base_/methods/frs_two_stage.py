"""FRS: features and classes where the teacher sees objects.

Its authors' weights for Faster R-CNN, whose RPN tells where the objects are.
"""
__about__ = dict(
    paper='arXiv 2111.00674',
    idea='features and classes where the teacher sees objects',
    reads=['neck', 'rpn_head'],
    serves='all')
_base_ = './frs_one_stage.py'
frs = dict(
    frs_features=dict(mask=dict(head='rpn_head'), weight=dict(value=0.002)),
    frs_classes=dict(head='rpn_head', weight=dict(value=0.1)))
