"""Query distillation: classes and boxes of queries, paired by box and by cost.

Neither the form of the classes nor the weights are DETRDistill's: the task's own gradient did worse than a fifth of it
on every seed that we tried (docs/results.md), so a fifth is the default. The boxes warm up, because DETRs start with
layers that regress nothing, which pass no gradient on.
"""
__about__ = dict(
    paper='after DETRDistill, arXiv 2211.10156',
    idea='classes and boxes of queries, paired by box and by cost',
    reads=['bbox_head.queries'],
    serves='all')
querykd = dict(
    querykd_classes=dict(
        type='mmdet.QueryClassification', head='bbox_head', beta=1.0, background=100,
        weight=dict(type='mmdet.Balance', ratio=0.1, interval=20, longest=40)),
    querykd_boxes=dict(
        type='mmdet.QueryRegression', head='bbox_head', l1_weight=5.0, giou_weight=2.0, background=100,
        weight=dict(
            type='mmdet.Warmup', value=dict(type='mmdet.Balance', ratio=0.1, interval=20, longest=40), iterations=500)))
