"""PFI: features where the predictions differ.

The features are the neck's, the predictions classes. The weight is not its authors'.
"""
__about__ = dict(
    paper='arXiv 2112.04840',
    idea='features where the predictions differ',
    reads=['neck', 'bbox_head'],
    serves='all')
pfi = dict(
    pfi=dict(
        type='mmdet.FeatureImitation', tap='neck', mask=dict(type='mmdet.PredictionDifference', head='bbox_head'),
        distance='mse',
        normalizer='cells', weight=1.5))
