"""SSIM: mean, contrast and pattern of local windows.

All levels of the neck. The window and the constants are those of SSIM; how features are brought into the range of
pictures, and the weight, are not its authors'.
"""
__about__ = dict(
    paper='arXiv 2211.13133',
    idea='mean, contrast and pattern of local windows',
    reads=['neck'],
    serves='all')
ssim = dict(ssim=dict(type='mmdet.SSIM', tap='neck', weight=1.0))
