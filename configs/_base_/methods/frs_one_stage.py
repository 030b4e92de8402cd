"""FRS: features and classes where the teacher sees objects.

Its authors' weights for RetinaNet; those for GFL are 0.1 and 0.05.
"""
__about__ = dict(
    paper='arXiv 2111.00674',
    idea='features and classes where the teacher sees objects',
    reads=['neck', 'bbox_head'],
    serves='all')
frs = dict(
    frs_features=dict(
        type='mmdet.FeatureImitation', tap='neck', adapter='conv3x3',
        mask=dict(type='mmdet.TeacherConfidence', head='bbox_head'),
        normalizer='mask', weight=dict(type='mmdet.Warmup', value=0.005, iterations=500)),
    frs_classes=dict(
        type='mmdet.DenseClassification', head='bbox_head', beta=0, weighting='richness', normalizer='richness',
        weight=dict(type='mmdet.Warmup', value=0.02, iterations=500)))
