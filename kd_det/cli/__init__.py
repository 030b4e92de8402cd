"""The command line: ``kd-det``, and what the files in ``tools/`` call."""
import sys

_excepthook = sys.excepthook


def _end_quietly(kind, error, traceback) -> None:
    """Ctrl-C while the command line itself is imported, before it can see to that."""
    if issubclass(kind, KeyboardInterrupt):
        from kd_det.compat.process import leave_interrupted
        leave_interrupted()
    _excepthook(kind, error, traceback)


sys.excepthook = _end_quietly
