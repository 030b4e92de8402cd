"""FKD: features where either attends, their means, and relations between cells.

Its authors' weights for one-stage detectors: all levels of the neck.
"""
__about__ = dict(
    paper='openreview uKhGRvM8QNH',
    idea='features where either attends, their means, and relations between cells',
    reads=['neck'],
    serves='all')
fkd = dict(
    fkd=dict(
        type='mmdet.FKD', tap='neck', temperature=0.1, feature_weight=4.2e-4, pooling_weight=2.4e-2,
        relation_weight=4.2e-4))
