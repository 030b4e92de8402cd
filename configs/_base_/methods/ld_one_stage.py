"""LD, localisation distillation (arXiv 2102.12252), its main region, for GFL and its kin.

With the weight of MMDetection's LDHead, and as there a sum over the positive priors of a process, not a mean.
"""
ld = dict(
    ld=dict(
        type='DenseRegression', form='distribution', weighting='positives', temperature=10.0, normalizer='none',
        weight=0.25))
