"""FreeKD: frequencies of features, where learnt prompts look.

The main term of its release, with its weight for RetinaNet: all levels of the neck. The release adds the squared
difference of the features and, beside it, of the head's regressions. The prompts are learnt before training.
"""
__about__ = dict(
    paper='arXiv 2311.12079',
    idea='frequencies of features, where learnt prompts look',
    reads=['neck'],
    serves='all')
freekd = dict(freekd=dict(type='mmdet.FreeKD', tap='neck', prompts=6, iterations=2000, rate=0.01, weight=1.0))
