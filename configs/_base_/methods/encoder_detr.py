"""Encoder imitation: features of the encoder where the teacher's queries see objects.

The form and the weight are those of FRS for the neck of RetinaNet; for encoders none are published.
"""
__about__ = dict(
    paper='after FRS, arXiv 2111.00674',
    idea="features of the encoder where the teacher's queries see objects",
    reads=['encoder', 'bbox_head.queries'],
    serves='all')
encoder = dict(
    encoder=dict(
        type='mmdet.FeatureImitation', tap='encoder', mask=dict(type='mmdet.QueryConfidence', head='bbox_head'),
        normalizer='mask',
        weight=dict(type='mmdet.Warmup', value=0.005, iterations=500)))
