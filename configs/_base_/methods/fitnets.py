"""FitNets: a hint at the last stage of the backbone.

The paper distils classifiers, with ½·Σ(s − t)²; for detectors no weight is published. So it is ½ of the mean, which
depends neither on the channels nor on the image. For the paper's sum: normalizer='batch'.
"""
__about__ = dict(
    paper='arXiv 1412.6550',
    idea='a hint at the last stage of the backbone',
    reads=['backbone'],
    serves='all')
fitnets = dict(
    hint=dict(
        type='mmdet.FeatureImitation', tap='backbone', levels=(-1, ), distance='mse', normalizer='mean', weight=0.5))
