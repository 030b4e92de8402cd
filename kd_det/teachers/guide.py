"""What a term learns from: a frozen detector, another learner, a backbone, boxes of a file. One face for all."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.config.arguments import refuse
from kd_det.config.detectors import TeacherError
from kd_det.config.files import build_own, get_type_name
from kd_det.context import LevelSpec
from kd_det.heads import HeadError, HeadRequest, StudentOutputs, TeacherOutputs
from kd_det.heads.capture import HeadForm
from kd_det.taps import Features

Shape = tuple[int, int]
ReadLevels = dict[str, Sequence[bool]]  # by path of a tap; for each of its levels, whether anything reads it


class Reading(NamedTuple):
    """What the terms read of one guide.

    Attributes:
        taps: Paths of the features.
        heads: Heads whose outputs may be asked for, see :class:`~kd_det.heads.HeadRequest`.
    """
    taps: tuple[str, ...]
    heads: tuple[str, ...]


class GuideForm(NamedTuple):
    """The form of what is read of a guide, before anything of it is loaded.

    Attributes:
        levels: Levels of each tap.
        heads: Forms of heads that are read, see :func:`~kd_det.heads.capture.measure_heads`.
    """
    levels: dict[str, tuple[LevelSpec, ...]]
    heads: Mapping[HeadRequest, HeadForm] = MappingProxyType({})


class LearnerStep(NamedTuple):
    """What one learner has put out in the present step, with its gradient.

    Attributes:
        model: The learner, a plain detector.
        neck: What its heads were given, level by level.
        maps: Where a guide that learns is made of it: what its dense head's forward returned, kind by kind and level by
            level; of a two-stage detector the proposals of its RPN.
        features: Those that terms and guides read, by path.
        outputs: Those that terms and guides read of its heads.
        samples: mmdet's data samples with the ground truth that it was given.
        labelled: For each image whether it is known what it shows.
    """
    model: nn.Module
    neck: Features
    features: dict[str, Features]
    outputs: StudentOutputs
    samples: Sequence[Any] = ()
    maps: Any = None
    labelled: Sequence[bool] = ()


class Guide:
    """What a term learns from, as the distiller knows it.

    A kind is a class derived from this one, registered in MMDetection's ``MODELS``: ``model.teacher=dict(type=…, …)``.
    It is built with the distiller, and is cheap then: it checks its arguments, and tells the form of what it will put
    out (:meth:`probe`). What it needs of weights and files it loads when training starts (:meth:`start`). In each step
    it answers what terms read of it (:meth:`observe`), and, where pseudo-labels come from it, detects
    (:meth:`detect`). A kind that can not answer one of them leaves it as it is here: an error that says so.

    It is no ``nn.Module``: as an attribute of one it joins neither parameters nor state dict. What of it learns is its
    :attr:`module`.

    Attributes:
        classes: Names of its classes, by label; None where nothing tells them.
        num_classes: How many it tells apart; None where that is not known, or it has none.
        has_student_labels: Whether its labels are the student's, as those of another learner of the same data are.
        checkpoint: Where its weights came from; None where they are drawn at random, or it has none.
        num_parameters: How many weights it has.
        feature_sums: Of the last detection, the sum of each level of features that it was made from.
        cache: A cache of its outputs; None without one.
        module: What of it learns; None for a frozen one.
        members: The guides that it is made of.
        mixes_labels: Whether some of them have the student's labels and others their own, which then have to be the
            same.
        learns: Whether it has losses of its own, see :meth:`learn`.
        offers_features: Whether it puts out features, of whatever path is asked for.
        offers_heads: Whether it puts out what heads predict.
        detects: Whether pseudo-labels can come from it.
        stands_for_learner: Whether it adds a learner, see :meth:`make_learner`.
        metrics_prefix: Of the names of its metrics in validation.
        reads_learners: Indices of the learners whose features and outputs it is made from.
        learner_taps: Paths of these learners' features that it reads itself.
    """
    classes: Sequence[str] | None = None
    num_classes: int | None = None
    has_student_labels: bool = False
    checkpoint: str | None = None
    num_parameters: int = 0
    feature_sums: tuple[Tensor, ...] = ()
    cache: Any = None
    module: nn.Module | None = None
    members: Sequence[Guide] = ()
    mixes_labels: bool = False
    learns: bool = False
    reads_learners: tuple[int, ...] = ()
    learner_taps: tuple[str, ...] = ()
    offers_features: bool = False
    offers_heads: bool = False
    detects: bool = False
    stands_for_learner: bool = False
    metrics_prefix = 'ensemble'

    def __deepcopy__(self, memo: dict) -> Guide:
        return self  # copies of the student (EMA) share it

    @property
    def described(self) -> str:
        """What messages call it, with an article."""
        name = type(self).__name__
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"

    def check(self, reading: Reading) -> None:
        """Checks that it has what one term reads of it, as far as its kind tells.

        Raises:
            HeadError: It has not; the message says what would serve.
        """
        if reading.heads and not self.offers_heads:
            raise HeadError(f"it reads '{reading.heads[0]}', and {self.described} puts out no predictions of a head. "
                            'Take a term that compares features, or another guide.')
        if reading.taps and not self.offers_features:
            raise HeadError(f"it reads features at '{reading.taps[0]}', and {self.described} puts out none. Take a "
                            'term that compares predictions, or another guide.')

    def make_learner(self, learners: Sequence[nn.Module], student: Mapping[str, Any]) -> nn.Module | None:
        """Builds the learner that it stands for; None where it stands for none.

        Args:
            learners: Those so far.
            student: The student's model dict.
        """
        return None

    def probe(self, reading: Reading, learners: Sequence[nn.Module],
              levels: Sequence[Mapping[str, tuple[LevelSpec, ...]]]) -> GuideForm:
        """Tells the form of what will be read, before anything is loaded.

        Args:
            reading: What the terms read of it.
            learners: The plain detectors that learn, the student first.
            levels: Those of the taps of each learner, by path; of a learner in :attr:`reads_learners` also of the taps
                that are read here.

        Raises:
            ValueError: It has not what is read; the message says what it has.
        """
        return GuideForm({})

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Guide:
        """Loads what it needs; called once, before the first step.

        Args:
            reading: What the terms read of it.
            learners: The plain detectors that learn, the student first, on their device.

        Returns:
            What answers in the steps: itself, or the object that it stands for.

        Raises:
            TeacherError: Weights or files lack or do not fit.
        """
        return self

    def try_weights(self) -> str | None:
        """Loads its weights once, for a diagnosis, and says what they fit; None for one that loads none.

        Raises:
            CheckpointError: They do not fit; the message names the keys.
            OSError: There is no such file.
        """
        return None

    def observe(self,
                images: Tensor,
                image_shapes: Sequence[Shape],
                heads: Sequence[str] = (),
                student: StudentOutputs | None = None,
                taps: Sequence[str] | None = None,
                levels: ReadLevels | None = None,
                learners: Sequence[LearnerStep] = ()) -> tuple[dict[str, Features], TeacherOutputs]:
        """Answers what terms read, without gradient.

        Args:
            images: (N, C, H, W), preprocessed for the student.
            image_shapes: Height and width of each image within the batch.
            heads: Heads to answer, of those that :meth:`start` was told.
            student: Outputs in this step of the learner that learns, which hold the regions for a RoI head.
            taps: Paths to answer; all by default.
            levels: Of taps of which not all levels are read, which are.
            learners: What each learner has put out in this step.

        Returns:
            Path -> tuple of (N, C, H, W), and name of the head -> outputs.
        """
        return {}, {}

    def learn(self, learners: Sequence[LearnerStep]) -> dict[str, Any]:
        """Its own losses in this step, by name, as a detector returns them; asked of one that :attr:`learns`.

        Args:
            learners: What each learner has put out in this step, with its gradient.
        """
        return {}

    def detect(self, images: Tensor, data_samples: Sequence) -> list[InstanceData]:
        """Detects, for pseudo-labels.

        Args:
            images: (N, C, H, W), preprocessed for the student.
            data_samples: mmdet's data samples; they stay as they are.

        Returns:
            ``bboxes`` in pixels of the batch, ``scores`` and ``labels``, which count its own classes, of each image.

        Raises:
            TeacherError: It does not detect.
        """
        raise TeacherError(f'No pseudo-labels can come from {self.described}, which detects nothing: give '
                           'model.pseudo_labels.teacher the index of a guide that does.')

    def make_predictor(self, learners: Sequence[Any]) -> Callable[..., Any] | None:
        """What predicts as it would, with the arguments of a detector's forward, for validation; None if nothing does.

        Args:
            learners: The distiller's.
        """
        return None

    def before_training(self) -> None:
        """Called before the first step, on every rank, when the learners have the weights that they start from."""

    def after_step(self) -> None:
        """Called after each step of the optimizer, on every rank."""

    def fingerprint(self) -> str:
        """A hash that is another once something has changed what must stay; '' for what nothing has to keep."""
        return ''

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside what :meth:`start` loads, such as averages of weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""

    def advise_on_overflow(self) -> str:
        """Says what to do where what it puts out is not finite."""
        return 'Look at what it puts out with kd-det inspect CONFIG.'

    def report(self, runner: Any, images: int, min_map: float) -> str | None:
        """Tries it before training; called once, on every rank.

        Args:
            runner: MMEngine's, with the data.
            images: At most so many images of each data set.
            min_map: The mAP of its boxes below which training stops.

        Returns:
            What was found, for the log; None where there is nothing to try.

        Raises:
            TeacherError: It can not teach.
        """
        return None

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Guide:
        """Applies a function to its tensors, as ``nn.Module._apply`` does: what moves it to a device."""
        return self


def list_guides(guides: Sequence[Guide], name: str = 'teacher') -> Iterator[tuple[str, Guide]]:
    """Lists guides, each with the members that it is made of, and what they are called: ``'teacher[1].of[0]'``."""
    for index, guide in enumerate(guides):
        own = f'{name}[{index}]' if len(guides) > 1 else name
        yield own, guide
        for place, member in enumerate(guide.members):
            yield f'{own}.of[{place}]', member


def build_guide(config: Mapping[str, Any]) -> Guide:
    """Builds a guide of a kind from its config, which has a ``type``.

    Raises:
        ArgumentError: There is no such kind, or an argument does not fit.
    """
    guide = build_own(MODELS, dict(config))
    if not isinstance(guide, Guide):
        refuse('type', config['type'], f'a kind of guide, which {get_type_name(config)} is not')
    return guide
