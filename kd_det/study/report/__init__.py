"""The report: what runs left behind, on one page that needs nothing else.

In two stages. :func:`~kd_det.study.report.summary.collect` reads the runs, and runs their checkpoints on the validation
images; what takes long is kept as JSON in ``<run>/report/``. :func:`~kd_det.study.report.page.render` makes a page of
it. :func:`~kd_det.study.report.page.report` does both.
"""
from kd_det.study.report.page import Report, render, report
from kd_det.study.report.studies import read_studies
from kd_det.study.report.summary import collect

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['Report', 'report']
