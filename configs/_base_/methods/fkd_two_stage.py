"""FKD: features where either attends, their means, and relations between cells.

Its authors' weights for two-stage detectors: all levels of the neck.
"""
__about__ = dict(
    paper='openreview uKhGRvM8QNH',
    idea='features where either attends, their means, and relations between cells',
    reads=['neck'],
    serves='all')
fkd = dict(
    fkd=dict(
        type='mmdet.FKD', tap='neck', temperature=0.5, feature_weight=7e-5, pooling_weight=4e-3,
        relation_weight=7e-5))
