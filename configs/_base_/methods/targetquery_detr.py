"""Target queries: both decoders' answers to queries made of ground-truth boxes; the encoder's features in the boxes.

The weights are ours: those of querykd and of encoder, for the paper's could not be checked. As there, boxes teach
little until the student's own layers regress something.
"""
__about__ = dict(
    paper='after CLoCKDistill, arXiv 2502.10683',
    idea="both decoders' answers to queries made of ground-truth boxes; the encoder's features in the boxes",
    reads=['bbox_head.decoder', 'encoder'],
    serves=['DAB-DETR', 'Deformable DETR', 'DINO'])
targetquery = dict(
    targetquery=dict(
        type='mmdet.TargetQueries', head='bbox_head', groups=3, box_noise=0.4, label_noise=0.25,
        weight=dict(
            type='mmdet.Warmup', value=dict(type='mmdet.Balance', ratio=0.2, interval=20, longest=40), iterations=500)),
    targetquery_memory=dict(
        type='mmdet.FeatureImitation', tap='encoder', mask='mmdet.BoxForeground', normalizer='mask',
        weight=dict(type='mmdet.Warmup', value=0.005, iterations=500)))
