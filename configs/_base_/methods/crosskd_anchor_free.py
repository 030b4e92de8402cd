"""CrossKD (arXiv 2306.11369): what the teacher's head makes of the features in the student's head.

For heads without anchors; as for those with anchors.
"""
_base_ = './crosskd_one_stage.py'
