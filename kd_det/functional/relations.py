"""What to compare in relations: between layers, between the members of a batch, between cells.

The teacher is taken as a constant. Results and gradients are finite for a batch of one, for equal members, and for
members without variation.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.features import unit

RELATED = 3  # members that a batch needs for distances, in units of their mean, and angles to say anything


def flow_matrix(feature_a: Tensor, feature_b: Tensor) -> Tensor:
    """The flow between two layers of one network, G_ij = Σ_hw F_a,i · F_b,j / (H·W) (FSP, Yim et al., CVPR 2017).

    The larger map is max-pooled to the size of the smaller.

    Args:
        feature_a: (N, A, H, W).
        feature_b: (N, B, H', W').

    Returns:
        (N, A, B).

    Example:
        >>> flow_matrix(torch.ones(1, 1, 2, 2), torch.full((1, 2, 1, 1), 3.0))
        tensor([[[3., 3.]]])
    """
    size = tuple(min(sides) for sides in zip(feature_a.shape[2:], feature_b.shape[2:]))
    a, b = (feature if feature.shape[2:] == size else F.adaptive_max_pool2d(feature, size)
            for feature in (feature_a, feature_b))
    return torch.einsum('nahw,nbhw->nab', a, b) / (size[0] * size[1])


def flow_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ (G_s - G_t)² / N between the flow matrices of two networks (FSP, Yim et al., CVPR 2017).

    Args:
        student: (N, A, B), see :func:`flow_matrix`.
        teacher: (N, A, B).

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ; the layers of both networks need the same channels.

    Example:
        >>> flow_distance(torch.zeros(2, 3, 4), torch.ones(2, 3, 4))
        tensor(12.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f'flow matrices {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the '
                         'teacher must have one shape: compare layers of the same channels, or adapt the student.')
    return (student - teacher.detach()).square().sum() / len(student)


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the pairwise distances of a batch, each in units of their mean (RKD-D, arXiv 1904.05068).

    Args:
        student: (N, C), or more dimensions that are flattened.
        teacher: (N, D), or more dimensions that are flattened; D may differ from C.

    Returns:
        Scalar, mean over the N² pairs; exactly 0 for two members, whose one distance is the unit.

    Example:
        >>> members = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> distance_relation(members, members), distance_relation(members, members[:, :1]) > 0
        (tensor(0.), tensor(True))
    """
    if len(student) < RELATED:
        return 0 * student.sum()
    return F.smooth_l1_loss(_pairwise_distances(student), _pairwise_distances(teacher.detach()))


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles that each triple of a batch spans (RKD-A, arXiv 1904.05068).

    Args:
        student: (N, C), or more dimensions that are flattened.
        teacher: (N, D), or more dimensions that are flattened; D may differ from C.

    Returns:
        Scalar, mean over the N³ triples; exactly 0 for two members, which span no angle.

    Example:
        >>> members = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> angle_relation(members, members), angle_relation(members, members[:, :1]) > 0
        (tensor(0.), tensor(True))
    """
    if len(student) < RELATED:
        return 0 * student.sum()
    return F.smooth_l1_loss(_angles(student), _angles(teacher.detach()))


def dist_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, inter: float = 1.0,
              intra: float = 1.0) -> Tensor:
    """One minus the Pearson correlation of the class probabilities p, times T² (DIST, arXiv 2205.10536).

    T²·(inter·mean_n(1 - r(p_s, p_t over classes)) + intra·mean_c(1 - r(p_s, p_t over n))): ``inter`` weighs the mean
    over the members of the batch, each correlated over its classes; ``intra`` the mean over the classes, each
    correlated over the batch.

    Args:
        student: s, (N, classes) logits.
        teacher: t, (N, classes) logits.
        temperature: T of the softmax, > 0.
        inter: Weight of the relation between classes.
        intra: Weight of the relation within a class.

    Returns:
        Scalar.

    Example:
        >>> teacher = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
        >>> dist_loss(teacher, teacher)
        tensor(0.)
    """
    student, teacher = ((logits / temperature).softmax(1) for logits in (student, teacher.detach()))
    between, within = (_one_minus_pearson(student, teacher, dim) for dim in (1, 0))
    return temperature**2 * (inter * between + intra * within)


def token_relations(student: Tensor, teacher: Tensor, temperature: float = 0.07, valid: Tensor | None = None,
                    tokens: int = 2048) -> Tensor:
    """How the tokens of an image resemble each other: KL(t ‖ s) of the softmax over their cosines.

    ::

        A_ij = cos(F_i, F_j) / T      L = mean over images and tokens i of KL(softmax_j A^t_ij ‖ softmax_j A^s_ij)

    Each cell is a token, which resembles itself most. (The local part of the distillation of lightly-train, v3.)

    Of a map of more cells than ``tokens``, each token is the mean of k × k cells, with the smallest k that is enough:
    each image and side then has a table of at most ``tokens``² numbers, 17 MB in float32 by default, and some three of
    these are kept for the backward pass.

    Args:
        student: (N, C, H, W).
        teacher: (N, D, H, W); D may differ from C.
        temperature: T, > 0.
        valid: (N, H, W) bool; tokens are of these cells alone.
        tokens: The most of an image.

    Returns:
        Scalar.

    Example:
        >>> teacher = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # two tokens are alike
        >>> token_relations(5 * teacher, teacher), token_relations(teacher.flip(3), teacher) > 1
        (tensor(0.), tensor(True))
    """
    batch, _, height, width = student.shape
    cells = student.new_ones(batch, 1, height, width) if valid is None else valid[:, None].to(student.dtype)
    side = 1
    while -(-height // side) * -(-width // side) > tokens:
        side += 1
    count = F.avg_pool2d(cells, side, ceil_mode=True) if side > 1 else cells
    inside = count.flatten(1) > 0

    def relate(feature: Tensor) -> Tensor:
        """(N, M, M) log-probabilities."""
        pooled = F.avg_pool2d(feature * cells, side, ceil_mode=True) if side > 1 else feature  # a mean but for a factor
        directions = unit(pooled.flatten(2), 1)
        similarity = directions.mT @ directions / temperature
        # A finite floor: both sides give such a token probability 0, and 0 · (finite - finite) is 0.
        return similarity.masked_fill(~inside[:, None], torch.finfo(similarity.dtype).min).log_softmax(2)

    divergence = F.kl_div(relate(student), relate(teacher.detach()), reduction='none', log_target=True).sum(2)
    return ((divergence * inside).sum(1) / inside.sum(1).clamp(min=1)).mean()


def non_local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What each cell gathers from the others by the dot product of their embeddings (arXiv 1711.07971), as in FKD.

    Args:
        query: (N, K, H, W).
        key: (N, K, h, w), usually max-pooled.
        value: (N, C, h, w).

    Returns:
        (N, C, H, W), the value's cells weighted by query · key / (h·w).

    Example:
        >>> query, key, value = torch.ones(1, 1, 1, 3), torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[4.0, 2.0]]]])
        >>> non_local(query, key, value)
        tensor([[[[5., 5., 5.]]]])
    """
    # The keys and values first: their product is small, the H·W × h·w table of weights is not.
    gathered = torch.einsum('nkhw,nchw->nkc', key, value) / (key.shape[2] * key.shape[3])
    return torch.einsum('nkhw,nkc->nchw', query, gathered)


def _pairwise_distances(batch: Tensor) -> Tensor:
    """(N, N) distances in units of the mean of the positive ones."""
    vectors = batch.flatten(1)
    # Not by matrix products, whose rounding errors are large beside small distances.
    distances = torch.cdist(vectors, vectors, compute_mode='donot_use_mm_for_euclid_dist')
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1)


def _angles(batch: Tensor) -> Tensor:
    """(N, N, N) cosines at the first member between the directions to the other two."""
    vectors = batch.flatten(1)
    directions = unit(vectors[None] - vectors[:, None], 2)
    return directions @ directions.mT


def _one_minus_pearson(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Mean over the other dimension; 0 where neither side varies."""
    student, teacher = (unit(batch - batch.mean(dim, keepdim=True), dim) for batch in (student, teacher))
    return (student - teacher).square().sum(dim).mean() / 2
