"""What MMDetection lacks on today's PyTorch: the operators of compiled mmcv, and checkpoints that load safely."""
from .checkpoint import CheckpointError, UnsafeCheckpointError, install_safe_loading, load_checkpoint
from .operators import (OperatorNotServedError, install_operators, log_operator_backend, operator_backend,
                        served_operators)

__all__ = [
    'CheckpointError', 'OperatorNotServedError', 'UnsafeCheckpointError', 'install', 'load_checkpoint',
    'log_operator_backend', 'operator_backend', 'served_operators'
]


def install() -> None:
    """Prepares this process and its children for mmcv, mmengine and mmdet. May be called again."""
    install_operators()
    install_safe_loading()
