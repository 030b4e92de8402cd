"""A cluster of shell scripts for the tests of benchmarks."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = dict(
    # Notes what it gets, and runs it.
    sbatch='''number=$(($(ls {folder} | grep -c script) + 1)); cp $1 {folder}/script$number
SLURM_JOB_ID=$number SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
    setsid sh $1 > {folder}/output$number 2>&1 & echo $! > {folder}/pid$number
echo Submitted batch job $number''',
    srun='''while [ "${{1#--}}" != "$1" ]; do
    case $1 in --output) out=$2; shift ;; --error) err=$2; shift ;; esac; shift; done
exec "$@" > $(echo $out | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/") 2> $(echo $err | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/")''',
    sacct='''echo "JobID|State"
for file in {folder}/pid*; do
    if kill -0 $(cat $file) 2> /dev/null; then state=RUNNING; else state=COMPLETED; fi
    echo "${{file#*/pid}}|$state"; done | sed "s/.*pid//"''',
    scancel='''echo $1 >> {folder}/cancelled; kill -15 -$(cat {folder}/pid$1)
sleep 0.5; kill -9 -$(cat {folder}/pid$1)  # whatever has let that pass''',
    scontrol='echo $@ >> {folder}/requeued')


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of shell scripts, which runs at once what it is handed; its folder."""
    folder = tmp_path / 'slurm'
    (folder / 'bin').mkdir(parents=True)
    for name, script in SLURM.items():
        (folder / 'bin' / name).write_text(f'#!/bin/sh\n{script.format(folder=folder)}\n')
        (folder / 'bin' / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    return folder
