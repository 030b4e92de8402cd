"""What was seen in one step, as tables."""
from __future__ import annotations

from itertools import zip_longest
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from rich.table import Table
from rich.text import Text
from torch import Tensor

from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.idle import find_idle
from kd_det.distillers.weighting import total
from kd_det.heads import DenseOutputs, QueryOutputs, RoIOutputs
from kd_det.inspection.step import InspectedStep
from kd_det.losses import DistillTerm, FeatureTerm

Row = Tuple[str, str, str, str, str]  # what is read in the student, its shape, stride, the same of the teacher


def tap_table(distiller: DetectionDistiller, step: InspectedStep) -> Table:
    """What the terms read in the student, with shape and stride, and what of the teacher it is paired with."""
    rows: Dict[Row, List[str]] = {}
    for name, term in distiller.terms.items():
        for row in (*_features(term, step), *_heads(term, step)):
            rows.setdefault(row, []).append(name)
    table = Table('Student', 'Shape', 'Stride', 'Paired with', 'Shape', 'Read by', title='Taps')
    for row, names in rows.items():
        table.add_row(*row, ', '.join(dict.fromkeys(names)))
    return table


def _features(term: DistillTerm, step: InspectedStep) -> Iterator[Row]:
    context = step.observation.context
    for pair in term.pairs if isinstance(term, FeatureTerm) else ():
        student = context.student[term.student_path][pair.student_index]
        teacher = context.teachers[term.teacher][term.teacher_path][pair.teacher_index]
        yield (f'{term.student_path}[{pair.student_index}]', _shape(student), str(pair.student.stride),
               f'{_teacher(term, step)}{term.teacher_path}[{pair.teacher_index}]', _shape(teacher))


def _heads(term: DistillTerm, step: InspectedStep) -> Iterator[Row]:
    context = step.observation.context
    for student_head, teacher_head in zip_longest(term.student_heads, term.teacher_heads):
        students = _logits(context.student_outputs.get(student_head))
        teachers = _logits(context.teacher_outputs[term.teacher].get(teacher_head))
        for stride in dict.fromkeys((*students, *teachers)):
            student = f'{student_head} logits' if stride in students else '–'
            teacher = f'{_teacher(term, step)}{teacher_head} logits' if stride in teachers else '–'
            yield student, _shape(students.get(stride)), stride, teacher, _shape(teachers.get(stride))


def _logits(outputs: Any) -> Dict[str, Tensor]:
    """Class logits by stride; those of queries, and of a RoI head, of whose stages the first is shown, have none."""
    if isinstance(outputs, DenseOutputs):
        return dict(zip(map(str, outputs.strides), outputs.logits))
    first = outputs[0] if isinstance(outputs, tuple) and not isinstance(outputs, RoIOutputs) else outputs
    return {'–': first.logits} if isinstance(first, (QueryOutputs, RoIOutputs)) else {}


def _teacher(term: DistillTerm, step: InspectedStep) -> str:
    return f'teacher {term.teacher}: ' if len(step.observation.context.teachers) > 1 else ''


def _shape(tensor: Optional[Tensor]) -> str:
    return '–' if tensor is None else ' × '.join(map(str, tensor.shape))


def term_table(distiller: DetectionDistiller, step: InspectedStep) -> Table:
    """Each term's value and parts, its weight, and the norm of its gradient beside the task's.

    The weight is that without schedules, of a balanced term that of this step.
    """
    table = Table('Term', 'Value', 'Weight', 'Weighted', 'Measured at', 'Gradient', "Task's", 'Ratio', title='Terms',
                  caption="Ratio: of the weighted term's gradient on the student's features to the task's")
    for column in table.columns[1:]:
        column.justify = 'right'
    for name, value in step.observation.values.items():
        norms, weight = step.norms[name], _weight(distiller, step, name)
        scaled, task = weight * norms.term, norms.task
        table.add_row(Text(name, 'bold'), _number(total(value)), f'{_number(weight)}{_kind(distiller, name)}',
                      _number(weight * total(value)), ', '.join(distiller.measured_taps(distiller.terms[name])),
                      _number(scaled), _number(task), f'{scaled / task:.2f}' if task > 0 else '–')
        for part, each in value.items() if isinstance(value, dict) and len(value) > 1 else ():
            table.add_row(f'  {part}', _number(each), '', _number(weight * each))
    if not any(map(len, step.observation.context.boxes)):
        table.caption += ', to which all is background: there are no boxes'
    for name, cause in find_idle(distiller, step.observation).items():
        table.caption += f'\n{name} teaches the student nothing: none of its weights gets a gradient from it. {cause}'
    table.add_section()
    table.add_row("the student's own loss", _number(step.task))
    return table


def _weight(distiller: DetectionDistiller, step: InspectedStep, name: str) -> float:
    weight, (term, task) = distiller.weights[name], step.norms[name]
    if weight.balance is None:
        return weight.full
    return weight.full * float(task / term) if term > 0 else 0.0


def _kind(distiller: DetectionDistiller, name: str) -> str:
    weight = distiller.weights[name]
    return '' if weight.is_constant else f' ({type(weight).__name__})'


def _number(value: Union[float, Tensor]) -> str:
    return f'{value.item() if isinstance(value, Tensor) else value:.4g}'
