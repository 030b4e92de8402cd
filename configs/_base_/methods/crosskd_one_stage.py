"""CrossKD (arXiv 2306.11369): what the teacher's head makes of the features in the student's head.

The position in the head is its authors', the weight of the boxes is not.
"""
crosskd = dict(crosskd=dict(type='CrossKD', head='bbox_head', remaining=1, beta=1.0, box_weight=1.0))
