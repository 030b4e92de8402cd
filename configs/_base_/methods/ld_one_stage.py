"""LD (arXiv 2102.12252): distributions over the distance to each side of a box.

Its main region, for GFL and its kin, with the weight of MMDetection's LDHead, and as there a sum over the positive
priors of a process, not a mean.
"""
ld = dict(
    ld=dict(
        type='DenseRegression', form='distribution', weighting='positives', temperature=10.0, normalizer='none',
        weight=0.25))
