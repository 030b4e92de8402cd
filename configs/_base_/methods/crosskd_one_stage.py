"""CrossKD: what the teacher's head makes of the features in the student's head.

Its authors' weights for RetinaNet and ATSS, and for the distributions of GFL.
"""
__about__ = dict(
    paper='arXiv 2306.11369',
    idea="what the teacher's head makes of the features in the student's head",
    reads=['bbox_head'],
    serves=['RetinaNet', 'ATSS', 'GFL', 'RTMDet'])
crosskd = dict(
    crosskd=dict(
        type='mmdet.CrossKD', head='bbox_head', remaining=1, beta=1.0, box_weight=1.0, distribution_weight=4.0,
        centerness_weight=1.0))
