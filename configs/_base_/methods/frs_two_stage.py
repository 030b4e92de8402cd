"""FRS (arXiv 2111.00674): features and classes where the teacher sees objects.

Its authors' weights for Faster R-CNN, whose RPN tells where the objects are.
"""
_base_ = './frs_one_stage.py'
frs = dict(
    frs_features=dict(mask=dict(head='rpn_head'), weight=dict(value=0.002)),
    frs_classes=dict(head='rpn_head', weight=dict(value=0.1)))
