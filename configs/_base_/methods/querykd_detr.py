"""Query distillation (after DETRDistill, arXiv 2211.10156): classes and boxes of queries, paired by box and by cost.

Neither the form of the classes nor the weights are DETRDistill's: those of the boxes are the task's own. They warm up,
because DETRs start with layers that regress nothing, which pass no gradient on.
"""
querykd = dict(
    querykd_classes=dict(type='QueryClassification', head='bbox_head', beta=1.0, background=100, weight=1.0),
    querykd_boxes=dict(
        type='QueryRegression', head='bbox_head', l1_weight=5.0, giou_weight=2.0, background=100,
        weight=dict(type='Warmup', value=1.0, iterations=500)))
