"""Compares methods on one pair, over seeds. The same as ``kd-det benchmark``."""
from kd_det.cli.main import run_tool

if __name__ == '__main__':
    raise SystemExit(run_tool('benchmark'))
