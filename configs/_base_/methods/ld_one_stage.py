"""Localisation distillation (arXiv 2102.12252) for GFL and its kin, the main region, with the weight of MMDetection's LDHead.

As there, it is a sum over the positive priors of a process, not a mean.
"""
ld = dict(
    ld=dict(
        type='DenseRegression', form='distribution', weighting='positives', temperature=10.0, normalizer='none', weight=0.25))
