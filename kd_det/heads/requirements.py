"""What the terms ask of a detector's heads, told from the classes of the heads alone: before anything is built."""
from __future__ import annotations

from typing import Dict, Mapping, Type

from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import nn

from kd_det.heads.errors import HeadError
from kd_det.heads.queries import has_queries
from kd_det.heads.readers import reader_of

ROI_HEAD = 'roi_head'
HEADS = ('bbox_head', 'rpn_head', ROI_HEAD)

# After the name of a dense head: what it must have beside classes and boxes.
TOWERS_OF = '.towers'
POSITIVES_OF = '.positives'
DISTRIBUTIONS_OF = '.distributions'

QUERIES_OF = '.queries'  # after the name of a DETR's head, which is not dense

ABSENT: Dict[str, str] = {
    TOWERS_OF: 'has no towers, convolutions before its predictions that all levels share, as the heads of RetinaNet, '
               'ATSS, GFL, FCOS and RTMDetHead have, RTMDetSepBNHead not',
    POSITIVES_OF: 'does not tell which priors it assigned to boxes: choose a form without positives, such as '
                  "normalizer='confidence'",
    DISTRIBUTIONS_OF: "predicts no distributions over distances, as GFL and its kin do: choose form='giou'",
    QUERIES_OF: 'predicts no queries, as the heads of DETR, Conditional DETR, DAB-DETR, Deformable DETR and DINO do'}


def check_head(detector: str, heads: Mapping[str, Type[nn.Module]], name: str) -> None:
    """Checks that a detector has a head, and that what a term reads of it can be read.

    Args:
        detector: Its name, for the message.
        heads: The classes of its heads, those of :data:`HEADS` that it has.
        name: One of :data:`HEADS`; of a dense head also with ``'.towers'``, ``'.positives'`` or ``'.distributions'``
            after it, of a DETR's head with ``'.queries'``.

    Raises:
        HeadError: The head is absent, its outputs can not be read, or it does not have that.
    """
    name, dot, part = name.partition('.')
    if name not in heads:
        raise HeadError(f"A {detector} has no '{name}'; it has {', '.join(heads) or 'none that can be read'}.")
    head = heads[name]
    if name == ROI_HEAD:
        if not issubclass(head, (StandardRoIHead, CascadeRoIHead)):
            raise HeadError(f'The outputs of a {head.__name__} can not be read: only those of StandardRoIHead, '
                            'CascadeRoIHead and heads derived from them.')
        return
    if has_queries(head) and dot + part == QUERIES_OF:
        return
    if has_queries(head):
        raise HeadError(f'A {head.__name__} predicts queries, nothing cell by cell as a dense head does.')
    if dot + part == QUERIES_OF:
        raise HeadError(f'A {head.__name__} {ABSENT[QUERIES_OF]}.')
    reader = reader_of(head)
    has = {'': True, TOWERS_OF: reader.towers, POSITIVES_OF: reader.assignment is not None,
           DISTRIBUTIONS_OF: reader.distributions}
    if not has[dot + part]:
        raise HeadError(f'A {head.__name__} {ABSENT[dot + part]}.')
