"""KD: the classes, as soft targets.

Between dense heads, on all priors: class by class where they are sigmoids, over the classes where they are a softmax.
The paper distils classifiers; for detectors no weight is published. It is the mean over the positive priors, as the
task's own class loss.
"""
__about__ = dict(
    paper='arXiv 1503.02531',
    idea='the classes, as soft targets',
    reads=['bbox_head'],
    serves='all')
kd = dict(kd=dict(type='mmdet.DenseClassification', beta=0.0, temperature=1.0))
