"""Trains a detector: MMDetection's tools/train.py, with distillation. The same as ``kd-det train``."""
from kd_det.cli.main import run_tool

if __name__ == '__main__':
    raise SystemExit(run_tool('train'))
