"""PFI (arXiv 2112.04840): features where the predictions differ.

The features are the neck's, the predictions classes. The weight is not its authors'.
"""
pfi = dict(
    pfi=dict(
        type='mmdet.FeatureImitation', tap='neck', mask=dict(type='mmdet.PredictionDifference', head='bbox_head'),
        distance='mse',
        normalizer='cells', weight=1.5))
