"""What is read of a detector's heads, by name: a head's outputs, or a part of them that not every head has."""
from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal


class HeadError(ValueError):
    """A detector lacks a head, a head puts out what can not be read, or two heads can not be compared."""


# What can be asked of a head beside its outputs, and what is said of a head that does not have it.
HEAD_PARTS: dict[str, str] = {
    'towers': 'has no towers, stacks of convolutions before its predictions that are read, as those of the heads of '
              'RetinaNet, ATSS, GFL, FCOS, RTMDet and YOLOX are',
    'positives': 'does not tell which priors it assigned to boxes: choose a form without positives, such as '
                 "normalizer='confidence' (of CrossKD also centerness_weight=0), or declare its own assignment with "
                 'kd_det.heads.reads_like',
    'distributions': "predicts no distributions over distances, as GFL and its kin do: choose form='giou'",
    'queries': 'predicts no queries, as the heads of DETR, Conditional DETR, DAB-DETR, Deformable DETR and DINO do; '
               'kd_det.heads.reads_like declares one with a forward of its own',
    'decoder': 'has no queries that start from boxes, as those of DAB-DETR, Deformable DETR and DINO do'}

Remaining = int | Literal['half']  # convolutions of a tower; 'half' of them, rounded down

# What of a dense head's outputs goes together where not all is read: attributes of DenseOutputs.
KINDS: dict[str, tuple[str, ...]] = dict(classes=('logits', 'objectness', 'centerness'), boxes=('regressions', ),
                                         distributions=('distributions', ))


class HeadRequest(str):
    """One thing that a term or a mask reads of a detector's heads.

    It is the string that names it, with the head and the part told apart: it keys a step's outputs, is logged by its
    name, and terms of your own may say plain ``'bbox_head.positives'``, which :meth:`parse` reads.

    Args:
        head: ``'bbox_head'`` of one-stage detectors and of DETRs, ``'rpn_head'`` and ``'roi_head'`` of two-stage
            detectors. Whether a detector has it, :func:`~kd_det.heads.check_head` checks.
        part: ``''`` for the head's outputs, dense or of regions. Of a dense head also ``'towers'``, the features within
            it at one depth; ``'positives'`` and ``'distributions'``, which add nothing to the outputs but the demand
            that they tell the priors that the head assigned to boxes, or distributions over distances. Of a DETR's head
            ``'queries'``, and ``'decoder'``, which is to be run on queries of the term's own choice.
        remaining: Of towers, how many of their convolutions are still before the features.
        kinds: Of the outputs of a teacher's dense head, which are read: ``'classes'``, with objectness and centerness,
            ``'boxes'``, ``'distributions'``; all by default. Of what nobody reads only the size is kept. They are no
            part of the string.

    Raises:
        HeadError: No head has such a part; the message names those there are.

    Example:
        >>> request = HeadRequest('bbox_head', 'towers')
        >>> request, request.head, request.part
        ('bbox_head.towers', 'bbox_head', 'towers')
        >>> HeadRequest.parse('bbox_head.towers.1').remaining
        1
    """
    head: str
    part: str
    remaining: Remaining
    kinds: frozenset[str]

    def __new__(cls, head: str, part: str = '', remaining: Remaining = 0,
                kinds: Iterable[str] = tuple(KINDS)) -> HeadRequest:
        request = super().__new__(cls, '.'.join(filter(None, [head, part, str(remaining or '')])))
        if part and part not in HEAD_PARTS:
            nearest = get_close_matches(part, HEAD_PARTS, n=1)
            raise HeadError(f"'{request}': no head has a part '{part}'. Parts are {', '.join(HEAD_PARTS)}."
                            + (f" Did you mean '{head}.{nearest[0]}'?" if nearest else ''))
        request.head, request.part, request.remaining, request.kinds = head, part, remaining, frozenset(kinds)
        return request

    @classmethod
    def parse(cls, name: str) -> HeadRequest:
        """Reads ``'bbox_head'``, ``'bbox_head.positives'`` or ``'bbox_head.towers.1'``; a request is returned as it is.

        Raises:
            HeadError: No head has such a part.
        """
        if isinstance(name, HeadRequest):
            return name
        head, _, part = name.partition('.')
        of_towers = re.fullmatch(r'(towers)\.([1-9]\d*|half)', part)
        if of_towers is None:
            return cls(head, part)
        part, remaining = of_towers.groups()
        return cls(head, part, 'half' if remaining == 'half' else int(remaining))

    def __reduce__(self) -> tuple[type[HeadRequest], tuple[str, str, Remaining, frozenset[str]]]:
        return HeadRequest, (self.head, self.part, self.remaining, self.kinds)


def join_requests(names: Iterable[str]) -> tuple[HeadRequest, ...]:
    """Each request once, with all kinds that any of its name reads.

    Example:
        >>> joined = join_requests([HeadRequest('bbox_head', kinds=[kind]) for kind in ('classes', 'boxes')])
        >>> joined, sorted(joined[0].kinds)
        (('bbox_head',), ['boxes', 'classes'])
    """
    joined: dict[str, HeadRequest] = {}
    for request in map(HeadRequest.parse, names):
        kinds = request.kinds | (joined[request].kinds if request in joined else frozenset())
        joined[request] = HeadRequest(request.head, request.part, request.remaining, kinds)
    return tuple(joined.values())


ROI_HEAD = HeadRequest('roi_head')
HEADS = ('bbox_head', 'rpn_head', ROI_HEAD)
