"""What kind a detector is, told by its heads; the kinds that the methods are tried on; and detectors within others."""
from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import NamedTuple

from mmdet.models.dense_heads import (
    ATSSHead,
    ConditionalDETRHead,
    DABDETRHead,
    DeformableDETRHead,
    DETRHead,
    DINOHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RPNHead,
    RTMDetSepBNHead,
    SSDHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.detectors import BaseDetector, KnowledgeDistillationSingleStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.utils import import_modules_from_strings
from torch import nn

from kd_det.config.choices import FAMILIES
from kd_det.config.files import (
    DISTILLER,
    ConfigurationError,
    get_type_name,
    is_distillation,
    list_imports,
    load_config,
)
from kd_det.heads.request import HEADS
from kd_det.registry import HOME, find_class, get_scope, within_scope

ModelConfig = str | Path | dict
HeadClasses = dict[str, type[nn.Module]]  # by their name in the detector

ANCHOR_FREE_HEADS = ('AnchorFreeHead', 'YOLOXHead', 'CenterNetHead')

# Each is in tests/matrix, with every method that serves it.
DETECTORS: dict[str, HeadClasses] = {
    'RetinaNet': dict(bbox_head=RetinaHead),
    'ATSS': dict(bbox_head=ATSSHead),
    'GFL': dict(bbox_head=GFLHead),
    'FCOS': dict(bbox_head=FCOSHead),
    'RTMDet': dict(bbox_head=RTMDetSepBNHead),
    'YOLOX': dict(bbox_head=YOLOXHead),
    'SSD': dict(bbox_head=SSDHead),
    'YOLOv3': dict(bbox_head=YOLOV3Head),
    'Faster R-CNN': dict(rpn_head=RPNHead, roi_head=StandardRoIHead),
    'Cascade R-CNN': dict(rpn_head=RPNHead, roi_head=CascadeRoIHead),
    'Mask R-CNN': dict(rpn_head=RPNHead, roi_head=StandardRoIHead),
    'DETR': dict(bbox_head=DETRHead),
    'Conditional DETR': dict(bbox_head=ConditionalDETRHead),
    'DAB-DETR': dict(bbox_head=DABDETRHead),
    'Deformable DETR': dict(bbox_head=DeformableDETRHead),
    'DINO': dict(bbox_head=DINOHead)}


def find_head_classes(model: dict) -> HeadClasses:
    """The classes of a detector's heads, from its model dict.

    Raises:
        ConfigurationError: One is in no registry.
    """
    classes = {}
    for name in HEADS:
        head = model.get(name)
        if head:
            with within_scope(model.get('_scope_')):
                found = find_class(MODELS, head)
            if found is None:
                raise ConfigurationError(f"model.{name}: there is no '{head['type']}' among MMDetection's models. "
                                         'If it is your own, import it with custom_imports.')
            classes[name] = found
    return classes


def has_one_level(heads: HeadClasses) -> bool:
    """Whether a detector has features of one level alone, as the DETRs without deformable attention."""
    head = heads.get('bbox_head', nn.Module)
    return issubclass(head, (DETRHead, ConditionalDETRHead, DABDETRHead)) and not issubclass(head, DeformableDETRHead)


def find_family(detector: str, heads: HeadClasses) -> str:
    """Tells to which of :data:`~kd_det.config.choices.FAMILIES` a detector belongs.

    Args:
        detector: Its type, for the message.
        heads: See :func:`find_head_classes`.

    Raises:
        ConfigurationError: It has neither a RoI head nor a dense head.
    """
    if 'roi_head' in heads:
        return 'two_stage'
    if 'bbox_head' not in heads:
        raise ConfigurationError(f'A {detector} has neither roi_head nor bbox_head: its family is not known. '
                                 f"Choose the weights yourself with --family {{{','.join(FAMILIES)}}}.")
    if issubclass(heads['bbox_head'], DETRHead):
        return 'detr'
    ancestors = {ancestor.__name__ for ancestor in heads['bbox_head'].__mro__}
    return 'anchor_free' if ancestors.intersection(ANCHOR_FREE_HEADS) else 'one_stage'


def teachers_of(config: Config) -> list[tuple[str, dict]]:
    """Name and config of each frozen detector that teaches, those within an ensemble too; none for a plain detector."""
    return [(name, guide) for name, guide in guides_of(config) if 'type' not in guide]


def guides_of(config: Config) -> list[tuple[str, dict]]:
    """Name and config of each guide, those within an ensemble too; none for a plain detector."""
    found = config.model.get('teacher', ()) if is_distillation(config) else ()
    return list(_guides_within({'teacher': found} if isinstance(found, dict) else
                               {f'teacher {index}': teacher for index, teacher in enumerate(found)}))


def _guides_within(guides: dict[str, dict]) -> Iterator[tuple[str, dict]]:
    for name, guide in guides.items():
        yield name, guide
        if 'type' in guide:
            yield from _guides_within({f'{name}.of[{index}]': each for index, each in enumerate(list_members(guide))})


def list_members(guide: dict) -> list[dict]:
    """The configs of the guides that one is made of; none for a ``Fusion``, which is made of learners."""
    return [each for each in guide.get('of', ()) if isinstance(each, dict)]


# --------------------------------------------------------------------------------------------- detectors within others

class Inner(NamedTuple):
    """A detector within another model.

    Attributes:
        path: Where in the model dict it stands: ``'detector'``, ``'module.detector'``.
        model: Its model dict, able to read images: with a preprocessor, which it may share with what it is within.
    """
    path: str
    model: ConfigDict


def find_inner_detectors(model: dict) -> Iterator[Inner]:
    """Finds the detectors within a model that is none itself: a semi-supervised pair, a tracker, an augmented test.

    A detector has a backbone, and heads beside it; whatever stands within those does not count.
    """
    if 'backbone' in model:
        return
    for name, part in model.items():
        if not get_type_name(part):
            continue
        part = copy.deepcopy(part if isinstance(part, ConfigDict) else ConfigDict(part))
        if model.get('_scope_'):
            part.setdefault('_scope_', model['_scope_'])
        if _is_detector(part):
            if not part.get('data_preprocessor') and model.get('data_preprocessor'):
                part.data_preprocessor = _make_image_preprocessor(model['data_preprocessor'])
            yield Inner(name, part)
        else:
            yield from (Inner(f'{name}.{inner.path}', inner.model) for inner in find_inner_detectors(part))


def _is_detector(model: dict) -> bool:
    if 'backbone' not in model:
        return False
    with within_scope(model.get('_scope_')):
        kind = find_class(MODELS, model)
    return isinstance(kind, type) and issubclass(kind, BaseDetector) or any(head in model for head in HEADS)


def _make_image_preprocessor(preprocessor: dict) -> ConfigDict:
    """The preprocessor of a single detector, out of that of branches or of videos."""
    if 'data_preprocessor' in preprocessor:
        return preprocessor['data_preprocessor']
    settings = {key: value for key, value in preprocessor.items() if key != 'use_det_processor'}
    is_of_videos = get_type_name(preprocessor) == 'TrackDataPreprocessor'
    return ConfigDict(settings, type=f'{HOME}.DetDataPreprocessor') if is_of_videos else ConfigDict(settings)


def find_detector(model: dict, whose: str) -> ConfigDict:
    """The detector that a model dict is of: itself, the only one within it, or the plain one of a distillation.

    Args:
        model: The model dict; stays as it is.
        whose: Begins the message: ``"The model of the teacher's config 'a.py'"``.

    Raises:
        ConfigurationError: There are several within it.
    """
    within = list(find_inner_detectors(model))
    if len(within) > 1:
        raise ConfigurationError(f'{whose} ({get_type_name(model)}) holds several detectors: '
                                 f'{_name_detectors(within)}. Give a config whose model is the one that is meant.')
    return extract_plain_detector(within[0].model if within else model)


def check_student(model: dict, whose: str, file: str = '') -> None:
    """Checks that a model is a detector, and holds none: data, hooks and loops of such a config are made for the whole.

    Args:
        model: The student's model dict.
        whose: Begins the message.
        file: Of its config; the message then has the lines of one of the detector within.

    Raises:
        ConfigurationError: It holds detectors; the message names them.
    """
    within = list(find_inner_detectors(model))
    if within:
        remedy = (f'Write a config beside it, and give that as the student:\n{_config_lines(within[0], model, file)}\n'
                  'with data, hooks and loops of a plain detector, where those are made for the '
                  f'{get_type_name(model)}.'
                  if file else f"Put its part '{within[0].path}' in its place.")
        raise ConfigurationError(f'{whose} ({get_type_name(model)}) is no detector itself, but holds '
                                 f'{_name_detectors(within)}. {remedy}')


def _name_detectors(within: Iterable[Inner]) -> str:
    return ' and '.join(f'model.{inner.path} ({get_type_name(inner.model)})' for inner in within)


def _config_lines(inner: Inner, model: dict, file: str) -> str:
    """The lines of a config of a detector within the model of another."""
    outer = model
    for key in inner.path.split('.'):
        outer = outer[key]
    preprocessor = '' if outer.get('data_preprocessor') or not inner.model.get('data_preprocessor') else \
        f', data_preprocessor={inner.model.data_preprocessor.to_dict()}'
    if Path(file).is_file() and Config._is_lazy_import(file):
        return ('  from mmengine.config import read_base\n  with read_base():\n'
                f'      from .{Path(file).stem} import *\n  model = dict(**model.{inner.path}{preprocessor})')
    base = file if '::' in file else f'./{Path(file).name}'
    return f"  _base_ = '{base}'\n  model = dict(_delete_=True, **_base_.model.{inner.path}{preprocessor})"


def extract_plain_detector(model: dict) -> ConfigDict:
    """The detector itself where a model dict is of one that MMDetection distils, as LD; any other as it is.

    Its own teacher goes, and its head gives way to the one that it is derived from and that learns from boxes alone.
    """
    with within_scope(model.get('_scope_')):
        kind, head = find_class(MODELS, model), model.get('bbox_head')
        if not isinstance(kind, type) or not issubclass(kind, KnowledgeDistillationSingleStageDetector):
            return model
        plain = copy.deepcopy(model if isinstance(model, ConfigDict) else ConfigDict(model))
        _replace_class(plain, kind, next(each for each in kind.__mro__ if not _list_teacher_arguments(each)))
        head_kind = find_class(MODELS, head)
        _replace_class(plain.bbox_head, head_kind, next(filter(_learns_from_boxes, head_kind.__mro__), head_kind))
    return plain


def _replace_class(config: ConfigDict, kind: type, plain: type) -> None:
    """Writes a class's ancestor in its place, without the arguments that the ancestor does not have."""
    if plain is kind:
        return
    taken = _list_arguments(plain.__mro__)
    for name in _list_arguments(each for each in kind.__mro__ if each not in plain.__mro__) - taken:
        config.pop(name, None)
    config.type = (f'{HOME}.{plain.__name__}' if MODELS.get(f'{HOME}.{plain.__name__}') is plain
                   else f'{plain.__module__}.{plain.__qualname__}')


def _list_arguments(classes: Iterable[type]) -> set[str]:
    return {name for each in classes if '__init__' in vars(each) for name, parameter
            in signature(each.__init__).parameters.items()
            if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}


def _list_teacher_arguments(kind: type) -> set[str]:
    return {name for name in _list_arguments(kind.__mro__) if name.startswith('teacher_')}


def _learns_from_boxes(head: type) -> bool:
    """Whether a head computes its loss of features and ground truth, and asks for nothing of a teacher."""
    return hasattr(head, 'loss') and list(signature(head.loss).parameters) == ['self', 'x', 'batch_data_samples']


class TeacherError(ValueError):
    """The teacher can not serve as its config says."""


def read_model_config(config: ModelConfig) -> ConfigDict:
    """Returns the model dict of a detector, with the scope of its config, see :mod:`kd_det.registry`.

    Of a student that was itself distilled it is the student; of a model that holds one detector, as a semi-supervised
    pair or a tracker does, that one; of one that MMDetection's own distillation trains, the plain detector.

    Args:
        config: A config file, a name such as ``'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'``, a whole config
            as a dict (with a key ``model``), or a model dict (with a key ``type``), whose scope is that of the config
            that it stands in.

    Raises:
        TeacherError: The config holds no model.
        FileNotFoundError: There is no such file.
        ConfigurationError: The file has an error, or the model holds several detectors.
    """
    loaded = load_config(config) if isinstance(config, (str, Path)) else ConfigDict(config)
    model = loaded.get('model', loaded)
    if not get_type_name(model):
        raise TeacherError(f"The teacher's config {config!r:.200} holds no model: expected a key 'model', or a model "
                           "dict with a 'type'.")
    model = copy.deepcopy(model.student if get_type_name(model) == DISTILLER else model)  # building may write into it
    if 'model' in loaded:
        import_modules_from_strings(list_imports(loaded))  # a file's are imported as it is read, a dict's are not
        model.setdefault('_scope_', get_scope(loaded))
    return find_detector(model, f"The model of the teacher's config {config!r:.200}")
