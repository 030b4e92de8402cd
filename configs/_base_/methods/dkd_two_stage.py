"""DKD (arXiv 2203.08679) between RoI heads, with its authors' weights for detectors."""
dkd = dict(dkd=dict(type='RoIClassification', form='decoupled', alpha=1.0, beta=0.25, temperature=1.0))
