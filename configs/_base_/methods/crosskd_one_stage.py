"""CrossKD (arXiv 2306.11369): what the teacher's head makes of the features in the student's head.

Neither the position in the head nor the weight of the boxes has been checked against its authors'.
"""
crosskd = dict(crosskd=dict(type='CrossKD', head='bbox_head', remaining=1, beta=1.0, box_weight=1.0))
