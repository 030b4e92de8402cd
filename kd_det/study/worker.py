"""A training as a job: what submitit runs, and what that starts.

That is ``python -m kd_det.study.worker CONFIG IDENTITY TRACKER…``, one process, or several that share each batch.
Importing it costs next to nothing: the process that submitit runs only waits for the other, and does so from the start.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.compat.process import (
    count_processors,
    describe,
    end_rank,
    end_with_parent,
    sigterm_raises,
    use_any_encoding,
)

if TYPE_CHECKING:
    from mmengine.config import Config
    from submitit.helpers import DelayedSubmission

ERROR = 'kd-det: error: '  # begins the line of the log that tells why a training ended


@dataclass(frozen=True)
class Training:
    """A training as submitit runs it: it starts the process that trains, or the launcher of several, and waits.

    Trained in that process itself, it could not tell how it ended where the system ends it, and Slurm's signals would
    reach it in the midst of a step.

    Attributes:
        command: Starts it; the identity of the run is part of it.
        log: The file of all that it says.
        environment: The variables that it gets beside those of the job; None for one that it does not get.
        processes: How many share each batch.
        owner: Number of the process of this machine that the training does not outlive; None where a cluster has it.
        executor: submitit's name of what runs it.
    """
    command: tuple[str, ...]
    log: str
    environment: dict[str, str | None]
    processes: int = 1
    owner: int | None = None
    executor: str = 'local'

    def __call__(self) -> int:
        """Trains, and returns the exit status, below 0 if a signal ended it."""
        if self.owner is not None:
            end_with_parent(owner=self.owner)
        # Those of the job's own machine, unless something says otherwise.
        threads = max(1, count_processors() // self.processes)
        environment = {'OMP_NUM_THREADS': str(threads), **os.environ, **self.environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        # submitit lets SIGTERM pass, for on a cluster other signals follow, which tell what is meant.
        with nullcontext() if self.owner is None else sigterm_raises(), open(self.log, 'w', encoding='utf-8') as output:
            # The input says nothing: it ends when this process does, and the training with it. A session of its own,
            # for what Slurm or a terminal tells the whole group is for this process to act on.
            process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                                       env=environment, start_new_session=True)
            try:
                return process.wait()
            except BaseException:  # to end, or to be requeued: no training outlives its job
                if self.owner is not None:
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to be told once is enough
                process.terminate()
                process.wait()
                raise

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back into the queue when the job was preempted: the training, which begins anew."""
        from submitit.helpers import DelayedSubmission
        return DelayedSubmission(self)


def main(config_file: str, identity: str, *trackers: str) -> int:
    """Trains; the exit status is 0, or 1 after an error, which is then told in a line that begins with ``ERROR``."""
    use_any_encoding()
    import torch

    from kd_det.checks.doctor import check_config
    from kd_det.config.files import load_config
    from kd_det.study.runs import train, use_fast_coco_evaluation
    from kd_det.training.runner import add_trackers
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    use_fast_coco_evaluation()
    try:
        config = load_config(config_file)
        add_trackers(config, trackers, name='/'.join(Path(config.work_dir).resolve().parts[-2:]))  # fgd/seed0
        ranks = int(os.environ.get('WORLD_SIZE', '1'))
        if ranks > 1:
            _join(config, ranks)
        check_config(config, splits=('train', 'val'))
        train(config.work_dir, config, identity)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        print(ERROR + describe(error).replace('\n', ' '), file=sys.stderr, flush=True)
        end_rank(1, failed=True)
        return 1
    end_rank(0)
    return 0


def _join(config: Config, ranks: int) -> None:
    """Lets this process train as one of several that share each batch; without a GPU on the CPU, by Gloo."""
    import torch

    from kd_det.training.runner import check_launcher
    config.train_dataloader.batch_size //= ranks
    config.launcher = 'pytorch'
    if not torch.cuda.is_available():  # MMEngine's own start is for GPUs
        torch.distributed.init_process_group('gloo')
        config.model_wrapper_cfg = dict(config.get('model_wrapper_cfg') or dict(type='MMDistributedDataParallel'),
                                        device_ids=None)
    check_launcher(config.launcher)


if __name__ == '__main__':
    end_with_parent(watch_input=True)  # from now on, for the imports take seconds
    raise SystemExit(main(*sys.argv[1:]))
