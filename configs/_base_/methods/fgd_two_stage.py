"""FGD: features where teacher and boxes look, attention, and relation to the image.

Its authors' weights for two-stage detectors: the four levels of the FPN with strides 4 to 32.
"""
__about__ = dict(
    paper='arXiv 2111.11837',
    idea='features where teacher and boxes look, attention, and relation to the image',
    reads=['neck'],
    serves='all')
fgd = dict(
    fgd=dict(
        type='mmdet.FGD', tap='neck', levels=(0, 1, 2, 3), temperature=0.5, alpha=5e-5, beta=2.5e-5, gamma=5e-5,
        lambda_=5e-7))
