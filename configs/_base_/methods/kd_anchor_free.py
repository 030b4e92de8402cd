"""KD (arXiv 1503.02531): the classes, as soft targets.

Between dense heads without anchors; as for the others, no weight is published.
"""
_base_ = './kd_one_stage.py'
