"""The maps that a teacher's dense heads return: what of their outputs can be kept, and read again in a later step."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import count, takewhile
from typing import Dict, Iterator, Sequence

from torch import nn

from kd_det.heads.readers import read_dense
from kd_det.heads.recording import recorded_calls
from kd_det.heads.requirements import DISTRIBUTIONS_OF, POSITIVES_OF, ROI_HEAD, TOWERS_OF
from kd_det.heads.towers import TeacherTowers
from kd_det.taps import Levels

# Of a dense head: its outputs, and what needs none of a batch.
KEPT = ('', TOWERS_OF, POSITIVES_OF, DISTRIBUTIONS_OF)


def can_be_kept(name: str) -> bool:
    """Whether what a term reads of a head depends on the image alone, and is made of maps."""
    head, dot, part = name.partition('.')
    return head != ROI_HEAD and dot + part in KEPT


@contextmanager
def recorded_maps(model: nn.Module, names: Sequence[str]) -> Iterator[Dict[str, Levels]]:
    """Records what the forwards of a teacher's dense heads return while the block runs.

    Args:
        model: The teacher.
        names: See :func:`~kd_det.heads.find_head`; those that can be kept.

    Yields:
        A dict that is filled when the block ends: ``'bbox_head/0'`` -> the first kind of maps of this head, one of
        (N, C, H, W) per level.
    """
    maps: Dict[str, Levels] = {}
    with ExitStack() as stack:
        calls = {name: stack.enter_context(recorded_calls(getattr(model, name), 'forward'))
                 for name in names if '.' not in name}
        yield maps
    for name, (call, ) in calls.items():
        maps.update({f'{name}/{kind}': tuple(levels) for kind, levels in enumerate(call.returned)})


def read_maps(model: nn.Module, names: Sequence[str], maps: Dict[str, Levels]) -> dict:
    """Makes the outputs of a teacher's heads from what :func:`recorded_maps` recorded in this or another step."""
    outputs = {}
    for name in names:
        head, _, part = name.partition('.')
        if not part:
            present = takewhile(maps.__contains__, (f'{name}/{kind}' for kind in count()))
            outputs[name] = read_dense(getattr(model, name), [maps[each] for each in present])
        elif name.endswith(TOWERS_OF):
            outputs[name] = TeacherTowers(getattr(model, head))
    return outputs
