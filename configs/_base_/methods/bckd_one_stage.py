"""BCKD (arXiv 2308.14286) with its authors' weights for GFL: classes, and the boxes where the classes differ."""
bckd = dict(
    bckd_classes=dict(type='DenseClassification', beta=1.0, weight=1.0),
    bckd_boxes=dict(type='DenseRegression', form='giou', weighting='gap', weight=4.0))
