"""MMDetection 3.3's SSD head: it trains, but asks for its ``loss_cls``, which it has not, as soon as it predicts."""


def install_ssd_prediction() -> None:
    """Lets SSD's head predict; one that has a ``loss_cls`` is left alone."""
    from mmdet.models.dense_heads import SSDHead  # not before the operators are served
    if not hasattr(SSDHead, 'loss_cls'):
        SSDHead.loss_cls = None
