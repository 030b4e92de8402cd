"""The report: what runs left behind, on one page that needs nothing else.

In two stages. :func:`~kd_det.study.report.page.collect` reads the runs, and runs their checkpoints on the validation
images; what takes long is kept as JSON in ``<run>/report/``.
:func:`~kd_det.study.report.page.render` makes a page of it.
"""
from kd_det.study.report.page import collect, render
from kd_det.study.report.runs import read_studies

__all__ = ['collect', 'read_studies', 'render']
