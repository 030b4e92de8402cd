"""What the demo tells at its end: a table, the numbers in a file, and pictures."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.structures import InstanceData
from rich.table import Table
from torch import Tensor

from kd_det.compat.writing import write_whole
from kd_det.functional.masks import box_foreground, normalized_background, spatial_attention
from kd_det.study.results import format_mean, mean_and_std
from kd_det.study.runs import Run, describe_environment, read_command_line
from kd_det.training.pictures import draw_curves, draw_detections, draw_maps, read_scalars, save_figure

TITLES = dict(teacher='teacher', plain='plain student', distilled='distilled student')
RESULTS_FILE, PICTURES = 'results.json', ('curves.png', 'detections.png', 'attention.png')
PICTURED_LEVEL = 0  # of the neck: the finest, where small objects show


def summarize(runs: Mapping[str, list[Run]]) -> dict:
    """The gain of the distilled students over the plain ones, in points of mAP and AP50, by seed and on average."""
    gains = {}
    for metric in ('bbox_mAP', 'bbox_mAP_50'):
        by_seed = [100 * (distilled.metrics[metric] - plain.metrics[metric])
                   for plain, distilled in zip(runs['plain'], runs['distilled'])]
        gains[metric] = dict(by_seed=[round(gain, 2) for gain in by_seed], mean=round(float(np.mean(by_seed)), 2),
                             std=round(float(np.std(by_seed, ddof=1)), 2) if len(by_seed) > 1 else None)
    return gains


def tabulate_runs(runs: Mapping[str, list[Run]], gains: dict) -> Table:
    """The detectors side by side; several seeds as mean ± standard deviation."""
    table = Table(title='COCO metric on the validation images', caption=_gain_text(gains['bbox_mAP']))
    table.add_column('model', no_wrap=True)
    for heading in ('epochs', 'mAP', 'AP50', 'parameters', 'time / iteration'):
        table.add_column(heading, justify='right')
    for kind, group in runs.items():
        mean_ap, ap50 = ([100 * run.metrics[metric] for run in group] for metric in ('bbox_mAP', 'bbox_mAP_50'))
        seconds = np.median([run.seconds_per_iteration for run in group])
        table.add_row(TITLES[kind], str(group[0].epochs), format_mean(**mean_and_std(mean_ap)),
                      format_mean(**mean_and_std(ap50)), f'{group[0].parameters / 1e6:.2f} M', f'{seconds:.2f} s')
    return table


def _gain_text(gain: dict) -> str:
    by_seed = gain['by_seed']
    text = f"distilled - plain: {format_mean(**mean_and_std(by_seed), sign='+')} mAP"
    return text if len(by_seed) == 1 else f'{text} (by seed: {", ".join(f"{value:+.1f}" for value in by_seed)})'


def write_results(folder: Path, runs: Mapping[str, list[Run]], gains: dict, data: dict) -> Path:
    """Writes ``results.json``: the command, commit, versions and machine, every run's numbers, and the gains."""
    results = dict(
        command=read_command_line(),
        **describe_environment(),
        data=data,
        gain=gains,
        runs={kind: [asdict(run) for run in group] for kind, group in runs.items()})
    file = folder / RESULTS_FILE
    write_whole(file, json.dumps(results, indent=2) + '\n')
    return file


def draw_pictures(folder: Path, runs: Mapping[str, list[Run]], configs: Mapping[str, Config]) -> list[Path]:
    """Draws learning curves, boxes on one image, and masks and attentions of one level; seed 0 where there are several.

    The image is the first of the validation images with the most objects.

    Args:
        folder: Where the pictures go.
        runs: The trainings by kind.
        configs: Config of a detector of each kind; a distilled student's checkpoint is a plain student's.

    Returns:
        The files.
    """
    detectors = {TITLES[kind]: init_detector(configs[kind], group[0].checkpoint, device='cpu')
                 for kind, group in runs.items()}
    dataset = DATASETS.build(configs['teacher'].val_dataloader.dataset)
    info = max((dataset.get_data_info(index) for index in range(len(dataset))), key=lambda each: len(each['instances']))
    truth = InstanceData(bboxes=torch.tensor([instance['bbox'] for instance in info['instances']]),
                         labels=torch.tensor([instance['bbox_label'] for instance in info['instances']]))
    image = cv2.imread(info['img_path'])
    boxes = {name: inference_detector(detector, image).pred_instances for name, detector in detectors.items()}
    features = {name: _neck_feature(detector, image) for name, detector in detectors.items()}
    figures = (
        _curves(runs),
        draw_detections(image[..., ::-1], {'ground truth': truth, **boxes},
                        dataset.metainfo['classes'], dataset.metainfo['palette']),
        _masks_and_attentions(image[..., ::-1], truth.bboxes, features))
    for name, figure in zip(PICTURES, figures):
        save_figure(figure, folder / name, dpi=150)
    return [folder / name for name in PICTURES]


def _curves(runs: Mapping[str, list[Run]]):
    scalars = {TITLES[kind]: [read_scalars(run.scalars) for run in runs[kind]] for kind in ('plain', 'distilled')}
    quantities = {'validation mAP': 'coco/bbox_mAP', 'classification loss of the RoI head': 'loss_cls',
                  'box loss of the RoI head': 'loss_bbox'}
    return draw_curves({title: {kind: [each[name] for each in group] for kind, group in scalars.items()}
                        for title, name in quantities.items()})


@torch.no_grad()
def _neck_feature(detector: torch.nn.Module, image: np.ndarray) -> Tensor:
    """(1, C, H, W) of the pictured level; the demo's images need no padding."""
    inputs = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    batch = detector.data_preprocessor(dict(inputs=[inputs]), False)['inputs']
    return detector.extract_feat(batch)[PICTURED_LEVEL]


def _masks_and_attentions(image: np.ndarray, boxes: Tensor, features: Mapping[str, Tensor]):
    shape = next(iter(features.values())).shape[-2:]
    foreground = box_foreground([boxes], image.shape[:2], shape, weighting='inverse_area')
    maps = {'foreground mask': foreground, 'background mask': normalized_background(foreground)}
    for name, feature in features.items():
        maps[f'attention: {name}'] = spatial_attention(feature, temperature=0.5)
    return draw_maps(image, {title: cells[0].numpy() for title, cells in maps.items()}, columns=3)
