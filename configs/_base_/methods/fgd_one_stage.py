"""FGD: features where teacher and boxes look, attention, and relation to the image.

Its authors' weights for RetinaNet, GFL and SOLO: all levels of the neck.
"""
__about__ = dict(
    paper='arXiv 2111.11837',
    idea='features where teacher and boxes look, attention, and relation to the image',
    reads=['neck'],
    serves='all')
fgd = dict(fgd=dict(type='mmdet.FGD', tap='neck', temperature=0.5, alpha=1e-3, beta=5e-4, gamma=5e-4, lambda_=5e-6))
