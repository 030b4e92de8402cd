"""CrossKD: what the teacher's head makes of the features in the student's head.

Its authors' weights for FCOS: 0.4 for classes, 0.75 for boxes, which they compare by IoU where this does by GIoU; the
last two of four convolutions are the teacher's. Whether they compare its centerness is not known; here it is not.
"""
__about__ = dict(
    paper='arXiv 2306.11369',
    idea="what the teacher's head makes of the features in the student's head",
    reads=['bbox_head'],
    serves='all')
crosskd = dict(
    crosskd=dict(
        type='mmdet.CrossKD', head='bbox_head', remaining='half', beta=1.0, box_weight=0.75 / 0.4, centerness_weight=0.0,
        weight=0.4))
