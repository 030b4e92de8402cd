"""PKD (arXiv 2207.02039) with its authors' weight for two-stage detectors: the first four levels of the neck."""
pkd = dict(pkd=dict(type='PKD', tap='neck', levels=(0, 1, 2, 3), weight=6.0))
