"""A frozen backbone without a head as teacher: a model of timm, or a backbone of MMDetection or MMPretrain."""
from __future__ import annotations

import math
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Len
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness
from kd_det.config import suggest_names
from kd_det.config.arguments import ArgumentError, Count, Name, Positive, declared, refuse
from kd_det.config.detectors import TeacherError
from kd_det.config.files import explain_build_error, get_type_name
from kd_det.context import LevelSpec
from kd_det.registry import within_scope
from kd_det.taps import Features
from kd_det.teachers.bridge import Shape, explain_size_mismatch
from kd_det.teachers.engine import take_from_first_rank
from kd_det.teachers.features import FeatureGuide, check_normalization, describe_value, make_bridge, to_stride
from kd_det.teachers.guide import Guide, Reading
from kd_det.teachers.loading import load_strictly, remove_pretrained
from kd_det.teachers.probe import PROBE_SIZE, FeatureExtractor, find_input_channels

CLASSIFIERS = re.compile(r'^(?:head|head_dist|fc|classifier|heads)\.')  # what a backbone's file has and it has not
STRIDE = 32  # pixels, of which a blank image has a multiple
# By which models of timm take images of any size, in the order in which they are tried.
ANY_SIZE: tuple[dict[str, bool], ...] = (dict(dynamic_img_size=True), dict(strict_img_size=False), {})


class TimmBackbone(nn.Module):
    """A model of timm without its classifier, as a backbone that puts out maps.

    The tokens of a ViT become one map, without those of class and registers, after the last normalisation.

    Args:
        name: Of the model, as timm lists it.
        out_indices: Which of its maps, see :class:`Backbone`.

    Attributes:
        default_cfg: timm's, with mean and standard deviation of images from 0 to 1.
        largest_stride: In pixels.
    """

    def __init__(self, name: str, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        import timm  # an extra: kd-det[backbones]
        if not timm.is_model(name):
            raise ArgumentError('name', f"timm {timm.__version__} has no model '{name}'. "
                                + suggest_names(name.partition('.')[0], timm.list_models()))
        for keywords in ANY_SIZE:
            try:
                self.model = timm.create_model(name, pretrained=False, num_classes=0, **keywords)
                break
            except TypeError:
                if not keywords:
                    raise
            except RuntimeError as error:  # of a name with the tag of weights that there are not
                raise ArgumentError('name', f"timm {timm.__version__} can not build '{name}': "
                                    f"{str(error).rstrip('.')}.") from error
        reductions = [each['reduction'] for each in self.model.feature_info]
        self.default_cfg, self.largest_stride = self.model.default_cfg, max(reductions)
        self._is_columnar = len(set(reductions)) == 1
        self._indices = list(out_indices) if out_indices is not None else 1 if self._is_columnar else None
        self._architecture = sys.modules[timm.model_entrypoint(name).__module__]

    def forward(self, images: Tensor) -> Features:
        """(N, C, H, W), the sides multiples of the largest stride, to the maps, (N, C', h, w)."""
        return tuple(self.model.forward_intermediates(images, indices=self._indices, norm=self._is_columnar,
                                                      stop_early=True, output_fmt='NCHW', intermediates_only=True))

    def rename(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Renames weights, as timm does, from the names that their authors gave.

        Positions are interpolated to the model's size of image. What else timm would make fit, such as patches of
        another size, stays as it is, and is refused when it is loaded.
        """
        convert = getattr(self._architecture, 'checkpoint_filter_fn', None)
        if convert is None:
            return state
        try:
            renamed = convert(state, self.model)
        except TypeError:  # of models whose renaming asks for the weights alone; so does timm
            renamed = convert(state)
        return {key: state[key] if 'pos' not in key and key in state and state[key].numel() != value.numel() else value
                for key, value in renamed.items()}


@MODELS.register_module()
class Backbone(FeatureGuide):
    """A frozen backbone without a head as teacher of features: a foundation model, or what was trained to classify.

    Its maps stand for every path that terms tap: each level of the student's learns from the map of the nearest stride,
    resampled to the student's cells. It sees the student's batch in its own normalisation, padded at the right and
    bottom to multiples of its largest stride, which is the patch of a ViT, with the mean colour.

    Args:
        name: A model of timm, such as ``'vit_small_patch16_dinov3'``; a tag after a dot chooses the normalisation of
            those weights. For that install ``kd-det[backbones]``.
        config: The dict of a backbone of MMDetection, MMPretrain or one's own instead:
            ``dict(type='mmdet.ResNet', depth=50, …)``.
        checkpoint: A file of weights on this machine, ``.pth`` or ``.safetensors``; loaded strictly, but for a
            classifier in it.
        random_teacher: Draw all weights; for tests and dry runs only.
        mean: Of each channel, of images from 0 to 255; by default that of the model in timm. A ``config`` does not tell
            it.
        std: Likewise.
        bgr_to_rgb: Whether its channels are red, green and blue.
        out_indices: Which maps of a model of timm, by index; by default the last of a ViT, and all of a model with
            several strides.
        image_size: Height and width that each batch is resized to; for models that take one size alone. Its maps still
            lie on what they show.
        allow_missing: See :func:`~kd_det.teachers.loading.load_strictly`.
        allow_unexpected: See :func:`~kd_det.teachers.loading.load_strictly`.
        checkpoint_prefix: See :func:`~kd_det.teachers.loading.load_strictly`; ``'backbone.'`` of a detector's file.

    Raises:
        ArgumentError: An argument does not fit, or there is no such model.
        TeacherError: No checkpoint and not ``random_teacher``, or both.
    """

    @declared
    def __init__(self,
                 name: Name | None = None,
                 config: dict[str, Any] | None = None,
                 checkpoint: Name | Path | None = None,
                 random_teacher: bool = False,
                 mean: Sequence[float] | None = None,
                 std: Sequence[Positive] | None = None,
                 bgr_to_rgb: bool = True,
                 out_indices: Sequence[int] | None = None,
                 image_size: Annotated[Sequence[Count], Len(2, 2)] | None = None,
                 allow_missing: Sequence[Name] = (),
                 allow_unexpected: Sequence[Name] = (),
                 checkpoint_prefix: str | None = None) -> None:
        super().__init__()
        if (name is None) == (config is None):
            refuse('name' if name is None else 'config', name or config, 'either the name of a model of timm, or the '
                   'config of a backbone')
        if config is not None and out_indices is not None:
            refuse('out_indices', out_indices, 'none beside a config, which has its own: config.out_indices')
        if name is not None and ('/' in name or ':' in name):
            refuse('name', name, 'the name of a model of timm', 'Weights are read from this machine alone: checkpoint.')
        check_normalization(mean, std)
        if config is not None and mean is None:
            refuse('mean', None, 'how images are normalised for it',
                   "ImageNet's usual: mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375].")
        if not checkpoint and not random_teacher:
            raise TeacherError('The Backbone has no checkpoint: set checkpoint to the file of its weights. A random '
                               'one teaches noise; for a dry run say so with random_teacher=True.')
        if checkpoint and random_teacher:
            raise TeacherError(f"random_teacher=True contradicts checkpoint='{checkpoint}': remove one.")
        if checkpoint and '://' in str(checkpoint):
            refuse('checkpoint', checkpoint, 'a file on this machine', 'Download it, and give its path.')
        self._config = dict(config) if config is not None else dict(type=TimmBackbone, name=name,
                                                                    out_indices=out_indices)
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self._mean, self._std, self._bgr_to_rgb, self._image_size = mean, std, bgr_to_rgb, tuple(image_size or ())
        self._loading = dict(allow_missing=allow_missing, allow_unexpected=allow_unexpected,
                             checkpoint_prefix=checkpoint_prefix)
        self._specs: tuple[LevelSpec, ...] = ()

    def find_specs(self, path: str) -> tuple[LevelSpec, ...]:
        if not self._specs:
            with preserved_randomness():
                try:
                    with torch.device('meta'):
                        extractor = self._build().to('meta')
                    self._specs = self._probe(extractor)
                except (NotImplementedError, RuntimeError) as error:
                    # Some backbones compute with numbers while they are built, which meta tensors lack.
                    if isinstance(error, TeacherError):
                        raise
                    self._specs = self._probe(self._build())
        return self._specs

    def _build(self) -> FeatureExtractor:
        try:
            with within_scope(self._config.get('_scope_')):
                return FeatureExtractor(dict(backbone=remove_pretrained(self._config))).requires_grad_(False).eval()
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            if isinstance(error, (ArgumentError, TeacherError)):
                raise
            package = str(self._config.get('type', '')).partition('.')[0]
            if isinstance(error, KeyError) and '.' in str(self._config['type']) and find_spec(package) is None:
                raise ArgumentError('config.type', f"there is no package '{package}' that would have "
                                    f"'{self._config['type']}': install it.") from error
            raise ArgumentError('config', explain_build_error(error, self._config)) from error

    @torch.no_grad()
    def _probe(self, extractor: FeatureExtractor) -> tuple[LevelSpec, ...]:
        """Finds the form of the maps by one blank image."""
        backbone, channels = extractor.backbone, find_input_channels(extractor)
        multiple = math.lcm(STRIDE, round(getattr(backbone, 'largest_stride', STRIDE)))
        size = self._image_size or (-(-PROBE_SIZE // multiple) * multiple, ) * 2
        device = next(extractor.parameters()).device
        try:
            maps = extractor.extract_feat(torch.zeros(1, channels, *size, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, NotImplementedError) or device.type == 'meta' and 'meta' in str(error):
                raise
            raise TeacherError(f'The Backbone {self._label} can not be run on images of {size[0]} × {size[1]} pixels: '
                               f"{str(error).rstrip('.')}. If it takes one size alone, name it: "
                               'image_size=(height, width), to which each batch is then resized.') from error
        if not isinstance(maps, (tuple, list)) or not maps or not all(
                isinstance(level, Tensor) and level.dim() == 4 for level in maps):
            raise TeacherError(f'The Backbone {self._label} puts out {describe_value(maps)}, where a tuple of maps '
                               "(N, C, H, W) is needed. A ViT of MMPretrain gives them with out_type='featmap'.")
        return tuple(LevelSpec(level.shape[1], to_stride(size[0] / level.shape[-2])) for level in maps)

    @property
    def _label(self) -> str:
        return str(self._config['name']) if self._config['type'] is TimmBackbone else get_type_name(self._config)

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Guide:
        specs, model = self.find_specs(''), self._load()
        backbone, channels = model.backbone, find_input_channels(model)
        mean, std = self._mean, self._std
        if mean is None:
            mean, std = ([255 * each for each in backbone.default_cfg[key]] for key in ('mean', 'std'))
        divisor = 1 if self._image_size else math.ceil(max(spec.stride for spec in specs))
        bridge = make_bridge(learners[0].data_preprocessor, mean, std, self._bgr_to_rgb, channels, divisor)
        self.settle(model, bridge, next(learners[0].parameters()))
        return self

    def _load(self) -> FeatureExtractor:
        """Builds it with the weights of its file, or at random."""
        with preserved_randomness():
            model = self._build()
            if self.checkpoint is None and self._config['type'] is not TimmBackbone:
                with within_scope(self._config.get('_scope_')):  # some modules' weights are of no value before
                    model.backbone.init_weights()
        if self.checkpoint is None:
            take_from_first_rank(model.state_dict().values())
        else:
            load_strictly(model.backbone, self.checkpoint, **self._loading,
                          convert=partial(self._convert, model.backbone))
        return model

    def try_weights(self) -> str | None:
        if self.checkpoint is None:
            return None
        self._load()
        return f'fit {self._label}'

    def _convert(self, backbone: nn.Module, state: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Gives the weights of a file the names that the backbone has, and leaves its classifier aside."""
        prefix = ''
        if isinstance(backbone, TimmBackbone):
            prefix, state = 'model.', OrderedDict(
                (f'model.{key}', value) for key, value in backbone.rename(state).items())
        own = backbone.state_dict()
        aside = [key for key in state if key not in own and CLASSIFIERS.match(key.removeprefix(prefix))]
        if aside:
            print_log(f"Of '{self.checkpoint}' the classifier is left aside, which a Backbone has not: "
                      + ', '.join(key.removeprefix(prefix) for key in aside), 'current')
        for key in aside:
            del state[key]
        return state

    def compute_maps(self, images: Tensor, image_shapes: Sequence[Shape]) -> Mapping[str, Features]:
        if self._image_size:
            images = F.interpolate(images, self._image_size, mode='bilinear', align_corners=False, antialias=True)
        with explain_size_mismatch(images.shape[-2:]):
            maps = tuple(self.weights.extract_feat(images))
        return dict.fromkeys(self._sources, maps)
