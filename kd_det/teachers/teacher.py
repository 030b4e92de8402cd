"""The frozen teacher: loaded strictly, run through the input bridge as far as its taps and heads are read, no further.

What nothing reads is not computed: modules after the last tap, where no head is read (:class:`~kd_det.taps.Taps` ends
the forward), and the finer and coarser levels of an FPN (:func:`cut_pyramid`).
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mmdet
import torch
from mmdet.models.necks import FPN
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det import __version__
from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Name, Names, Positive, at, check_arguments, check_keys, declared
from kd_det.config.classes import count_classes
from kd_det.config.detectors import ModelConfig, TeacherError, read_model_config
from kd_det.heads import ROI_HEAD, HeadError, StudentOutputs, TeacherForward, TeacherOutputs, find_head, run_heads
from kd_det.heads.capture import can_be_kept, list_moments, read_maps, record_maps
from kd_det.registry import build_detector, within_scope
from kd_det.taps import ENCODER, Features, TapError, Taps, is_within_encoder, record_calls
from kd_det.teachers.bridge import InputBridge, Shape, crop_to_batch, explain_size_mismatch
from kd_det.teachers.cache import Outputs, TeacherCache
from kd_det.teachers.engine import Engine, Precision, hash_weights, take_from_first_rank
from kd_det.teachers.guide import Guide, GuideForm, LearnerStep, Reading, ReadLevels
from kd_det.teachers.loading import explain_model_errors, find_class_names, load_strictly, remove_pretrained
from kd_det.teachers.probe import find_input_channels, make_shape_samples, probe_config, probe_heads, run_encoder

NOT_OF_CONFIGS = ('taps', 'heads', 'student_preprocessor')  # arguments of a Teacher that the distiller gives it
NECK = 'neck'
VERSIONS = torch.__version__, mmdet.__version__, __version__  # of what computes a teacher's outputs


def check_teacher_arguments(config: Mapping[str, Any]) -> None:
    """Checks what a config says of a teacher, without building it.

    Raises:
        ArgumentError: An argument that there is not, that lacks, or whose value does not fit.
    """
    check_arguments(Teacher, config, internal=NOT_OF_CONFIGS)
    if config.get('cache') is not None:
        with at('cache'):
            check_arguments(TeacherCache, config['cache'])


class FrozenDetector(Guide):
    """The kind of guide that a config without a ``type`` names: a :class:`Teacher`, before anything of it is loaded.

    Args:
        config: The arguments of the :class:`Teacher`, as a config gives them. They are read when training starts.

    Raises:
        ArgumentError: An argument that there is not, that lacks, or whose value does not fit.
    """

    offers_features = offers_heads = detects = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        check_teacher_arguments(config)
        self.config = config

    def check(self, reading: Reading) -> None:
        if reading.heads and self.config.get('scale', 1.0) != 1:
            raise HeadError(f"it reads the outputs of the teacher's {next(iter(reading.heads))}, which with "
                            f"model.teacher.scale={self.config['scale']} lie elsewhere than the student's. Remove the "
                            'scale, or this term: features can be compared.')
        uncached = [head for head in reading.heads if not can_be_kept(head)] if self.config.get('cache') else []
        if uncached:
            why = (', which depend on the regions that the student samples in each step' if uncached[0] == ROI_HEAD
                   else '')
            raise HeadError(f"it reads the outputs of the teacher's {uncached[0]}{why}: a cache keeps features and the "
                            'maps of dense heads alone. Remove model.teacher.cache, or this term.')
        towers = [head for head in reading.heads if '.towers' in head]
        probe_heads(self.config['config'], towers)  # here, where the term is told that has asked for them

    def probe(self, reading: Reading, learners: Sequence[nn.Module], levels: Sequence[Any]) -> GuideForm:
        with explain_model_errors(self.config['config']):
            found = probe_config(read_model_config(self.config['config']), reading.taps, self.config.get('scale', 1.0))
            return GuideForm(found, probe_heads(self.config['config'], reading.heads))

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Teacher:
        teacher = Teacher(**self.config, taps=reading.taps, heads=reading.heads,
                          student_preprocessor=learners[0].data_preprocessor)
        return teacher.to_like(next(learners[0].parameters()))


class Teacher(Guide):
    """A frozen detector in evaluation mode with its taps and its input bridge.

    Args:
        config: See :func:`~kd_det.config.detectors.read_model_config`.
        checkpoint: File or address of the weights.
        random_teacher: Draw all weights, also those that the config would load; for tests and dry runs only.
        allow_missing: See :func:`~kd_det.teachers.loading.load_strictly`.
        allow_unexpected: See :func:`~kd_det.teachers.loading.load_strictly`.
        checkpoint_prefix: See :func:`~kd_det.teachers.loading.load_strictly`.
        classes: Names of its classes, by label; by default those that the checkpoint or the config names, see
            :func:`~kd_det.teachers.loading.find_class_names`.
        cache: The arguments of a :class:`~kd_det.teachers.cache.TeacherCache`, which keeps the outputs on disk; None
            for none. Outputs of heads must be of those that :func:`~kd_det.heads.capture.can_be_kept`.
        fuse: See :class:`~kd_det.teachers.engine.Engine`.
        channels_last: See :class:`~kd_det.teachers.engine.Engine`.
        precision: See :class:`~kd_det.teachers.engine.Engine`.
        compile: See :class:`~kd_det.teachers.engine.Engine`.
        shard: See :class:`~kd_det.teachers.engine.Engine`; not with a cache, which asks the teacher on one rank alone.
        scale: So many times as large as the student it sees the images. Levels are paired by their stride in the
            student's pixels, with ``resize=True`` of a term the nearest; outputs of heads can not be compared then.
        taps: Module paths whose outputs are read.
        heads: Heads whose outputs may be asked for, see :func:`~kd_det.heads.find_head`.
        student_preprocessor: The student's data preprocessor, whose batches the teacher is given.

    Attributes:
        classes: Names of its classes, by label; None where nothing tells them.
        num_classes: How many its head tells apart.
        num_parameters: How many weights it has.
        feature_sums: Of the last prediction, the sum of each level of the features that its heads were given; not
            finite where the level is not.

    Raises:
        TeacherError: No checkpoint and not ``random_teacher``, a head that is absent or can not be read, another number
            of classes than it has, or options that are unknown or do not go together.
        CheckpointError: The checkpoint does not fit.
    """

    offers_features = offers_heads = detects = True
    scale = 1.0  # of a teacher that is made of the student, which sees the student's own images

    @declared
    def __init__(self,
                 config: ModelConfig,
                 checkpoint: Name | Path | None = None,
                 random_teacher: bool = False,
                 allow_missing: Sequence[Name] = (),
                 allow_unexpected: Sequence[Name] = (),
                 classes: Names | None = (),
                 cache: dict[str, Any] | None = None,
                 fuse: bool = True,
                 channels_last: bool = True,
                 precision: Precision = 'float32',
                 compile: bool | dict[str, Any] = False,
                 shard: bool = False,
                 checkpoint_prefix: str | None = None,
                 scale: Positive = 1.0,
                 *,
                 taps: Iterable[str],
                 heads: Iterable[str] = (),
                 student_preprocessor: nn.Module) -> None:
        if not checkpoint and not random_teacher:
            raise TeacherError('The teacher has no checkpoint: set teacher.checkpoint to its weights. A random teacher '
                               'teaches noise; for a dry run say so with teacher.random_teacher=True.')
        if checkpoint and random_teacher:
            raise TeacherError(f"teacher.random_teacher=True contradicts teacher.checkpoint='{checkpoint}': remove "
                               'one.')
        if shard and cache is not None:
            raise TeacherError('model.teacher.shard and model.teacher.cache do not go together: ranks find different '
                               'images in a cache, but have to run a sharded teacher together. Remove one.')
        self.checkpoint, self.scale = checkpoint, scale
        self.engine = Engine(fuse, channels_last, precision, compile, shard)
        self._digests: tuple[str, str] | None = None  # of the weights as loaded, and as the engine runs them
        with preserved_randomness(), explain_model_errors(config):
            model_config = read_model_config(config)
            self._config = json.dumps(model_config.to_dict(), sort_keys=True, default=str)
            self.model = build_detector(remove_pretrained(model_config) if random_teacher else model_config)
            if random_teacher:  # some modules' weights are of no value before
                with within_scope(model_config.get('_scope_')):
                    self.model.init_weights()
                take_from_first_rank(self.model.state_dict().values())
        self.meta = load_strictly(self.model, checkpoint, allow_missing, allow_unexpected,
                                  checkpoint_prefix=checkpoint_prefix) if checkpoint else {}
        self.classes = find_class_names(count_classes(self.model), classes, self.meta, config)
        self._prepare(taps, heads, student_preprocessor)
        with at('cache'):
            check_keys(TeacherCache, cache or ())
            self.cache = None if cache is None else TeacherCache(**cache)
        self._last_fingerprint: tuple[tuple, str] = ((), '')
        self._tables: tuple[bool, list[dict[str, Tensor | None]]] | None = None

    def _prepare(self, taps: Iterable[str], heads: Iterable[str], student_preprocessor: nn.Module) -> None:
        """Freezes the model, and lets it be read."""
        self.model.eval().requires_grad_(False)
        self.num_classes = count_classes(self.model)
        self.detects = not hasattr(self.model, 'language_model')  # else it is asked by words, which no batch has
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        for name in heads:
            try:
                find_head(self.model, name)
            except HeadError as error:
                raise TeacherError(f"A term learns from the teacher's {name}. {error}") from error
        self.taps = Taps(self.model, taps)
        self.bridge = InputBridge(student_preprocessor, self.model.data_preprocessor,
                                  find_input_channels(self.model), self.scale)

    def to_like(self, parameter: Tensor) -> Teacher:
        """Moves the teacher to the device and floating-point type of ``parameter``."""
        return self._apply(lambda tensor: tensor.to(parameter.device,
                                                    parameter.dtype if tensor.is_floating_point() else None))

    def _apply(self, function) -> Teacher:
        self.model._apply(function)
        self.bridge._apply(function)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The weights as they were loaded.

        Raises:
            TeacherError: The teacher has run, and its engine has changed them.
        """
        if self._digests is not None and self._digests[0] != self._digests[1]:
            raise TeacherError('The weights of a teacher that has run are no longer those of its checkpoint. Let the '
                               'student inherit before the first step.')
        return self.model.state_dict()

    def start_engine(self) -> None:
        """Starts the engine, before the first forward and no sooner: until then the student may inherit."""
        if self._digests is None:
            loaded = hash_weights(self.model)
            self.engine.start(self.model)
            self._digests = loaded, hash_weights(self.model)

    @torch.no_grad()  # tensors of inference mode could not be saved for the backward pass, as the terms do
    def observe(self,
                images: Tensor,
                image_shapes: Sequence[tuple[int, int]],
                heads: Sequence[str] = (),
                student: StudentOutputs | None = None,
                taps: Sequence[str] | None = None,
                levels: ReadLevels | None = None,
                learners: Sequence[LearnerStep] = ()) -> tuple[dict[str, Features], TeacherOutputs]:
        """Runs the teacher as far as the taps read it, and some heads.

        Args:
            images: (N, C, H, W), preprocessed for the student.
            image_shapes: Height and width of each image within the batch.
            heads: Names of the heads to run.
            student: The student's outputs in this step, which hold the regions for the teacher's RoI head.
            taps: Which of the taps to read; all by default.
            levels: Of taps of which not all levels are read, which are. The others need not be computed, and stand as
                :class:`~kd_det.teachers.teacher.UnreadLevel` in the result.
            learners: Not read.

        Returns:
            Module path -> tuple of (N, C, H, W), and name of the head -> outputs; all without gradient. Where the
            bridge pads the batch, features and outputs of dense heads are cut back to the student's.

        Raises:
            TeacherError: The teacher can not be run on images of that size, or of so many channels.
        """
        own_images, taps = self.bridge(images, image_shapes), self.taps.paths if taps is None else tuple(taps)
        image_shapes = list(map(self.bridge.find_size, image_shapes))
        levels = {path: tuple(read) for path, read in (levels or {}).items() if path in taps}
        crop = partial(crop_to_batch, padded=own_images.shape[-2:],
                       batch_shape=self.bridge.find_size(images.shape[-2:]))
        if self.cache is not None:
            features, outputs = self._recall(own_images, image_shapes, heads, taps, levels, crop)
        else:
            features, outputs = self._run(own_images, image_shapes, heads, taps, levels, crop, student)
        features = {path: tuple(map(crop, group)) for path, group in features.items()}
        features.update({path: mark_unread(path, features[path], read) for path, read in levels.items()})
        return features, outputs

    def _run(self, images: Tensor, image_shapes: Sequence[Shape], heads: Sequence[str], taps: Sequence[str],
             levels: ReadLevels, crop: Callable[[Tensor], Tensor],
             student: StudentOutputs | None = None) -> tuple[dict[str, Features], TeacherOutputs]:
        """Runs a batch that has passed the bridge, as :meth:`observe`.

        Features are those of the whole batch of the teacher, and of each tap only the levels that are read.
        """
        self.start_engine()
        outputs: TeacherOutputs = {}
        # Heads, an encoder, and taps within the neck may read every level of the neck.
        neck_read = levels.get(NECK, ())
        whole = heads or any(is_within_encoder(path) or path.startswith(f'{NECK}.') for path in taps)
        pyramid = (nullcontext(range(len(neck_read))) if whole or not neck_read else
                   cut_pyramid(self.model.neck, neck_read))
        # Without heads the last tap ends the block, in the midst of the forward, see Taps.capture. Ranks that share a
        # sharded teacher have to let it end.
        stop = not heads and not self.engine.shard
        with pyramid as computed, self.taps.capture(taps, stop=stop) as features:
            samples = make_shape_samples(images.shape[-2:], image_shapes)
            with explain_size_mismatch(images.shape[-2:]):
                neck_levels = self.model.extract_feat(images)
            forward = TeacherForward(self.model, neck_levels, student, samples, crop)
            outputs = run_heads(heads, forward)
            if self.taps.awaits(ENCODER):  # a head that reads queries has run it
                run_encoder(self.model, forward.features, samples)
        for path, read in levels.items():
            indices = computed if path == NECK else range(len(read))
            features[path] = tuple(level for index, level in zip(indices, features[path]) if read[index])
        # The terms go through features channel by channel, as the student's lie.
        return {path: tuple(level.contiguous() for level in group) for path, group in features.items()}, outputs

    def _recall(self, images: Tensor, image_shapes: Sequence[Shape], heads: Sequence[str], taps: Sequence[str],
                levels: ReadLevels, crop: Callable[[Tensor], Tensor]) -> tuple[dict[str, Features], TeacherOutputs]:
        """Runs as :meth:`_run`, by way of the cache, which keeps what the teacher made of the padded batch."""

        def compute() -> Outputs:
            with record_maps(self.model, heads) as maps:
                features, outputs = self._run(images, image_shapes, heads, taps, levels, crop)
            return {**features, **maps, **list_moments(outputs)}

        question = repr((self._find_fingerprint(), self._config, self.engine, tuple(taps), levels, tuple(heads),
                         VERSIONS))
        kept = self.cache.recall(question, images, image_shapes, compute)
        features = {path: kept.pop(path) for path in taps}
        return features, read_maps(self.model, heads, {name: tuple(map(crop, maps)) for name, maps in kept.items()})

    def _find_fingerprint(self) -> str:
        """The fingerprint, computed again only where a weight was written to."""
        versions = tuple((tensor.data_ptr(), tensor._version) for table in self._list_tables()
                         for tensor in table.values() if tensor is not None)
        if self._last_fingerprint[0] != versions:
            self._last_fingerprint = versions, self.fingerprint()
        return self._last_fingerprint[1]

    def _list_tables(self) -> list[dict[str, Tensor | None]]:
        """The tables in which the modules of the model hold their weights; found once before the engine, once after."""
        if self._tables is None or self._tables[0] != (self._digests is None):
            tables = [table for module in self.model.modules() for table in (module._parameters, module._buffers)]
            self._tables = self._digests is None, [table for table in tables if table]
        return self._tables[1]

    @torch.no_grad()
    def extract_feat(self, images: Tensor, image_shapes: Sequence[Shape]) -> Features:
        """The features that its heads are given, of a batch preprocessed for the student and cut back to that."""
        self.start_engine()
        own_images = self.bridge(images, image_shapes)
        with explain_size_mismatch(own_images.shape[-2:]):
            levels = self.model.extract_feat(own_images)
        batch_shape = self.bridge.find_size(images.shape[-2:])
        return tuple(crop_to_batch(level, own_images.shape[-2:], batch_shape) for level in levels)

    @torch.no_grad()
    def predict(self, images: Tensor, data_samples: list, rescale: bool = True) -> list:
        """Detects, on a batch preprocessed for the student; returns mmdet's data samples with ``pred_instances``.

        Args:
            images: (N, C, H, W).
            data_samples: mmdet's data samples; their ``batch_input_shape`` becomes that of the teacher's batch.
            rescale: Put the boxes into the coordinates of the original images.
        """
        self.start_engine()
        images = self.bridge(images, [sample.img_shape[:2] for sample in data_samples])
        with self.bridge.describe(data_samples, images.shape[-2:]), explain_size_mismatch(images.shape[-2:]), \
                record_calls(self.model, 'extract_feat') as calls:
            found = self.model.predict(images, data_samples, rescale=rescale)
        self.feature_sums = tuple(level.sum(dtype=torch.float32) for call in calls[:1] for level in call.returned)
        return found

    def detect(self, images: Tensor, data_samples: Sequence) -> list[InstanceData]:
        """Detects on a batch preprocessed for the student, in its coordinates; the data samples stay as they are.

        Returns:
            ``bboxes``, ``scores`` and ``labels`` of each image, after the suppression of the teacher's ``test_cfg``.
        """
        samples = [DetDataSample(metainfo=sample.metainfo) for sample in data_samples]
        found = [sample.pred_instances for sample in self.predict(images, samples, rescale=False)]
        return [InstanceData(bboxes=each.bboxes / self.scale if self.scale != 1 else each.bboxes, scores=each.scores,
                             labels=each.labels) for each in found]

    def advise_on_overflow(self) -> str:
        """Says what to do where what it puts out is not finite, though its weights are."""
        advice = []
        if self.engine.precision != 'float32':
            advice.append(f"Set model.teacher.precision='float32': {self.engine.precision} may overflow.")
        if self.cache is not None:
            advice.append(f"Empty model.teacher.cache.dir='{self.cache.folder}', which may hold them.")
        return ' '.join([*advice, 'Evaluate it on this data with kd-det test TEACHER_CONFIG CHECKPOINT, and give one '
                         'that detects.'])

    def fingerprint(self) -> str:
        """SHA-256 over all parameters and buffers as they were loaded.

        Once something has written to those that this rank holds it is another.
        """
        digest = hash_weights(self.model)
        return self._digests[0] if self._digests is not None and self._digests[1] == digest else digest


class UnreadLevel:
    """Stands for a level that was not computed. Whatever is asked of it but its size is an error that says so.

    Args:
        path: Of the tap.
        index: Of the level.
    """
    nbytes = 0

    def __init__(self, path: str, index: int) -> None:
        self._name = f"level {index} of the teacher's '{path}'"

    def __getattr__(self, name: str):
        raise TapError(f'No term declares that it reads {self._name}, so it is not computed: list its index in the '
                       "term's teacher_levels_read.")


@contextmanager
def cut_pyramid(neck: nn.Module, read: Sequence[bool]) -> Iterator[range]:
    """Lets a neck compute no level finer or coarser than those that are read, for the forwards in the block.

    An FPN that starts at a finer stage of the backbone or at a coarser one is an FPN, and so is one that puts out fewer
    extra levels: its levels are the same. All from the finest that is read to the last stage of the backbone are
    computed, and the extra ones up to the coarsest that is read. Any other neck, one derived from FPN included, is left
    whole.

    Args:
        neck: The neck.
        read: For each of its levels, whether it is read.

    Yields:
        The indices of the levels that it puts out.
    """
    if type(neck) is not FPN or not any(read):
        yield range(len(read))
        return
    inputs = len(neck.lateral_convs)
    first = min(list(read).index(True), inputs - 1)
    last = max(inputs, len(read) - list(read)[::-1].index(True))
    whole = dict(start_level=neck.start_level, num_outs=neck.num_outs, lateral_convs=neck.lateral_convs,
                 fpn_convs=neck.fpn_convs)
    cut = dict(start_level=neck.start_level + first, num_outs=last - first, lateral_convs=neck.lateral_convs[first:],
               fpn_convs=neck.fpn_convs[first:])
    try:
        for name, value in cut.items():
            setattr(neck, name, value)
        yield range(first, last)
    finally:
        for name, value in whole.items():
            setattr(neck, name, value)


def mark_unread(path: str, levels: Features, read: Sequence[bool]) -> tuple[Tensor | UnreadLevel, ...]:
    """Puts each level that was read at its own index, and an :class:`UnreadLevel` at every other.

    Args:
        path: Of the tap.
        levels: Those that were read, in order.
        read: For each of the tap's levels, whether it was.
    """
    following = iter(levels)
    return tuple(next(following) if each else UnreadLevel(path, index) for index, each in enumerate(read))
