"""FGD: features where teacher and boxes look, attention, and relation to the image.

Its authors' weights for FCOS: all levels of the neck.
"""
__about__ = dict(
    paper='arXiv 2111.11837',
    idea='features where teacher and boxes look, attention, and relation to the image',
    reads=['neck'],
    serves='all')
fgd = dict(fgd=dict(type='mmdet.FGD', tap='neck', temperature=0.8, alpha=1.6e-3, beta=8e-4, gamma=8e-4, lambda_=8e-6))
