"""Pools that train in this process, or only write what a training would leave, and pairs and data sets for them.

And a cluster of shell scripts.
"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from mmengine.config import Config

from kd_det.config.files import load_config
from kd_det.study.identity import identify_run
from kd_det.study.runs import RESULT_FILE, Run, load_finished_run, train
from kd_det.study.scheduling import CONFIG_FILE

ROOT = Path(__file__).parents[2]
SLURM = dict(
    # Notes what it gets, and runs its own copy, as Slurm does: submitit moves the script away at once.
    sbatch='''number=$(($(ls {folder} | grep -c script) + 1)); cp $1 {folder}/script$number
SLURM_JOB_ID=$number SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
    setsid sh {folder}/script$number > {folder}/output$number 2>&1 & echo $! > {folder}/pid$number
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


class PoolHere:
    """Trains job after job in this process, which spares each one's imports; what has finished is kept."""
    jobs = threads = 1
    collect = False

    def __init__(self):
        self.trained = []

    def run(self, jobs, log):
        outcomes = []
        for job in jobs:
            identity = identify_run(job.config, job.inputs)
            kept = load_finished_run(job.folder, identity, log)
            if kept is None:
                self.trained.append(job.name)
            outcomes.append(kept or self.train(job, identity, log))
        return outcomes

    def find_finished(self, job):
        return load_finished_run(job.folder, identify_run(job.config, job.inputs))

    def train(self, job, identity, log):
        job.folder.mkdir(parents=True, exist_ok=True)
        Config(dict(job.config.to_dict(), work_dir=str(job.folder))).dump(job.folder / CONFIG_FILE)
        return train(job.name, load_config(job.folder / CONFIG_FILE), identity, log)


class PoolOfWriting(PoolHere):
    """Trains nothing: ``points``, given the job, tells its mAP; an epoch has two steps and took 100 s."""

    def __init__(self, points=lambda job: 30.0):
        super().__init__()
        self.points = points

    def train(self, job, identity, log):
        (job.folder / 'log').mkdir(parents=True, exist_ok=True)
        (job.folder / 'epoch_1.pth').write_text(str(job.folder))
        (job.folder / 'log' / 'scalars.json').write_text('{"loss": 1.0, "data_time": 0.5, "step": 1}\n'
                                                         '{"coco/bbox_mAP": 0.3, "time": 0.25, "step": 1}\n')
        epochs = job.config.train_cfg.max_epochs
        run = Run(identity, 'start', 'order', 'epoch_1.pth', 'log/scalars.json',
                  dict(bbox_mAP=self.points(job) / 100), 10, None, 0.5, 2**30, None, epochs, 2 * epochs,
                  seconds=100.0 * epochs)
        (job.folder / RESULT_FILE).write_text(json.dumps(asdict(run)))
        return run.resolve_paths(job.folder)


@pytest.fixture
def pool_here(monkeypatch):
    """Has all benchmarks train in this process; given a pool, in that."""

    def use(pool=None):
        pool = pool or PoolHere()
        for module in ('benchmark', 'suite'):
            monkeypatch.setattr(f'kd_det.study.{module}.make_pool', lambda *arguments: pool)
        return pool

    return use


@pytest.fixture
def pool_of_writing():
    return PoolOfWriting


@pytest.fixture
def pair_files(run_config, retinanet, tmp_path, monkeypatch):
    """``student.py`` and ``teacher.py`` in the folder that one is in then; of one epoch each."""
    monkeypatch.chdir(tmp_path)
    for name, depth in (('student', 18), ('teacher', 50)):
        config = run_config(retinanet(depth=depth), epochs=1, val=True).to_dict()
        del config['default_hooks']['distill'], config['work_dir'], config['experiment_name'], config['visualizer']
        for split in ('train', 'val'):
            config[f'{split}_dataloader']['dataset']['serialize_data'] = False  # which collects garbage each time
        Config(config).dump(f'{name}.py')
    return tmp_path


@pytest.fixture
def make_set(coco_folder):
    """Makes a data set of the coloured rectangles in a folder, in a layout; of other classes, if need be."""

    def make(folder, roboflow=False, categories=None):
        content = json.loads((coco_folder / 'all.json').read_text())
        content['categories'] = categories or content['categories']
        for split in ('train', 'valid' if roboflow else 'val'):
            (folder / split).mkdir(parents=True)
            for image in coco_folder.glob('*.png'):
                shutil.copy(image, folder / split)
            file = folder / (f'{split}/_annotations.coco.json' if roboflow else f'annotations/{split}.json')
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content))
        return folder

    return make


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
