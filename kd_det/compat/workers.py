"""Carries the installation into child processes.

A forked child inherits ``sys.meta_path``; one that is spawned, or comes from the fork server, starts bare and must have
``mmcv._ext`` before it unpickles a data set. Every process hands its private configuration to its children, and
they unpickle it before their target and arguments: an entry of it that installs on unpickling reaches every
descendant, whatever their main script imports.
"""
import multiprocessing

_KEY = 'kd_det.compat'


class _InstallOnUnpickling:

    def __reduce__(self):
        return _install, ()


def _install() -> _InstallOnUnpickling:
    from . import install
    install()
    return _InstallOnUnpickling()


def install_in_child_processes() -> None:
    """Makes every process started from here on call :func:`kd_det.compat.install` first."""
    multiprocessing.current_process()._config[_KEY] = _InstallOnUnpickling()  # type: ignore[attr-defined]
