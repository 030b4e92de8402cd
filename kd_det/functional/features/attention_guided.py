"""Where either side attends, with means and relations (FKD)."""
from __future__ import annotations

import torch
from torch import Tensor

from kd_det.functional.features.imitation import difference_of_cells
from kd_det.functional.features.shapes import check_shapes


def fkd_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    student_channels: Tensor,
    student_cells: Tensor,
    student_relation: Tensor | None = None,
    teacher_relation: Tensor | None = None,
    feature_weight: float = 7e-5,
    pooling_weight: float = 4e-3,
    relation_weight: float = 7e-5,
) -> dict[str, Tensor]:
    """Attention-guided and non-local distillation of one level (FKD, ICLR 2021, openreview uKhGRvM8QNH).

    All parts are L2 norms over the whole batch, not their squares: the difference weighted by the attention, the
    difference of the means over cells and over channels, and that of the non-local relations
    (:func:`kd_det.functional.relations.non_local`). The default weights are the released ones.

    Args:
        student: (N, C, H, W), after its 1×1 adapter.
        teacher: (N, C, H, W).
        mask: (N, H, W), the mean of both spatial attentions, see :func:`kd_det.functional.masks.spatial_attention`.
        student_channels: (N, C), the student's mean over cells after its linear adapter.
        student_cells: (N, 1, H, W), the student's mean over channels after its 3×3 adapter.
        student_relation: (N, C, H, W), after its 1×1 adapter; None leaves the relation part out.
        teacher_relation: (N, C, H, W); keeps its gradient, since the block that makes it is trained.
        feature_weight: Weight of the attended difference.
        pooling_weight: Weight of both pooled differences.
        relation_weight: Weight of the relation.

    Returns:
        The weighted scalars ``imitation``, ``channel``, ``spatial`` and, with relations, ``relation``.
    """
    check_shapes(student, teacher)
    teacher = teacher.detach()
    norm = torch.linalg.vector_norm
    parts = dict(
        imitation=feature_weight * _root((difference_of_cells(student, teacher) * mask.detach()[:, None]).sum()),
        channel=pooling_weight * norm(student_channels - teacher.mean((2, 3))),
        spatial=pooling_weight * norm(student_cells - teacher.mean(1, keepdim=True)),
    )
    if student_relation is not None and teacher_relation is not None:
        parts['relation'] = relation_weight * norm(student_relation - teacher_relation)
    return parts


def _root(square: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0, as that of a norm."""
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)
