"""kd_det distils large object detectors into small ones, inside MMDetection 3.x.

Importing it is all that a config needs (``custom_imports = dict(imports=['kd_det'])``), and costs next to nothing:
MMDetection gets operators and checkpoint loading that work on today's PyTorch as soon as it is imported, before or
after, and its registries find the distiller, terms, masks and hooks at their first look-up. Without MMDetection
:mod:`kd_det.functional`, which needs PyTorch alone, is still there.
"""
from importlib import import_module

from kd_det import compat

__version__ = '0.1.0'  # setup.py reads it here

compat.install()

# Public names -> the modules that have them, which are imported when a name is first asked for.
_PUBLIC = {
    'distill': 'kd_det.training.runs',
    'train': 'kd_det.training.runs',
    'evaluate': 'kd_det.training.runs',
    'export': 'kd_det.deploy.export',
    'predict': 'kd_det.deploy.prediction',
    'measure_latency': 'kd_det.deploy.latency',
    'quantize': 'kd_det.deploy.quantization',
    'prune': 'kd_det.deploy.pruning',
    'compress': 'kd_det.study.compression',
    'generations': 'kd_det.study.generations',
    'benchmark': 'kd_det.study.benchmark',
    'sweep': 'kd_det.study.benchmark',
    'benchmark_suite': 'kd_det.study.suite',
    'merge_results': 'kd_det.study.comparison',
    'compare_results': 'kd_det.study.comparison',
    'measure_step_costs': 'kd_det.study.step_costs',
    'inspect': 'kd_det.study.inspection',
    'report': 'kd_det.study.report',
    'measure_fidelity': 'kd_det.study.fidelity',
    'doctor': 'kd_det.checks.environment',
    'methods': 'kd_det.config.methods',
    'RunResult': 'kd_det.training.runs',
    'ExportedStudent': 'kd_det.deploy.checkpoint',
    'ExportedModel': 'kd_det.deploy.export',
    'Predictions': 'kd_det.deploy.prediction',
    'Latencies': 'kd_det.deploy.latency',
    'QuantizedModel': 'kd_det.deploy.quantization',
    'PrunedDetector': 'kd_det.deploy.pruning',
    'Compression': 'kd_det.study.compression',
    'Generations': 'kd_det.study.generations',
    'BenchmarkResult': 'kd_det.study.records',
    'SuiteResult': 'kd_det.study.suite',
    'Comparison': 'kd_det.study.comparison',
    'StepCosts': 'kd_det.study.step_costs',
    'Inspection': 'kd_det.study.inspection',
    'Report': 'kd_det.study.report',
    'Diagnosis': 'kd_det.checks.environment',
    'Methods': 'kd_det.config.methods',
    'ConfigurationError': 'kd_det.config',
    'DiagnosisError': 'kd_det.checks.environment',
    'CheckpointError': 'kd_det.compat',
    'TeacherError': 'kd_det.teachers',
    'MMDETECTION_ERROR': 'kd_det.compat.registration',
}

__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str):
    """A public name, or a room of this package: ``kd_det.losses`` needs no import of its own."""
    if name in _PUBLIC:
        value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
        return value
    if not name.startswith('_'):
        room = f'{__name__}.{name}'
        try:
            return import_module(room)
        except ModuleNotFoundError as error:
            if error.name != room:
                raise
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *_PUBLIC})
