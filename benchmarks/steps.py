"""What the benchmarks share: the training steps that they time, and the options of the batch."""
from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

import kd_det  # noqa: F401  registers the distiller
from kd_det.checks.synthetic import random_distiller
from kd_det.config.classes import count_classes
from kd_det.config.files import load_config
from kd_det.registry import prepare_without_runner

PAIRS = dict(demo='kd_det::demo/fgd_faster_rcnn_r101_r18.py', coco='kd_det::fgd_r101_r18.py')


def add_batch_options(parser: ArgumentParser) -> None:
    """Adds the size of the batch, the objects on it, and PyTorch's threads."""
    parser.add_argument('--size', nargs=2, type=int, default=(320, 320), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--boxes', type=int, default=10, help='on each image')
    parser.add_argument('--threads', type=int, default=2)


def build_distiller(pair: str) -> tuple[nn.Module, int]:
    """Faster R-CNN R101 teaches R18 with FGD, all weights random.

    Args:
        pair: ``'demo'``, the slim one of the demo, or ``'coco'``, that of full width.

    Returns:
        The distiller in training mode, and the number of classes.
    """
    prepare_without_runner(seed=0)
    distiller = random_distiller(load_config(PAIRS[pair]))
    distiller.build_teachers()
    return distiller, count_classes(distiller.student)


def make_batch(size: tuple[int, int], images: int, boxes: int, classes: int,
               seed: int = 0) -> tuple[Tensor, list[DetDataSample]]:
    """A preprocessed batch of noise.

    Args:
        size: Height and width in pixels.
        images: How many.
        boxes: How many on each, from 1/16 to 1/4 of the image wide and high.
        classes: How many there are.
        seed: Another one gives another batch.
    """
    random = torch.Generator().manual_seed(seed)
    height, width = size
    samples = []
    for index in range(images):
        corner = torch.rand(boxes, 2, generator=random) * 0.75
        extent = torch.rand(boxes, 2, generator=random) * 3 / 16 + 1 / 16
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        sample = DetDataSample(metainfo=dict(img_id=index, img_shape=size, pad_shape=size, batch_input_shape=size,
                                             ori_shape=size, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + extent], 1) * scale,
                                           labels=torch.randint(classes, (boxes, ), generator=random))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return torch.randn(images, 3, height, width, generator=random), samples


def training_step(loss: Callable, parse: Callable, parameters: Sequence[Tensor], images: Tensor,
                  samples: list[DetDataSample]) -> Callable[[], None]:
    """One step of SGD: forward, backward, and the update, which has no length, so that all steps have the same work.

    Args:
        loss: Makes the losses from images and data samples.
        parse: Sums them up, as mmengine's ``BaseModel.parse_losses``.
        parameters: What is trained.
        images: (N, 3, H, W).
        samples: Their data samples.
    """
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        parse(loss(images, samples))[0].backward()
        optimizer.step()

    return step
