"""PFI (arXiv 2112.04840) for two-stage detectors: features of the neck where the objectness of the two RPNs differs.

The paper has one-stage detectors only; the weight is not its authors'.
"""
pfi = dict(
    pfi=dict(
        type='FeatureImitation', tap='neck', mask=dict(type='PredictionDifference', head='rpn_head'), distance='mse',
        normalizer='cells', weight=1.5))
