"""KD: the classes, as soft targets.

Between RoI heads, on the regions that the student samples. The paper distils classifiers; for detectors no weight is
published. It is the mean over the regions, as the task's own class loss.
"""
__about__ = dict(
    paper='arXiv 1503.02531',
    idea='the classes, as soft targets',
    reads=['roi_head'],
    serves='all')
kd = dict(kd=dict(type='mmdet.RoIClassification', form='plain', temperature=2.0))
