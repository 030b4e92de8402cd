"""KD: the classes, as soft targets.

Between dense heads without anchors; as for the others, no weight is published.
"""
__about__ = dict(
    paper='arXiv 1503.02531',
    idea='the classes, as soft targets',
    reads=['bbox_head'],
    serves='all')
_base_ = './kd_one_stage.py'
