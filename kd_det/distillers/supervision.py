"""What a step is told of the objects in its images, and the student's own loss where it is told nothing of some."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from kd_det.datasets.unlabelled import UNLABELLED
from kd_det.distillers.weighting import Losses, scaled
from kd_det.taps import Levels


class Supervision(NamedTuple):
    """The ground truth of one batch, from people or from a teacher.

    Attributes:
        samples: mmdet's data samples with ``gt_instances``, one for each image.
        labelled: Whether it is known what an image shows, so that what is no object is background.
        log: What is only for the log, by name.
    """
    samples: List[DetDataSample]
    labelled: Tuple[bool, ...]
    log: Dict[str, Tensor] = {}

    @property
    def boxes(self) -> List[Tensor]:
        """(n, 4) of each image."""
        return [boxes_of(sample) for sample in self.samples]

    @property
    def labels(self) -> List[Tensor]:
        """(n,) of each image."""
        return [sample.gt_instances.labels for sample in self.samples]


def given(samples: Sequence[DetDataSample]) -> Supervision:
    """What the data itself says, see :class:`~kd_det.datasets.Unlabelled`."""
    return Supervision(list(samples), tuple(not sample.metainfo.get(UNLABELLED, False) for sample in samples))


def boxes_of(sample: DetDataSample) -> Tensor:
    """(n, 4) of an image's ground truth, whether it is a tensor or one of mmdet's box types."""
    boxes = sample.gt_instances.bboxes
    return getattr(boxes, 'tensor', boxes).detach()


def labelled_losses(student: nn.Module, inputs: Tensor, features: Levels, supervision: Supervision,
                    of_all: Losses) -> Losses:
    """The student's own losses on the labelled images of a batch.

    They are those of plain training on these images alone. Backbone and neck have seen the whole batch and are not run
    again.

    Args:
        student: The student.
        inputs: (N, 3, H, W), the whole batch.
        features: What its ``extract_feat`` made of it.
        supervision: What is known of the batch.
        of_all: The losses as if unlabelled images were background: without any labelled image 0 times these, so that
            every weight has a gradient, for which data-parallel training waits.
    """
    rows = [row for row, labelled in enumerate(supervision.labelled) if labelled]
    if not rows:
        return scaled(of_all, 0.0)
    with _given_features(student, tuple(level[rows] for level in features)):
        return dict(student.loss(inputs[rows], [supervision.samples[row] for row in rows]))


@contextmanager
def _given_features(model: nn.Module, features: Levels) -> Iterator[None]:
    """Lets a detector take these features for those of any images while the block runs."""
    model.extract_feat = lambda *args, **kwargs: features  # on the instance, before the class's
    try:
        yield
    finally:
        del model.extract_feat
