"""DKD: the classes of regions, the target and the others apart.

Between RoI heads, with its authors' weights for detectors.
"""
__about__ = dict(
    paper='arXiv 2203.08679',
    idea='the classes of regions, the target and the others apart',
    reads=['roi_head'],
    serves='all')
dkd = dict(dkd=dict(type='mmdet.RoIClassification', form='decoupled', alpha=1.0, beta=0.25, temperature=1.0))
