"""Token relations: how the cells of an image resemble each other."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import nn

from kd_det.config.arguments import Count, EitherSide, Index, Positive, declared
from kd_det.context import ComparedLevel, LevelPair
from kd_det.functional.relations import token_relations
from kd_det.losses.base import FeatureTerm, Levels, Parts


@MODELS.register_module()
class TokenRelations(FeatureTerm):
    """The tokens of an image resemble each other as the teacher's do (after lightly-train, its distillation v3).

    ::

        L = Σ_level mean over images and tokens i of KL(softmax_j(cos(t_i, t_j)/T) ‖ softmax_j(cos(s_i, s_j)/T))

    with the cells of s (N, C, H, W) and t (N, C', H, W) as tokens. Similarities within each side are compared, so that
    the two need no common width, hence no adapter: a foundation model, whose features lie in another basis, teaches
    which parts of an image are alike. Of its kin are the relations of tokens in MiniLMv2 (arXiv 2012.15828).

    In a config: ``dict(type='TokenRelations', tap='backbone', levels=(-1, ), temperature=0.07)``.

    Args:
        tap, levels, resize, teacher, normalize: See :class:`~kd_det.losses.base.FeatureTerm`.
        temperature: T; smaller looks at the most similar tokens alone.
        tokens: The most of an image; those of a larger map are means of k × k cells. Memory grows with the square,
            see :func:`~kd_det.functional.relations.token_relations`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> student, teacher = torch.rand(1, 4, 8, 8), torch.rand(1, 16, 8, 8)  # of other widths, without an adapter
        >>> context = DistillContext.of_features(student, teacher)
        >>> term = TokenRelations()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> bool(term(context)['relations'] > 0)
        True
    """

    @declared
    def __init__(self, tap: EitherSide = 'neck', levels: Levels | None = None, resize: bool = False, teacher: Index = 0,
                 temperature: Positive = 0.07, tokens: Count = 2048, normalize: bool = False) -> None:
        super().__init__(tap=tap, levels=levels, resize=resize, teacher=teacher, normalize=normalize)
        self.temperature, self.tokens = temperature, tokens

    def make_adapter(self, pair: LevelPair) -> nn.Module:
        return nn.Identity()

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        return dict(relations=token_relations(level.student, level.teacher, self.temperature, level.valid, self.tokens))
