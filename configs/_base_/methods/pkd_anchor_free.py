"""PKD (arXiv 2207.02039) with its authors' weight for RetinaNet: all levels of the neck, which may have three."""
pkd = dict(pkd=dict(type='PKD', tap='neck', weight=10.0))
