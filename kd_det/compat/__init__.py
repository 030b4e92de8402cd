"""What MMDetection lacks on today's PyTorch: the operators of compiled mmcv, and checkpoints that load safely."""
from .operators import (OperatorNotServedError, install_operators, operator_backend, served_operators)

__all__ = ['OperatorNotServedError', 'install', 'operator_backend', 'served_operators']


def install() -> None:
    """Prepares this process and its children for mmcv, mmengine and mmdet. May be called again."""
    install_operators()
