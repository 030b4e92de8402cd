"""A teacher outside of MMDetection: any Python callable that gives boxes or features for a batch of images."""
from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Count, Name, Positive, declared, refuse
from kd_det.config.detectors import TeacherError
from kd_det.context import LevelSpec
from kd_det.taps import Features
from kd_det.teachers.bridge import Shape
from kd_det.teachers.features import FeatureGuide, check_normalization, describe_value, make_bridge, to_stride
from kd_det.teachers.guide import Guide, Reading
from kd_det.teachers.probe import PROBE_SIZE

NO_CLASSES = ('__background__', 'background', 'N/A')  # as torchvision's lists call what is no class
BOXES = ('a list of {count} dicts, one for each image: boxes (n, 4), x1, y1, x2, y2 in pixels of the batch; scores '
         '(n,) from 0 to 1; labels (n,), integers')
MAPS = 'a tuple of maps (N, C, h, w), or a dict with one for each path, such as dict(neck=(…))'


@MODELS.register_module()
class External(FeatureGuide):
    """A Python callable as teacher: a detector of ``transformers`` or torchvision, a service, a backbone of one's own.

    What ``build`` names, a function or a class, is called once, with ``arguments``, and returns the callable. That
    is called as ``callable(images, image_shapes)``, without gradient:

    - ``images``, (N, 3, H, W): the student's batch as red, green and blue from 0 to 1, unless ``mean`` and ``std`` say
      otherwise; on the student's device. What is not image is 0.
    - ``image_shapes``: height and width of each image within; the rest is padding, at the right and bottom.

    It returns, in torchvision's form, **boxes**: for each image a dict of ``boxes``, (n, 4) of x1, y1, x2, y2 in
    pixels of the batch, ``scores``, (n,) from 0 to 1, and integers ``labels``, (n,), which count ``classes``. Or
    **features**: a tuple of maps (N, C, h, w) that cover the batch evenly, or a dict of these by the paths that terms
    tap. Both are on the device of the images.

    Weights of an ``nn.Module`` are frozen, and it is in evaluation mode.

    Args:
        build: ``'module:name'`` or ``'file.py:name'``, the latter from the folder where the training starts.
        arguments: Keywords that ``build`` is called with.
        classes: Names of the labels, from ``label_offset`` on, of a callable that gives boxes. ``'__background__'`` and
            ``'N/A'`` are no classes: boxes with their labels are left out, so that torchvision's own list can be given
            as it is.
        label_offset: The label of the first of ``classes``: 1 where labels begin there and the list does not name the
            background.
        levels: Channels and stride of each map, for a callable that gives features; by default found by a blank image
            that it is shown when the student is built.
        mean: Of each channel, of images from 0 to 255; by default 0, and ``std`` 255, which is images from 0 to 1.
        std: Likewise.
        bgr_to_rgb: Whether its channels are red, green and blue.
        pad_size_divisor: The batch is padded at the right and bottom to multiples of it.

    Raises:
        ArgumentError: An argument does not fit.
    """

    @declared
    def __init__(self,
                 build: Annotated[str, MinLen(1), "'module:name' or 'file.py:name'"],
                 arguments: dict[str, Any] | None = None,
                 classes: Sequence[Name] | None = None,
                 label_offset: int = 0,
                 levels: Annotated[Sequence[Sequence[Positive]], MinLen(1)] | None = None,
                 mean: Sequence[float] | None = None,
                 std: Sequence[Positive] | None = None,
                 bgr_to_rgb: bool = True,
                 pad_size_divisor: Count = 1) -> None:
        super().__init__()
        place, _, name = build.rpartition(':')
        if not place or not name.isidentifier():
            refuse('build', build, "'module:name' or 'file.py:name'")
        check_normalization(mean, std)
        for index, level in enumerate(levels or ()):
            if len(level) != 2 or not isinstance(level[0], int):
                refuse(f'levels[{index}]', level, 'the number of channels and the stride of a map')
        own = [name for name in classes or () if name not in NO_CLASSES]
        if classes is not None and (not own or len(set(own)) != len(own)):
            refuse('classes', list(classes), 'the names of its classes by label, each once')
        self.classes, self.num_classes = (tuple(own), len(own)) if own else (None, None)
        self.detects = self.classes is not None
        self.checkpoint = build
        self._arguments = arguments or {}
        self._offset, self._pad_size_divisor = label_offset, pad_size_divisor
        numbers = {name: label for label, name in enumerate(own)}
        self._labels = torch.tensor([numbers.get(name, -1) for name in classes or ()], dtype=torch.long)
        self._mean, self._std, self._bgr_to_rgb = mean or (0.0, ) * 3, std or (255.0, ) * 3, bgr_to_rgb
        self._given = None if levels is None else tuple(LevelSpec(*level) for level in levels)
        self._callable: Callable[[Tensor, Sequence[Shape]], Any] | None = None
        self._found: dict[str, tuple[LevelSpec, ...]] = {}

    # ------------------------------------------------------------------------------------ before training

    def find_specs(self, path: str) -> tuple[LevelSpec, ...]:
        if self._given is not None:
            return self._given
        if path not in self._found:
            maps, size = self._show_blank(path)
            self._found[path] = tuple(LevelSpec(level.shape[1], to_stride(size / level.shape[-2])) for level in maps)
        return self._found[path]

    def _show_blank(self, path: str) -> tuple[Features, int]:
        """The maps of a blank image, and its size in pixels."""
        size = math.ceil(PROBE_SIZE / self._pad_size_divisor) * self._pad_size_divisor
        self._build()
        anchor = torch.zeros(()) if self.weights is None else next(self.weights.parameters(), torch.zeros(()))
        image = torch.zeros(1, len(self._mean), size, size, device=anchor.device)
        with preserved_randomness():
            return self._read_maps(self._ask(image, [(size, size)]), path, image), size

    def _build(self) -> Callable[[Tensor, Sequence[Shape]], Any]:
        if self._callable is None:
            with preserved_randomness():
                self._callable = _import(self.checkpoint)(**self._arguments)
            if not callable(self._callable):
                refuse('build', self.checkpoint, 'what returns a callable',
                       f'Called, it returned {describe_value(self._callable)}.')
            owner = getattr(self._callable, '__self__', self._callable)  # of a method the object
            if isinstance(owner, nn.Module):
                self.weights = owner.eval().requires_grad_(False)
        return self._callable

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Guide:
        self._build()
        bridge = make_bridge(learners[0].data_preprocessor, self._mean, self._std, self._bgr_to_rgb, len(self._mean),
                             self._pad_size_divisor)
        self.settle(self.weights, bridge, next(learners[0].parameters()))
        for path in reading.taps if self._given is not None else ():
            self._show_blank(path)
        return self

    # ------------------------------------------------------------------------------------ in the steps

    def compute_maps(self, images: Tensor, image_shapes: Sequence[Shape]) -> Mapping[str, Features]:
        answer = self._ask(images, image_shapes)
        return {path: self._read_maps(answer, path, images) for path in self._sources}

    @torch.no_grad()
    def detect(self, images: Tensor, data_samples: Sequence) -> list[InstanceData]:
        if self.classes is None:
            raise TeacherError(f'The External {self.checkpoint} names no classes, so that its boxes can not be '
                               'learnt from: name them, by label, with classes=[…].')
        image_shapes = [tuple(sample.img_shape[:2]) for sample in data_samples]
        own_images = self.bridge(images, image_shapes)
        answer = self._ask(own_images, image_shapes)
        self._check_boxes(answer, own_images)
        found, table = [], self._labels.to(images.device)
        for each in answer:
            labels = table[each['labels'].long() - self._offset]
            instances = InstanceData(bboxes=each['boxes'].to(images.dtype), scores=each['scores'].to(images.dtype),
                                     labels=labels)
            found.append(instances[labels >= 0])
        return found

    def _ask(self, images: Tensor, image_shapes: Sequence[Shape]) -> Any:
        with torch.no_grad():
            return self._build()(images, [tuple(shape) for shape in image_shapes])

    def _refuse(self, came: str, expected: str) -> TeacherError:
        return TeacherError(f'The External {self.checkpoint} gave {came}. Expected {expected}, on the device of the '
                            'images.')

    def _read_maps(self, answer: Any, path: str, images: Tensor) -> Features:
        """Reads the maps that stand for a path out of what the callable gave."""
        expected = MAPS
        if isinstance(answer, Mapping):
            if path not in answer:
                raise self._refuse(f"features of {', '.join(map(repr, answer)) or 'nothing'}, and a term reads "
                                   f"'{path}'", expected)
            answer = answer[path]
        maps = (answer, ) if isinstance(answer, Tensor) else answer
        if not isinstance(maps, (tuple, list)) or not maps or not all(
                isinstance(level, Tensor) and level.dim() == 4 and level.is_floating_point() for level in maps):
            raise self._refuse(f"{describe_value(answer)}, where a term reads the features of '{path}'", expected)
        for index, level in enumerate(maps):
            if len(level) != len(images) or level.device != images.device:
                raise self._refuse(f"as map {index} of '{path}' {describe_value(level)} on {level.device}, for "
                                   f'{len(images)} images on {images.device}', expected)
        specs = self._given or self._found.get(path)
        channels = [level.shape[1] for level in maps]
        if specs is not None and channels != [spec.channels for spec in specs]:
            whence = 'levels says' if self._given else 'a blank image gave'
            raise self._refuse(f"maps of {channels} channels for '{path}', where {whence} "
                               f'{[spec.channels for spec in specs]}', expected)
        return tuple(maps)

    def _check_boxes(self, answer: Any, images: Tensor) -> None:
        """Checks the form of boxes; what the numbers are in one question to the device for the whole batch."""
        expected = BOXES.format(count=len(images))
        if not isinstance(answer, (tuple, list)) or len(answer) != len(images) or not all(
                isinstance(each, Mapping) for each in answer):
            raise self._refuse(describe_value(answer), expected)
        for index, each in enumerate(answer):
            parts = {key: each.get(key) for key in ('boxes', 'scores', 'labels')}
            for key, part in parts.items():
                if not isinstance(part, Tensor) or part.device != images.device:
                    where = f' on {part.device}' if isinstance(part, Tensor) else ''
                    raise self._refuse(f"for image {index} as '{key}' {describe_value(part)}{where}", expected)
            boxes, scores, labels = parts.values()
            if boxes.shape != (len(scores), 4) or scores.dim() != 1 or labels.shape != scores.shape:
                raise self._refuse(f'for image {index} ' + ', '.join(
                    f'{key} {tuple(part.shape)}' for key, part in parts.items()), expected)
            if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
                raise self._refuse(f'for image {index} labels of {labels.dtype}', expected)
        boxes, scores, labels = (torch.cat([each[key] for each in answer]) for key in ('boxes', 'scores', 'labels'))
        if not len(labels):
            return
        numbers = torch.stack([labels.min(), labels.max(), scores.min(), scores.max(), boxes.sum()]).double().tolist()
        first, last = self._offset, self._offset + len(self._labels) - 1
        if not first <= numbers[0] <= numbers[1] <= last:
            raise self._refuse(f'labels from {numbers[0]:.0f} to {numbers[1]:.0f}, where classes names those from '
                               f'{first} to {last}; label_offset is the label of the first', expected)
        if not 0 <= numbers[2] <= numbers[3] <= 1:
            raise self._refuse(f'scores from {numbers[2]:g} to {numbers[3]:g}', expected)
        if not math.isfinite(numbers[4]):
            raise self._refuse('boxes that are not finite', expected)


def _import(path: str) -> Any:
    """Imports what ``'module:name'`` or ``'file.py:name'`` names."""
    place, _, name = path.rpartition(':')
    if place.endswith('.py'):
        file = Path(place).expanduser().absolute()
        if not file.is_file():
            refuse('build', path, 'a file and a name in it', f'There is no file {file}.')
        spec = importlib.util.spec_from_file_location(f'_kd_det_external_{file.stem}', file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for their own
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f'{place}.'.startswith(f'{error.name}.'):
                raise
            refuse('build', path, 'a module that can be imported and a name in it',
                   f"There is no module '{error.name}' on the path of Python; a file is named with its '.py'.")
    if not callable(getattr(module, name, None)):
        there = ', '.join(key for key, value in vars(module).items() if callable(value)
                          and getattr(value, '__module__', '') == module.__name__)
        refuse('build', path, 'the name of a function or class', f'{place} has {there or "none"}.')
    return getattr(module, name)
