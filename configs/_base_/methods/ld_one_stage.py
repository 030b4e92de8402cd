"""LD: distributions over the distance to each side of a box.

Its main and its valuable region, for GFL and its kin, with the weights and sums of its authors' release, 0.25 and
T = 10 for both: the main region's sums over the priors of a process are divided by the 4 sides, as in MMDetection's
LDHead, the valuable region's by 16, hence a quarter of the weight here.
"""
__about__ = dict(
    paper='arXiv 2102.12252',
    idea='distributions over the distance to each side of a box',
    reads=['bbox_head'],
    serves=['GFL'])
ld = dict(
    ld=dict(
        type='mmdet.DenseRegression', form='distribution', weighting='positives', temperature=10.0, normalizer='none',
        weight=0.25),
    ld_valuable=dict(
        type='mmdet.DenseRegression', form='distribution', weighting='valuable', temperature=10.0, normalizer='none',
        weight=0.0625))
