"""What MMDetection lacks today: the operators of compiled mmcv, checkpoints that load safely, an SSD that predicts."""
from .checkpoint import CheckpointError, UnsafeCheckpointError, install_safe_loading, load_checkpoint
from .operators import (
    OperatorNotServedError,
    install_operators,
    log_operator_backend,
    operator_backend,
    served_operators,
)
from .startup import mend_mmdetection

__all__ = [
    'CheckpointError', 'OperatorNotServedError', 'UnsafeCheckpointError', 'install', 'install_safe_loading',
    'load_checkpoint', 'log_operator_backend', 'mend_mmdetection', 'operator_backend', 'served_operators'
]


def install() -> None:
    """Prepares this process and its children for mmcv, mmengine and mmdet. May be called again."""
    install_operators()
    install_safe_loading()
