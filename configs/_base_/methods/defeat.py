"""DeFeat: features, foreground and background apart.

Its part in the neck, with its authors' weights: all levels.
"""
__about__ = dict(
    paper='arXiv 2103.14475',
    idea='features, foreground and background apart',
    reads=['neck'],
    serves='all')
defeat = dict(
    defeat=dict(
        type='mmdet.DecoupledImitation', tap='neck', mask='mmdet.LevelForeground', foreground_weight=3.0,
        background_weight=12.0))
