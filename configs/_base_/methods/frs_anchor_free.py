"""FRS (arXiv 2111.00674): features and classes where the teacher sees objects.

Its authors' weights for FCOS.
"""
_base_ = './frs_one_stage.py'
frs = dict(frs_features=dict(weight=dict(value=0.01)), frs_classes=dict(weight=dict(value=0.05)))
