"""What students gain that teach each other, or that learn from themselves: each against the same student alone.

Usage: python -m benchmarks.learners STUDENT TEACHER CHECKPOINT [--seeds 0 1 2] [--methods dml one …] [--json FILE]

All have the same budget: as many steps of the student as its config says. What is finished in the work dir is not done
again; a training that was interrupted goes on.
"""
from __future__ import annotations

import copy
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.runner.checkpoint import find_latest_checkpoint

from benchmarks.trained_rows import MAP, collect_rows, keep_maps, train_once, write_rows
from kd_det import RunResult, distill, generations, train
from kd_det.config.choices import TREATMENTS
from kd_det.config.composition import distillation_config
from kd_det.config.files import load_config, set_data_root

TRUNK = ('backbone', 'neck')


def make_runs(options: Namespace) -> dict[str, Callable[..., RunResult]]:
    """The trainings by name; each is given a seed, a work dir and whether to go on."""
    student, taught = options.student, dict(teacher=options.teacher, checkpoint=options.checkpoint, inherit=())
    common = dict(data_root=options.data_root, check_images=0, epochs=options.epochs)

    def learn(**settings: object) -> Callable[..., RunResult]:
        return lambda **run: distill(student, **{**common, 'method': options.method, **settings, **run})

    def guided(config: Config, **model: object) -> Callable[..., RunResult]:
        """A distillation whose config is not composed of options alone."""
        config.model.update(model)
        return lambda **run: train(config, **{**common, 'data_root': None, **run})

    def learn_from_average(share: int, **settings: object) -> Callable[..., RunResult]:
        partly = label_partly(load_own(options), share)
        return guided(distillation_config(partly, None, None, 'none'), **settings)

    average = dict(type='Average', momentum=0.02)
    labels = dict(score=0.5, images='unlabelled', weight=dict(type='Start', value=1.0, epochs=2))
    runs = {
        'plain': lambda **run: train(student, **common, **run),
        'kd': learn(**taught),
        'dml': learn(peers=1),
        'dml_4': learn(peers=3),
        'dml_teacher_kind': learn(peers=[options.teacher]),
        'dml_taught': learn(peers=1, **taught),
        'branches': learn(peers=2, share=TRUNK, method='none'),
        'one': learn(peers=2, share=TRUNK, guide='gate'),
        # λ = 1/2: half the loss of the mean prediction, and half the mean of the heads' own.
        'ensemble_net': learn(peers=2, share=TRUNK, guide='mean', options={
            'model.teacher.0.loss_weight': 0.5, 'model.task_weight': 0.5 / 3}),
        'ffl': learn(peers=1, guide='fusion'),
        'quarter': lambda **run: train(label_partly(load_own(options), 4, alone=True), **{
            **common, 'data_root': None, **run}),
        'quarter_average': learn_from_average(4, teacher=average, pseudo_labels=labels)}
    if options.backbone:
        config = distillation_config(load_own(options), None, None, 'pkd', balance=0.5)
        runs['backbone'] = guided(config, teacher=dict(
            type='Backbone', checkpoint=options.backbone, mean=[127.5] * 3, std=[127.5] * 3,
            config=dict(type='mmdet.MobileNetV2', out_indices=(1, 2, 4, 6))))
    return runs


def load_own(options: Namespace) -> Config:
    """The student's config on the data of the command line."""
    config = load_config(options.student)
    if options.data_root:
        set_data_root(config, options.data_root)
    return config


def label_partly(config: Config, share: int, alone: bool = False) -> Config:
    """The same training where one image of so many is labelled.

    Half of what is seen is labelled then; without the unlabelled images all is, in as many steps.

    Args:
        config: The student's.
        share: One of so many images.
        alone: Leave the unlabelled images out.
    """
    config = copy.deepcopy(config)
    dataset = config.train_dataloader.dataset
    file = Path(dataset.data_root) / dataset.ann_file
    images = len(json.loads(file.read_text(encoding='utf-8'))['images'])
    labelled = dict(copy.deepcopy(dataset), indices=list(range(0, images, share)))
    others = dict(copy.deepcopy(dataset), indices=[index for index in range(images) if index % share],
                  pipeline=[*dataset.pipeline, dict(type='Unlabelled')])
    times = (share - 1) * (2 if alone else 1)
    repeated = dict(type='RepeatDataset', times=times, dataset=labelled)
    config.train_dataloader.dataset = repeated if alone else dict(type='ConcatDataset', datasets=[repeated, others])
    config.train_cfg.max_epochs = max(1, round(config.train_cfg.max_epochs * share / (2 * (share - 1))))
    return config


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('student')
    parser.add_argument('teacher')
    parser.add_argument('checkpoint')
    parser.add_argument('--data-root')
    parser.add_argument('--method', default='kd', help='by which all learn (kd)')
    parser.add_argument('--methods', nargs='*', help='some of them alone')
    parser.add_argument('--backbone', help="ImageNet weights of MMDetection's MobileNetV2, as a teacher of features")
    parser.add_argument('--generations', nargs='*', default=[], choices=TREATMENTS,
                        help='Born-Again by these treatments, from the plain student')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/learners'))
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    runs = make_runs(options)

    def learn(name: str, seed: int, folder: Path) -> dict[str, float]:
        return keep_maps(runs[name](seed=seed, work_dir=folder, resume=folder.is_dir()).metrics)

    def bear_again(treatment: str, seed: int, folder: Path) -> dict[str, float]:
        result = generations(options.student, method=options.method, treatment=treatment, seed=seed,
                             checkpoint=find_latest_checkpoint(str(options.work_dir / f'plain_{seed}')),
                             data_root=options.data_root, epochs=options.epochs, work_dir=folder)
        return {f'{each.name}{of}/{MAP}': metrics[MAP] for each in result.members[1:]
                for of, metrics in (('', each.metrics), ('/ensemble', each.ensemble))}

    for seed in options.seeds:
        for name in options.methods if options.methods is not None else runs:
            folder = options.work_dir / f'{name}_{seed}'
            train_once(folder, partial(learn, name, seed, folder))
        for treatment in options.generations:
            folder = options.work_dir / f'born_again_{treatment}_{seed}'
            train_once(folder, partial(bear_again, treatment, seed, folder))
    rows = collect_rows(options.work_dir, [*runs, *map('born_again_{}'.format, TREATMENTS)])
    write_rows(options.json, rows, student=options.student, teacher=options.teacher, method=options.method)


if __name__ == '__main__':
    main()
