"""What MMDetection lacks today: the operators of compiled mmcv, checkpoints that load safely, an SSD that predicts.

Importing this, and :func:`install`, import neither PyTorch nor MMDetection: names come from their modules when asked
for.
"""
from importlib import import_module

_MODULES = {
    'checkpoint': ('CheckpointError', 'NotFiniteError', 'UnsafeCheckpointError', 'describe_not_finite',
                   'install_safe_loading', 'load_checkpoint', 'require_finite'),
    'operators': ('OperatorNotServedError', 'install_operators', 'log_operator_backend', 'operator_backend',
                  'served_operators'),
    'startup': ('mend_mmdetection', ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ['CheckpointError', 'install']


def install() -> None:
    """Prepares this process and its children for mmcv, mmengine and mmdet. May be called again.

    What is imported already is prepared at once, all else as soon as it is imported.
    """
    from .operators import install_operators
    from .startup import mend_mmdetection
    install_operators()
    mend_mmdetection()


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'.{_MODULE_OF[name]}', __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *_MODULE_OF})
