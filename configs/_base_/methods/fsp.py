"""FSP (Yim et al., CVPR 2017): correlation between the channels of consecutive stages.

The paper distils classifiers; for detectors no weight is published. So it is the mean over the entries of the flow
matrices, which depends neither on the channels nor on the image. For the paper's sum: normalizer='batch'.
"""
fsp = dict(fsp=dict(type='mmdet.FSP', tap='backbone', normalizer='mean', weight=1.0))
