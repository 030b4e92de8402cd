"""PFI: features where the predictions differ.

The features are the neck's; the predictions are the objectness of the two RPNs and, in box space, the classes that the
two RoI heads give to the student's regions. The paper has one-stage detectors only; the weights are not its authors'.
"""
__about__ = dict(
    paper='arXiv 2112.04840',
    idea='features where the predictions differ',
    reads=['neck', 'rpn_head', 'roi_head'],
    serves='all')
pfi = dict(
    pfi=dict(
        type='mmdet.FeatureImitation', tap='neck', distance='mse', normalizer='cells', weight=1.5,
        mask=dict(
            type='mmdet.MaskSum', weights=[1.0, 1.0],
            masks=[
                dict(type='mmdet.PredictionDifference', head='rpn_head'), dict(type='mmdet.RoIPredictionDifference')])))
