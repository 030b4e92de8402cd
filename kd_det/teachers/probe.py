"""Finds out what form a detector's features have, and what images it takes, by a blank image that it is shown.

Nothing is loaded or trained: a config is probed by its backbone and neck alone, where possible without memory.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from kd_det.compat.process import preserved_randomness
from kd_det.config.detectors import ModelConfig, TeacherError, find_head_classes, read_model_config
from kd_det.config.files import get_type_name
from kd_det.context import LevelSpec
from kd_det.heads import HeadError, HeadRequest, check_head
from kd_det.heads.capture import HeadForm, measure_head
from kd_det.heads.dense import Stride, read_strides
from kd_det.heads.request import ROI_HEAD
from kd_det.registry import build_detector, within_scope
from kd_det.taps import ENCODER, Features, TapError, Taps, find_module, is_within_encoder

PROBE_SIZE = 256  # pixels at least; a multiple of every stride of a pyramid
LIKELY_CHANNELS = (3, *range(4, 17), 2, 1)  # of images, colours first


def probe_levels(model: nn.Module, taps: Taps) -> dict[str, tuple[LevelSpec, ...]]:
    """Finds the form of the tapped levels by one blank image; an encoder does not run, for it keeps that of its tokens.

    An SSD's last layers have no padding: they fit the one size of image that its largest stride names, where the 10
    cells of stride 32 of 300 pixels are no multiple of it. So the image is as large as the largest stride of the
    anchors, and a level is called by the stride that needs as many cells; by that name the outputs of its head are
    found too.

    Args:
        model: A detector, or a :class:`FeatureExtractor`. It is left as it was, BatchNorm statistics included.
        taps: Taps of that model.

    Returns:
        Path -> form of each level.

    Raises:
        TapError: A tapped module is not part of backbone, neck or encoder.
    """
    was_training = {module: module.training for module in model.modules()}
    anchor = next(model.parameters())
    strides = find_prior_strides(model)
    size = math.ceil(max((PROBE_SIZE, *strides)))
    image = torch.zeros(1, find_input_channels(model), size, size, device=anchor.device, dtype=anchor.dtype)
    with preserved_randomness(), torch.no_grad(), taps.capture() as features:
        maps = model.eval().extract_feat(image)
        for path in filter(is_within_encoder, taps.paths):
            _pass_tokens(model, path, maps, size)
    for module, training in was_training.items():
        module.training = training

    def stride_of(cells: int) -> Stride:
        return next((stride for stride in strides if math.ceil(size / stride) == cells), round(size / cells))

    return {path: tuple(LevelSpec(level.shape[1], stride_of(level.shape[-1])) for level in levels)
            for path, levels in features.items()}


def probe_config(model: dict, paths: Iterable[str], scale: float = 1.0) -> dict[str, tuple[LevelSpec, ...]]:
    """Like :func:`probe_levels` for a model dict: backbone and neck are built on the meta device, without memory.

    Args:
        model: The model dict.
        paths: Of the taps.
        scale: Of the images that the detector is given to those in whose pixels the strides are told.

    Raises:
        TapError: A path does not exist in backbone, neck or encoder.
        TeacherError: See :func:`check_branches`.
    """
    paths = tuple(paths)
    check_branches(model)
    if not paths:
        return {}
    foreign = [path for path in paths if path.split('.')[0] not in ('backbone', 'neck', ENCODER)]
    if foreign:
        raise TapError(f"Taps read backbone, neck or encoder; '{foreign[0]}' is in none of them.")
    whole = any(map(is_within_encoder, paths)) or 'kept' in model

    def probe(extractor: nn.Module) -> dict[str, tuple[LevelSpec, ...]]:
        found = probe_levels(extractor, Taps(extractor, paths))
        return found if scale == 1 else {path: tuple(LevelSpec(level.channels, _divide(level.stride, scale))
                                                     for level in levels) for path, levels in found.items()}

    def build() -> nn.Module:  # of a DETR with its encoder, and of what was pruned, there is only the whole
        return build_detector(model) if whole else FeatureExtractor(model)

    with preserved_randomness():
        try:
            with torch.device('meta'):
                extractor = build().to('meta')
            return probe(extractor)
        except (NotImplementedError, RuntimeError) as error:
            # Some backbones compute with numbers while they are built (Swin's drop rates), which meta tensors lack.
            if isinstance(error, TapError):
                raise
            return probe(build())


def _divide(stride: Stride, scale: float) -> Stride:
    divided = stride / scale
    return int(divided) if divided.is_integer() else divided


def probe_heads(config: ModelConfig, names: Iterable[str]) -> dict[HeadRequest, HeadForm]:
    """Builds those heads of a teacher that are asked for as towers or dense outputs, and lets them go again.

    Of an absent head, or one that can not be read, the teacher says so when it is loaded; of towers it is said here,
    for the term is connected by their widths.

    Args:
        config: See :func:`~kd_det.config.detectors.read_model_config`.
        names: See :class:`~kd_det.heads.HeadRequest`.

    Returns:
        Name -> form.

    Raises:
        HeadError: A head of which towers are asked is absent, or has none.
    """
    requests = list(map(HeadRequest.parse, names))
    if not requests:
        return {}
    model, forms = read_model_config(config), {}
    for request in (each for each in requests if each.part in ('', 'towers') and each != ROI_HEAD):
        try:
            check_head(get_type_name(model), find_head_classes(model), request)
        except HeadError as error:
            if request.part != 'towers':
                continue
            raise HeadError(f"A term learns from the teacher's {request}. {error}") from error
        with preserved_randomness(), within_scope(model.get('_scope_')):
            head = MODELS.build(model[request.head]) if 'kept' not in model else getattr(build_detector(model),
                                                                                         request.head)
        forms[request] = measure_head(head, request)
    return {request: form for request, form in forms.items() if form is not None}


def check_branches(model: dict) -> None:
    """Checks that a teacher has one answer for each image of a batch.

    Args:
        model: Its model dict.

    Raises:
        TeacherError: It is a TridentNet that answers by all of its branches: terms would compare images with the first
            branch, or in a batch of one with all of them, and its boxes of a larger batch are joined across images.
    """
    backbone = model.get('backbone')
    if isinstance(backbone, dict) and backbone.get('test_branch_idx') == -1:
        raise TeacherError(f'The teacher, a {get_type_name(model)} with test_branch_idx=-1, puts out features and '
                           'predictions of every branch, and joins those of several images. Set test_branch_idx=1 in '
                           'its backbone and its roi_head, as MMDetection does; the weights are the same for all '
                           'branches.')


def find_input_channels(model: nn.Module) -> int:
    """Finds the number of channels of the images that a detector takes.

    Configs say it in many ways or not at all, so the first layer that runs is asked: a blank image is passed through
    the detector as far as that. A stem that first takes cells apart, as YOLOX's does, gives it several times as many.

    Args:
        model: A detector, or a :class:`FeatureExtractor`.

    Returns:
        The number; 3 where the forward ends before a convolution or batch normalisation.
    """

    def stop(module: nn.Module, inputs: tuple) -> None:
        wanted = _read_channels(module)
        if wanted and inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].dim() == 4:
            raise _FirstLayerReached(inputs[0].shape[1], wanted)

    anchor = next(model.parameters())
    handle = register_module_forward_pre_hook(stop)
    try:
        for channels in LIKELY_CHANNELS:
            image = torch.zeros(1, channels, PROBE_SIZE, PROBE_SIZE, device=anchor.device, dtype=anchor.dtype)
            try:
                with preserved_randomness(), torch.no_grad():
                    model.extract_feat(image)
                break
            except _FirstLayerReached as reached:
                return channels * reached.wanted // reached.shown
            except Exception:  # of the model's own: before that layer something else wants other channels
                continue
    finally:
        handle.remove()
    return LIKELY_CHANNELS[0]


def find_prior_strides(model: nn.Module) -> tuple[Stride, ...]:
    """Finds the strides of a dense head's priors in pixels, ``()`` where it has none."""
    if isinstance(model, FeatureExtractor):
        return read_strides(model.strides)
    priors = getattr(getattr(model, 'bbox_head', None), 'prior_generator', None)
    return read_strides(getattr(priors, 'strides', ()))


class FeatureExtractor(nn.Module):
    """The backbone and neck of a detector, from its model dict.

    Args:
        model: A model dict with ``backbone`` and perhaps ``neck``.

    Attributes:
        strides: Those of its anchors, where its ``bbox_head`` names them.
    """

    def __init__(self, model: dict) -> None:
        super().__init__()
        with within_scope(model.get('_scope_')):
            self.backbone = MODELS.build(model['backbone'])
            self.neck = MODELS.build(model['neck']) if model.get('neck') else None
        head = model.get('bbox_head')
        head = head if isinstance(head, dict) else {}  # some detectors have a list of them
        self.strides = (head.get('anchor_generator') or head).get('strides') or ()

    def extract_feat(self, images):
        features = self.backbone(images)
        return features if self.neck is None else self.neck(features)


def make_shape_samples(batch_shape: Sequence[int], image_shapes: Sequence[tuple[int, int]]) -> list[DetDataSample]:
    """Makes data samples that tell what is padding, and nothing else.

    Args:
        batch_shape: Height and width of the padded batch.
        image_shapes: Height and width of each image within it.
    """
    return [DetDataSample(metainfo=dict(img_shape=tuple(shape), batch_input_shape=tuple(batch_shape)))
            for shape in image_shapes]


def run_encoder(model: nn.Module, features: Features, samples: Sequence[DetDataSample]) -> Tensor:
    """Runs the encoder of a DETR, without its decoder.

    Args:
        model: The detector.
        features: What its neck puts out.
        samples: See :func:`make_shape_samples`.

    Returns:
        (N, tokens, C).
    """
    inputs, _ = model.pre_transformer(features, samples)
    return model.forward_encoder(**inputs)['memory']


def _pass_tokens(model: nn.Module, path: str, maps: Features, size: int) -> None:
    """Shows a tap in an encoder what the encoder would be given."""
    module, batch_shape = find_module(model, path), (size, size)
    tokens = model.pre_transformer(maps, make_shape_samples(batch_shape, [batch_shape]))[0]['feat']
    module.forward = lambda query: query  # on the instance, before the class's
    try:
        module(tokens)
    finally:
        del module.forward


def _read_channels(module: nn.Module) -> int | None:
    """Reads the channels that a convolution or batch normalisation has weights for; None for another module."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    weight = module._parameters.get('weight')
    return weight.shape[1] * getattr(module, 'groups', 1) if weight is not None and weight.dim() == 4 else None


class _FirstLayerReached(Exception):
    """Ends a forward at the first layer with a fixed number of input channels.

    Args:
        shown: Channels that it was shown.
        wanted: Channels that it has weights for.
    """

    def __init__(self, shown: int, wanted: int) -> None:
        super().__init__(shown, wanted)
        self.shown, self.wanted = shown, wanted
