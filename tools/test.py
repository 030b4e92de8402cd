"""Evaluates a checkpoint: MMDetection's tools/test.py, for the student alone. The same as ``kd-det test``."""
from kd_det.cli.main import run_tool

if __name__ == '__main__':
    raise SystemExit(run_tool('test'))
