"""How steady a Balance is where images are empty: its weights at batch 1, beside those of the same data with all boxes.

Usage: python -m benchmarks.empty_images [--methods fgd crosskd crosskd+fgd] [--seeds 5] [--steps 60] [--json FILE]

A slim RetinaNet teaches one of half its width on generated images of 96 pixels. Each seed draws which images are empty,
has boxes of crowds alone in place of all where the kind is crowd, and trains from the same start as the control.
"""
from __future__ import annotations

import json
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

import kd_det  # noqa: F401  registers everything
from kd_det.config.composition import distillation_config
from kd_det.config.files import load_config
from kd_det.datasets import generate_shapes
from kd_det.registry import prepare_without_runner
from kd_det.training.runner import build_runner

IMAGES, SIZE, TEACHER_EPOCHS = 40, 96, 25
CONTROL = ('empty', 0.0)
KINDS = (CONTROL, ('empty', 0.33), ('empty', 0.66), ('empty', 0.9), ('crowd', 0.33))

Weights = dict[str, list[float]]  # of each term, step by step


class WeightRecorder(Hook):
    """Notes the weight of each term in each step."""

    def __init__(self) -> None:
        self.weights: Weights = {}

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        for name, value in outputs.items():
            if name.startswith('distill/') and name.endswith('_weight'):
                self.weights.setdefault(name[len('distill/'):-len('_weight')], []).append(float(value))


def detector(folder: Path, width: int) -> Config:
    """The demo's RetinaNet, whose backbone begins with so many channels, on the generated images."""
    config = load_config('kd_det::demo/baseline_retinanet_r18.py')
    config.merge_from_dict({
        'model.backbone.base_channels': width, 'model.backbone.stem_channels': width,
        'model.neck.in_channels': [width * 2**stage for stage in range(4)], 'model.neck.out_channels': 32,
        'model.bbox_head.in_channels': 32, 'model.bbox_head.feat_channels': 32, 'model.bbox_head.stacked_convs': 1,
        'train_dataloader.dataset.data_root': f'{folder}/data/', 'train_dataloader.batch_size': 4,
        'train_dataloader.batch_sampler.drop_last': False, 'default_hooks.logger': None,
        'default_hooks.checkpoint.interval': TEACHER_EPOCHS, 'log_level': 'ERROR', 'work_dir': f'{folder}/teacher',
        'train_cfg': dict(type='EpochBasedTrainLoop', max_epochs=TEACHER_EPOCHS, _delete_=True),
        'param_scheduler': [dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=5)]})
    for loop in ('val', 'test'):
        config.update({f'{loop}_{part}': None for part in ('dataloader', 'cfg', 'evaluator')})
    return config


def make_teacher(folder: Path) -> tuple[Path, Path]:
    """The teacher's config and checkpoint; it is trained unless that is done."""
    generate_shapes(folder / 'data', train_images=IMAGES, val_images=1, size=SIZE)
    path, checkpoint = folder / 'teacher.py', folder / 'teacher' / f'epoch_{TEACHER_EPOCHS}.pth'
    config = detector(folder, width=16)
    config.dump(path)
    if not checkpoint.is_file():
        build_runner(config).train()
    return path, checkpoint


def annotations(folder: Path, kind: str, share: float, seed: int) -> Path:
    """An annotation file where that share of the images, of the seed's choice, has no boxes, or crowds alone."""
    data = json.loads((folder / 'data' / 'annotations' / 'train.json').read_text())
    identifiers = [image['id'] for image in data['images']]
    chosen = set(random.Random(seed).sample(identifiers, round(share * len(identifiers))))
    if kind == 'crowd':
        for each in data['annotations']:
            each['iscrowd'] = int(each['image_id'] in chosen)
    else:
        data['annotations'] = [each for each in data['annotations'] if each['image_id'] not in chosen]
    path = folder / f'{kind}_{share}_{seed}.json'
    path.write_text(json.dumps(data))
    return path


def train(folder: Path, method: str, kind: str, share: float, seed: int, options: Namespace) -> Weights:
    """Trains some steps at batch 1."""
    teacher, checkpoint = make_teacher(folder)
    config = distillation_config(detector(folder, width=8), str(teacher), str(checkpoint), method, options.inherit)
    config.merge_from_dict({
        'train_dataloader.batch_size': 1, 'train_dataloader.dataset.filter_cfg.filter_empty_gt': False,
        'train_dataloader.dataset.ann_file': str(annotations(folder, kind, share, seed)),
        'train_cfg': dict(type='IterBasedTrainLoop', max_iters=options.steps, val_interval=options.steps + 1,
                          _delete_=True),
        'train_dataloader.sampler': dict(type='InfiniteSampler', shuffle=True), 'train_dataloader.batch_sampler': None,
        'default_hooks.distill.preflight': None, 'default_hooks.checkpoint': None, 'randomness': dict(seed=seed),
        'work_dir': f'{folder}/run', 'experiment_name': f'{method}_{kind}_{share}_{seed}_{options.inherit}'})
    runner, recorder = build_runner(config), WeightRecorder()
    runner.register_hook(recorder)
    runner.train()
    return {name: [float(f'{each:.3g}') for each in weights] for name, weights in recorder.weights.items()}


def summarize(rows: list[dict]) -> Iterator[dict]:
    """Of each kind and term: when it has a weight, its percentiles, and how far they are from the control's median.

    That is the median of all steps; that of the same step; and that of the step before which the control had seen as
    many images with boxes (``alike``; in each step it sees one, and has a weight from the third on).

    Args:
        rows: One for each method, kind and share, with the weights of its seeds.
    """
    for row in rows:
        control = next(each for each in rows if each['method'] == row['method']
                       and (each['kind'], each['share']) == CONTROL)
        for term in row['weights'][0]:
            weights, of_control = (np.array([seed[term] for seed in each['weights']]) for each in (row, control))
            known = np.where(weights > 0, weights, np.nan)
            low, middle, high = np.nanpercentile(known, (5, 50, 95))
            median = np.median(of_control[of_control > 0])
            steps = ~np.isnan(known).all(0) & (of_control > 0).any(0)
            edges = np.nanpercentile(known[:, steps], (5, 95), axis=0)
            by_step = np.nanmedian(np.where(of_control > 0, of_control, np.nan)[:, 2:], 0)  # from its first weight on
            apart = edges / by_step[steps[2:]]
            taken = np.cumsum(np.diff(weights, prepend=0) != 0, axis=1) - 1  # measurements with boxes after the first
            alike = (weights / by_step[taken.clip(0, len(by_step) - 1)])[weights > 0]
            yield dict(method=row['method'], term=term, kind=row['kind'], share=row['share'],
                       first_steps=[int(np.argmax(seed > 0)) + 1 if (seed > 0).any() else None for seed in weights],
                       **{name: float(f'{number:.4g}') for name, number in dict(
                           low=low, median=middle, high=high, control=median, low_share=low / median,
                           high_share=high / median, lowest_step=apart[0].min(), highest_step=apart[1].max(),
                           low_alike=np.percentile(alike, 5), high_alike=np.percentile(alike, 95)).items()})


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--methods', nargs='+', default=['fgd', 'crosskd', 'crosskd+fgd'])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--inherit', nargs='*', default='auto', help='parts of the student; none for no part')
    parser.add_argument('--folder', type=Path, default=Path('work_dirs/empty_images'),
                        help='of data, teacher and runs')
    parser.add_argument('--json', type=Path, help='write the weights and their summary to this file')
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare_without_runner(seed=0)
    folder, rows = options.folder.resolve(), []
    for method in options.methods:
        for kind, share in KINDS:
            with redirect_stdout(StringIO()):  # pycocotools prints
                weights = [train(folder, method, kind, share, seed, options) for seed in range(options.seeds)]
            rows.append(dict(method=method, kind=kind, share=share, weights=weights))
            summary = list(summarize(rows))
            for line in summary[-len(weights[0]):]:
                print("{method} {term}, {kind} {share:.0%}: from step {first_steps}; {low:.3g}, {median:.3g}, "
                      "{high:.3g}; of the control's median {low_share:.2f} to {high_share:.2f}, step by step "
                      '{lowest_step:.2f} to {highest_step:.2f}'.format(**line), flush=True)
            if options.json:
                record = dict(vars(options), json=None, folder=None, summary=summary, rows=rows)
                options.json.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
