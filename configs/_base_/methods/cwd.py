"""CWD (arXiv 2011.13256) with the published weight for necks: all levels."""
cwd = dict(cwd=dict(type='CWD', tap='neck', temperature=1.0, weight=10.0))
