"""The report: what runs left behind, on one page that needs nothing else.

In two stages. :func:`~kd_det.report.collecting.collect` reads the runs, and runs their checkpoints on the validation
images; what takes long is kept as JSON in ``<run>/report/``.
:func:`~kd_det.report.rendering.render` makes a page of it.
"""
from kd_det.report.collecting import collect
from kd_det.report.rendering import render
from kd_det.report.studies import read_studies

__all__ = ['collect', 'read_studies', 'render']
