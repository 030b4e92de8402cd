"""One training in a process of its own: ``python -m kd_det.study.worker CONFIG IDENTITY TRACKER…``."""
from __future__ import annotations

import sys

from kd_det.compat.process import describe, end_with_parent, use_any_encoding

if __name__ == '__main__':
    end_with_parent(watch_input=True)  # from now on, for the imports below take seconds

import os
import traceback
from pathlib import Path

import torch

from kd_det.checks.doctor import check_config
from kd_det.config.files import load_config
from kd_det.study.runs import train, use_fast_coco_evaluation
from kd_det.training.runner import add_trackers


def main(config_file: str, identity: str, *trackers: str) -> int:
    """Trains; the exit status is 0, or 1 after an error, which is then the last line of the output."""
    use_any_encoding()
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    use_fast_coco_evaluation()
    try:
        config = load_config(config_file)
        add_trackers(config, trackers, name='/'.join(Path(config.work_dir).resolve().parts[-2:]))  # fgd/seed0
        check_config(config, splits=('train', 'val'))
        train(config.work_dir, config, identity)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        print(describe(error).replace('\n', ' '), file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    raise SystemExit(main(*sys.argv[1:]))
