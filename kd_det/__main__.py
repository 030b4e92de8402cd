"""``python -m kd_det``, and ``torchrun -m kd_det``, are ``kd-det``."""
from kd_det.cli.main import main

if __name__ == '__main__':
    raise SystemExit(main())
