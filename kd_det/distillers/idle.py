"""Terms that can teach the student nothing: none of its weights gets a gradient from them."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Dict, Iterable

from mmengine.logging import print_log
from torch import nn

from kd_det.configuration import ConfigurationError
from kd_det.distillers.gradients import reaches_weights
from kd_det.distillers.weighting import total
from kd_det.heads import find_head
from kd_det.losses import DistillTerm
from kd_det.losses.base import FeatureTerm
from kd_det.taps import find_module

if TYPE_CHECKING:
    from kd_det.distillers.detection_distiller import DetectionDistiller, Observation


def find_idle(distiller: DetectionDistiller, observation: Observation) -> Dict[str, str]:
    """Which of the terms that were run can teach the student nothing.

    Args:
        distiller: The distiller.
        observation: One step of it, with a gradient.

    Returns:
        For each such term what it reads, the likely cause, and what to do.
    """
    return {name: _cause(distiller, observation, name) for name, value in observation.values.items()
            if not reaches_weights(total(value), apart=list(distiller.terms[name].parameters()))}


class IdleWatch:
    """Warns of each term that can teach nothing, in the term's first step; and ends the run where that is all of them.

    A term of a user's own may be a constant where there are no boxes. So a batch without any proves nothing, unless
    many come in a row.

    Args:
        names: Of the terms.
        patience: How many batches without boxes.

    Attributes:
        idle: The terms that can teach nothing, and why.
    """

    def __init__(self, names: Iterable[str], patience: int = 50) -> None:
        self.left = {name: patience for name in names}
        self.idle: Dict[str, str] = {}

    def look(self, distiller: DetectionDistiller, observation: Observation) -> None:
        """Looks at the terms of a step that it has not judged yet.

        Raises:
            ConfigurationError: No term can teach anything, and there are no pseudo-labels to learn from.
        """
        new = {name: value for name, value in observation.values.items() if name in self.left}
        if not new:
            return
        found = find_idle(distiller, observation._replace(values=new))
        for name in new:
            if name in found and self.left[name] > 0 and not any(map(len, observation.context.boxes)):
                self.left[name] -= 1
                continue
            del self.left[name]
            if name in found:
                self.idle[name] = found[name]
                print_log(f'model.distill.{name} teaches the student nothing: none of its weights gets a gradient from '
                          f'it. {found[name]}', 'current', logging.WARNING)
            else:
                _tell_frozen_levels(distiller.terms[name], name, observation)
        if not self.left and len(self.idle) == len(distiller.terms) and distiller.pseudo_labels is None:
            causes = ' '.join(f'model.distill.{name}: {cause}' for name, cause in self.idle.items())
            raise ConfigurationError('No weight of the student gets a gradient from any term: it would train as '
                                     f'without a teacher. {causes}')


def _cause(distiller: DetectionDistiller, observation: Observation, name: str) -> str:
    student, term = distiller.student, distiller.terms[name]
    paths = term.student_taps or tuple(dict.fromkeys(head.split('.')[0] for head in term.student_heads))
    modules = [find_module(student, path) for path in term.student_taps]
    modules += [] if modules else [find_head(student, head) for head in term.student_heads]
    read = f"It reads {' and '.join(map(repr, paths))}"
    flows = any(level.requires_grad for level in distiller.measured_features(name, observation.context))
    if not flows and not any(map(_learns, modules)):
        learning = [part for part, module in student.named_children() if _learns(module)]
        return (f'{read}, where nothing learns: the weights there are frozen (requires_grad=False, as frozen_stages '
                f"sets it). Unfreeze them, or read a part that learns: {', '.join(learning) or 'here there is none'}.")
    if flows and term.student_taps:
        return (f'{read}, which has a gradient, but the value of the term does not depend on it: {type(term).__name__} '
                'detaches it, or computes it under torch.no_grad().')
    return (f'{read}, which learns, but what it puts out has no gradient: it is detached, or computed under '
            'torch.no_grad(), as within a block with activation checkpointing (with_cp=True). Read the output of the '
            'whole block or stage, or do without what cuts the gradient.')


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _tell_frozen_levels(term: DistillTerm, name: str, observation: Observation) -> None:
    """Tells of single levels that teach nothing, as those of a backbone's first, frozen stages."""
    if not isinstance(term, FeatureTerm):
        return
    levels = [pair.student_index for pair in term.pairs]
    learning = [level for level in levels if observation.context.student[term.student_path][level].requires_grad]
    if len(learning) < len(levels):
        frozen = ', '.join(str(level) for level in levels if level not in learning)
        print_log(f"model.distill.{name}: level {frozen} of '{term.student_path}' is frozen, so that nothing is learnt "
                  f'there. levels={tuple(learning)} leaves it out.', 'current', logging.INFO)
