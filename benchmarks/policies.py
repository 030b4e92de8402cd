"""What it brings who teaches when, and from what a student starts: policies, routes, and inherited weights.

Usage: python -m benchmarks.policies [--data-root DIR] [--seeds 0 1 2] [--rows pkd_gfl uniform bandit …] [--json FILE]

On the demo's data. All students of a table are alike and take as many steps; a part of the training images is held out
of every one's data, for some policies learn by them. Teachers are trained first. What is finished in the work dir is
not done again; a training that was interrupted goes on.
"""
from __future__ import annotations

import copy
import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import find_latest_checkpoint

from benchmarks.trained_rows import collect_rows, keep_maps, train_once, write_rows
from kd_det import RunResult, distill, train
from kd_det.compat.writing import write_whole
from kd_det.config.files import load_config, set_data_root
from kd_det.config.options import set_epochs
from kd_det.config.policies import hold_out
from kd_det.training.pictures import draw_curves, read_scalars, save_figure

STUDENT = 'configs/demo/baseline_retinanet_r18.py'
TEACHERS = {name: f'configs/demo/teacher_{name}.py' for name in ('faster_rcnn_r101', 'retinanet_r50', 'gfl_r50')}
ROUTE = (3, 6, 12, 24)  # epochs of the RetinaNet's own training
AUTO = 'auto:pkd+kd+fgd+cwd'
INTERVAL = 10  # steps of a decision: a run of 200 has twenty
# A student with twice the channels and more blocks, of which the small one's are a selection.
DONOR = dict(backbone=dict(depth=34, base_channels=32, stem_channels=32), neck=dict(in_channels=[32, 64, 128, 256]))
SHUFFLED = 'retinanet_r50_shuffled'  # the same RetinaNet, but each class is called by the name of the next
FORWARDS = 'forwards.json'


@HOOKS.register_module()
class CountForwards(Hook):
    """Counts how often each teacher's backbone runs, and writes that into the work dir; a resumed run counts on."""

    def before_train(self, runner: Runner) -> None:
        self.file = Path(runner.work_dir, FORWARDS)
        self.counts = Counter(json.loads(self.file.read_text()) if self.file.is_file() else {})
        for index, guide in enumerate(getattr(runner.model, 'teachers', None) or ()):
            guide.model.backbone.register_forward_hook(partial(self.count, f'guide{index}'))

    def count(self, guide: str, *_: object) -> None:
        self.counts[guide] += 1

    def after_train_epoch(self, runner: Runner) -> None:
        write_whole(self.file, json.dumps(self.counts))


def train_teachers(options: Namespace) -> dict[str, str]:
    """Trains the teachers, the RetinaNet with the checkpoints of its route, and the donor; returns their weights."""
    donor = load_config(STUDENT)
    donor.merge_from_dict(dict(model=DONOR))
    set_epochs(donor, ROUTE[-1])
    weights = {}
    for name, config in {**TEACHERS, 'donor': donor}.items():
        folder = options.work_dir / 'teachers' / name
        if not (folder / f'epoch_{ROUTE[-1]}.pth').is_file():
            train(config, data_root=options.data_root, check_images=0, seed=0, work_dir=folder, resume=folder.is_dir(),
                  options={'default_hooks.checkpoint.interval': ROUTE[0],
                           'default_hooks.checkpoint.max_keep_ckpts': -1})
        weights[name] = find_latest_checkpoint(str(folder))
    weights[SHUFFLED] = str(options.work_dir / 'teachers' / f'{SHUFFLED}.pth')
    if not Path(weights[SHUFFLED]).is_file():
        shuffle_classes(weights['retinanet_r50'], weights[SHUFFLED])
    donor.dump(options.work_dir / 'teachers' / 'donor.py')
    return weights


def shuffle_classes(checkpoint: str, out: str) -> None:
    """Writes a RetinaNet's weights with what it predicts of each class in the place of the one before."""
    saved = torch.load(checkpoint, map_location='cpu', weights_only=False)
    state = saved['state_dict']
    for key in ('bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'):
        by_class = state[key].unflatten(0, (-1, len(saved['meta']['dataset_meta']['classes'])))  # (anchors, classes, …)
        state[key] = by_class.roll(1, 1).flatten(0, 1)
    torch.save(dict(meta=saved['meta'], state_dict=state), out)


def make_runs(options: Namespace, weights: dict[str, str]) -> dict[str, Callable[..., RunResult]]:
    """The trainings by name; each is given a seed, a work dir and whether to go on."""
    student = load_config(STUDENT)
    if options.data_root:
        set_data_root(student, options.data_root)
    hold_out(student, options.held_out)
    common = dict(check_images=0, inherit=(), options=dict(custom_hooks=[dict(type='CountForwards')]))

    def learn(*names: str, **settings: object) -> Callable[..., RunResult]:
        configs = [TEACHERS[name.removesuffix('_shuffled')] for name in names]
        return lambda **run: distill(copy.deepcopy(student), configs, [weights[name] for name in names], **{
            **common, **settings, **run})

    def start(epochs: int, **settings: object) -> Callable[..., RunResult]:
        donor = str(options.work_dir / 'teachers' / 'donor.py')
        return lambda **run: distill(copy.deepcopy(student), donor, weights['donor'], 'none', **{
            **common, 'epochs': epochs, **settings, **run})

    def route(*epochs: int, **settings: object) -> Callable[..., RunResult]:
        files = [str(options.work_dir / 'teachers' / 'retinanet_r50' / f'epoch_{epoch}.pth') for epoch in epochs]
        return lambda **run: distill(copy.deepcopy(student), TEACHERS['retinanet_r50'], files, 'pkd', **{
            **common, **settings, **run})

    def plain(epochs: int | None = None) -> Callable[..., RunResult]:
        return lambda **run: train(copy.deepcopy(student), check_images=0, epochs=epochs, **run)

    def doubt(options: Mapping[str, Any] = MappingProxyType({}), **settings: object) -> Callable[..., RunResult]:
        # A pre-flight would refuse the shuffled one.
        return learn('retinanet_r50', SHUFFLED, method='kd', **settings, options={
            **common['options'], 'default_hooks.distill.preflight': None, **options})

    def doubt_once_trained(**settings: object) -> Callable[..., RunResult]:
        """Of a student that has learnt, so that a wrong step tells at once."""
        return lambda seed, **run: doubt(dict(load_from=find_latest_checkpoint(str(options.work_dir / f'kd_{seed}'))),
                                         **settings)(seed=seed, **run)

    everyone, one = partial(learn, *TEACHERS, method='pkd'), partial(learn, 'retinanet_r50')
    chosen = dict(interval=INTERVAL)
    return {
        'plain': plain(),
        **{f'pkd_{name}': learn(name, method='pkd') for name in TEACHERS},
        'uniform': everyone(policy='uniform'),
        'random': everyone(policy='random'),
        'confidence': everyone(policy='confidence'),
        'confidence_boxes': everyone(policy=dict(type='Confidence', by='boxes')),
        'sequence': everyone(policy=dict(type='Sequence', epochs=student.train_cfg.max_epochs / len(TEACHERS),
                                         trial=2 * INTERVAL)),
        'bandit': everyone(policy=dict(type='Bandit', **chosen)),
        'bandit_halving': everyone(policy=dict(type='Bandit', algorithm='halving', rounds=1, **chosen)),
        'bandit_ucb': everyone(policy=dict(type='Bandit', algorithm='ucb', **chosen)),
        'agent': everyone(policy=dict(type='Agent', **chosen)),
        'route': route(*ROUTE, policy=dict(type='Route', patience=1, interval=2 * INTERVAL)),
        'route_eager': route(*ROUTE, policy=dict(type='Route', patience=1, interval=2 * INTERVAL, gain=0.25)),
        'route_last': route(ROUTE[-1]),
        **{method: one(method=method) for method in ('kd', 'fgd', 'cwd')},
        'auto': one(method=AUTO, policy=dict(type='Bandit', **chosen)),
        'auto_halving': one(method=AUTO, policy=dict(type='Bandit', algorithm='halving', rounds=1, **chosen)),
        'doubt_uniform': doubt(policy='uniform'),
        'doubt_bandit': doubt(policy=dict(type='Bandit', **chosen)),
        'doubt_agent': doubt(policy=dict(type='Agent', interval=INTERVAL // 2)),
        'doubt_uniform_trained': doubt_once_trained(policy='uniform'),
        'doubt_agent_trained': doubt_once_trained(policy=dict(type='Agent', interval=1)),
        'doubt_confidence': doubt(policy=dict(type='Confidence', by='boxes')),
        **{f'{name}_{epochs}': run for epochs in options.lengths for name, run in {
            'start_plain': plain(epochs),
            'start_shape': start(epochs, inherit='auto'),
            'start_selection': start(epochs, inherit='auto', inherit_by='selection'),
            'start_selection_even': start(epochs, inherit='auto', inherit_by='selection', options={
                **common['options'], 'model.inherit_by.layers': 'even'})}.items()}}


def measure(run: Callable[..., RunResult], seed: int, folder: Path) -> dict[str, float]:
    """Trains one student, and returns its mAP and how often a teacher's backbone ran."""
    result = run(seed=seed, work_dir=folder, resume=folder.is_dir())
    counted = folder / FORWARDS
    forwards = json.loads(counted.read_text(encoding='utf-8')) if counted.is_file() else {}
    return {**keep_maps(result.metrics), 'forwards': sum(forwards.values())}


def read_weights(folder: Path) -> dict[str, list[float]]:
    """The mean weight of each arm in each epoch, as a run has logged it."""
    logged = read_scalars(sorted(folder.glob('*/vis_data/scalars.json')))
    return {name.partition('/')[2]: [*curve.values()] for name, curve in logged.items()
            if name.startswith('policy/') and name != 'policy/probe'}


def draw_weights(rows: Mapping[str, Any]) -> Figure:
    """Draws weights that change over the epochs, a panel for each policy: each arm's mean over seeds, and its range."""
    return draw_curves({name: {arm: [dict(enumerate(curves[arm], start=1)) for curves in row['weights'].values()]
                               for arm in next(iter(row['weights'].values()))}
                        for name, row in rows.items() if 'weights' in row and 'uniform' not in name}, columns=4)


def find_plain(name: str) -> str:
    """The plain student that trained as long as the row of that name."""
    return f"start_plain_{name.rpartition('_')[2]}" if name.startswith('start_') else 'plain'


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data-root')
    parser.add_argument('--rows', nargs='+', help='some of them alone')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--held-out', type=int, default=40, help='images that no student trains on (40 of 240)')
    parser.add_argument('--lengths', nargs='+', type=int, default=[8, 24], help='epochs of the students that inherit')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/policies'))
    parser.add_argument('--json', type=Path)
    parser.add_argument('--plot', type=Path, help='a picture of the weights of all policies over the epochs')
    options = parser.parse_args()
    runs = make_runs(options, train_teachers(options))
    for seed in options.seeds:
        for name in options.rows or runs:
            folder = options.work_dir / f'{name}_{seed}'
            train_once(folder, partial(measure, runs[name], seed, folder))
    rows = collect_rows(options.work_dir, options.rows or [*runs], find_plain)
    for name, row in rows.items():
        weights = {seed: read_weights(options.work_dir / f'{name}_{seed}') for seed in row['map']}
        if any(weights.values()):
            row['weights'] = weights
    write_rows(options.json, rows, student=STUDENT, teachers=TEACHERS, held_out=options.held_out)
    if options.plot:
        save_figure(draw_weights(rows), options.plot)


if __name__ == '__main__':
    main()
