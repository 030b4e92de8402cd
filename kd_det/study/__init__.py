"""What distillation does to a student, and what can be said about it: benchmarks over seeds, fidelity, costs, report.

Each command is one call, which returns a dataclass with ``to_dict()`` and tables for a notebook:
:func:`~kd_det.study.benchmark.benchmark`, :func:`~kd_det.study.benchmark.sweep` and
:func:`~kd_det.study.suite.benchmark_suite`,
:func:`~kd_det.study.comparison.merge_results` and :func:`~kd_det.study.comparison.compare_results`,
:func:`~kd_det.study.inspection.inspect`, :func:`~kd_det.study.step_costs.measure_step_costs`,
:func:`~kd_det.study.report.page.report`.

The layout of a benchmark's work dir::

    results.json                    everything, see kd_det.study.records
    results.md                      the table of it
    gains.png                       of several lengths: what remains when all train longer
    teacher/                        one run, unless a checkpoint was given
    teacher_2/, …                   those of a larger ensemble
    <variant>/seed<k>/              one run of each method, such as fgd@paper/seed0
        config.py                   the whole config that the run was trained with
        result.json                 kd_det.study.runs.Run; written when the run has finished, and not before
        fidelity.json               with --fidelity: FidelityMetric's numbers, by split, and the identity of the run
        log.txt                     what the run said
        job/                        submitit's own files, until the run has finished
        epoch_8.pth                 the trained detector: a plain student; result.json names it
        20260131_120000/vis_data/scalars.json   mmengine's losses and metrics, one JSON object a line; named there too
"""
