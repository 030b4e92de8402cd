"""Prunes a detector: a smaller one out of it, with its config, for MMDetection and everything else here."""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO, StringIO
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Gt, Lt
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kd_det.checks.synthetic import Size, evaluation_size
from kd_det.compat import NotFiniteError
from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Seed, declared
from kd_det.config.choices import AUTO, CHECKPOINTS
from kd_det.config.detectors import check_student
from kd_det.config.files import get_type_name, list_imports, student_config
from kd_det.config.options import resolve_config
from kd_det.deploy.channels import (
    Costs,
    GoalError,
    check_kept,
    choose_kept,
    count_costs,
    find_groups,
    make_traceable,
)
from kd_det.deploy.checkpoint import load_student
from kd_det.deploy.pruned import (
    Kept,
    Pruned,
    compose_kept,
    count_channels,
    find_pruned_type,
    narrow_detector,
    write_kept,
)
from kd_det.registry import HOME, build_detector, find_class, get_scope, within_scope
from kd_det.teachers.loading import remove_pretrained
from kd_det.training.runs import evaluate

# By what a pruned detector is known, which another may replace.
PRUNED, PRUNED_CONFIG = 'kd-det prune', '# Pruned by kd-det: a smaller detector, for MMDetection with kd_det.\n'
PartialShare = Annotated[float, Gt(0), Lt(1)]
ImportanceChoice = Literal['auto', 'group_norm', 'taylor', 'random']

# Given the config and the checkpoint of a pruned detector and the number of the step, the checkpoint of its training.
Train = Callable[[Path, Path, int], str | Path]


class PartSize(NamedTuple):
    """How large a part of a detector is.

    Attributes:
        channels: That its convolutions and linear layers put out, all together.
        parameters: Their number.
        macs: Its multiply-accumulate operations for one image.
    """
    channels: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class PrunedDetector:
    """A pruned detector.

    Attributes:
        checkpoint: Its weights.
        config: Its config, with which it is trained, distilled, evaluated and exported.
        detector: Its type, such as ``PrunedFasterRCNN``.
        before: What it was made from, by part (``backbone``, ``neck``, …); ``attention`` is what multiplies beside
            convolutions and linear layers.
        after: The same of itself.
        size: Height and width of the image that the operations are counted for, in pixels.
        importance: By which channels were chosen.
        metrics: What the evaluation found before and after, such as ``coco/bbox_mAP``, 0 to 1; empty without one.
        note: Why there was none, or why channels were not chosen by ``'taylor'``.
    """
    checkpoint: Path
    config: Path
    detector: str
    before: dict[str, PartSize]
    after: dict[str, PartSize]
    size: Size
    importance: str
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ''

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulate operations for one image, before and after."""
        return sum(part.macs for part in self.before.values()), sum(part.macs for part in self.after.values())

    def tabulate(self) -> TextTable:
        """Makes a table of the parts, before and after."""
        whole = [PartSize(*map(sum, zip(*parts.values()))) for parts in (self.before, self.after)]
        rows = []
        for name, (before, after) in {**{name: (part, self.after[name]) for name, part in self.before.items()},
                                      'all': whole}.items():
            rows.append((name, *(f'{old:,} → {new:,}' for old, new in zip(before[:2], after[:2])),
                         f'{before.macs / 1e6:,.1f} → {after.macs / 1e6:,.1f}',
                         f'{after.macs / before.macs:.3f}' if before.macs else ''))
        found = [f'{name}: {before:.3f} → {after:.3f}' for name, (before, after) in self.metrics.items()
                 if name.endswith(('mAP', 'mAP_50', 'AP50'))]
        return TextTable(f'{self.detector}, {self.size[0]} × {self.size[1]} pixels',
                         ('Part', 'Channels', 'Parameters', 'MACs, millions', 'Left'), rows,
                         '\n'.join([*found, f'Channels were chosen by {self.importance}.',
                                    *([self.note] if self.note else [])]))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        parts = {name: {part: size._asdict() for part, size in getattr(self, name).items()}
                 for name in ('before', 'after')}
        return dict(asdict(self), checkpoint=str(self.checkpoint), config=str(self.config), size=list(self.size),
                    **parts, metrics={name: list(values) for name, values in self.metrics.items()})

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def prune(config: str | Path | Config, checkpoint: str | Path, out: str | Path, macs: PartialShare = 0.5, *,
          importance: ImportanceChoice = AUTO, batches: Count = 8, steps: Count = 1, train: Train | None = None,
          evaluation: bool = True, seed: Seed = 0, data_root: str | None = None, options: dict[str, Any] | None = None,
          force: bool = False) -> PrunedDetector:
    """Prunes a detector to a share of its multiply-accumulate operations, at the size of its test images.

    Layers lose channels in the groups of torch-pruning's dependency graph (arXiv 2301.12900), all groups by about the
    same factor, the least important channels first; those that predict keep what they put out. What a config freezes of
    the backbone is pruned too, and learns from then on: the written config freezes no stage.

    Args:
        config: Of the detector, or of the distillation that trained it: a file, ``'package::folder/file.py'``, or a
            config. It may be of one that was pruned before.
        checkpoint: Its weights, a file.
        out: The file to write, ``.pth``; the config comes beside it, as ``.py``.
        macs: The share of the operations that is left at most.
        importance: ``'taylor'`` by the gradients of the loss on some training images, after which far more is left of
            the detector's accuracy; ``'group_norm'`` by the norm of the weights; ``'random'``. ``'auto'`` is
            ``'taylor'``, and ``'group_norm'`` where there are no such gradients: the result tells which, and why.
        batches: Of the training data, for ``'taylor'``.
        steps: Prune in so many steps, each by the same factor, into the folder ``OUT_steps`` but for the last.
        train: Called between the steps, see :data:`Train`; for example with :func:`kd_det.distill`.
        evaluation: Evaluate it before and after, where there is test data.
        seed: Of what is drawn at random.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key.
        force: Replace files of these names that hold no pruned detector.

    Raises:
        ConfigurationError: The checkpoint is not of the detector in the config, this kind of detectors can not be
            pruned, or not as far as that.
        NotFiniteError: The weights are NaN or infinite.
        WritingError: A file of that name exists, and is no pruned detector; or it can not be written.
    """
    out = Path(out)
    if out.suffix not in CHECKPOINTS:
        raise ConfigurationError(f"'{out}': expected the name of a checkpoint, which ends in .pth; the config comes "
                                 'beside it.')
    files = [out.with_name(f'{out.stem}_steps') / f'step_{step}.pth' for step in range(1, steps)] + [out]
    for file in files:
        refuse_to_replace(file, lambda content: PRUNED.encode() in content, 'a pruned detector', force)
        refuse_to_replace(file.with_suffix('.py'), lambda content: content.startswith(PRUNED_CONFIG.encode()),
                          'the config of a pruned detector', force)
    whole = student_config(resolve_config(config, data_root, options))
    for given, written in ((str(checkpoint), out), (whole.filename or '', out.with_suffix('.py'))):
        if Path(given).resolve() == written.resolve():
            raise ConfigurationError(f"'{written}' is what is pruned: give another name for what becomes of it.")
    found: list[PrunedDetector] = []
    current: tuple[Config, str | Path] = whole, checkpoint
    for step, file in enumerate(files, start=1):
        share = macs**(step / steps) * (found[0].macs[0] / found[-1].macs[1] if found else 1)
        found.append(_prune_once(*current, file, share, importance, batches, seed))
        if train and step < steps:
            current = Config.fromfile(found[-1].config), train(found[-1].config, found[-1].checkpoint, step)
        else:
            current = Config.fromfile(found[-1].config), found[-1].checkpoint
    result = replace(found[-1], before=found[0].before)
    return _evaluate(result, whole, checkpoint) if evaluation else _add_note(result, 'It was not evaluated.')


def _add_note(result: PrunedDetector, note: str) -> PrunedDetector:
    return replace(result, note='\n'.join(filter(None, (result.note, note))))


def _prune_once(config: Config, checkpoint: str | Path, out: Path, share: float, importance: str, batches: int,
                seed: int) -> PrunedDetector:
    """Prunes and writes, without evaluating."""
    check_student(config.model, f"The model of the config '{config.filename}'")
    name = get_type_name(config.model)
    with within_scope(get_scope(config)):
        kind = find_class(MODELS, config.model)
    pruned = find_pruned_type(kind) if isinstance(kind, type) else None
    if pruned is None:
        raise ConfigurationError(f'A {name} can not be pruned: kd-det prunes the single-stage, two-stage and DETR '
                                 'detectors of MMDetection.')
    set_random_seed(seed)
    plain, detector, meta = load_student(config, checkpoint)
    size = evaluation_size(config)
    gradients, note = None, ''
    if importance in ('taylor', AUTO):
        try:
            gradients = accumulate_gradients(detector, config, batches)
        except Exception as error:  # whatever data that is not here, or a loss that is not known, raises
            if importance != AUTO:
                raise
            note = f'The gradients for taylor can not be had: {(str(error) or type(error).__name__).splitlines()[0]}'
        importance = importance if importance != AUTO else 'taylor' if gradients else 'group_norm'
    try:
        costs, traced = count_costs(detector, size), make_traceable(detector)
        for parameter, gradient in zip(traced.parameters(), gradients or ()):
            parameter.grad = gradient
        groups = find_groups(traced, importance)
        kept = choose_kept(traced, groups, costs, share)
        check_kept(detector, kept)
    except GoalError:
        raise
    except Exception as error:  # whatever a forward that is not known raises
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip('.')
        if not isinstance(error, ConfigurationError):
            why = (f'one of its parts reorders channels, or runs in a way of its own ({type(error).__name__}: {why}). '
                   'Prune a detector with another backbone, neck or head')
        raise ConfigurationError(f'A {name} of this config can not be pruned: {why}.') from error
    before = _measure_parts(detector, costs)
    small = copy.deepcopy(detector)
    narrow_detector(small, kept)

    _describe_pruned(plain, pruned, compose_kept(detector.kept, kept) if isinstance(detector, Pruned) else kept)
    made = build_detector(plain.model)  # by the config alone, as whoever reads it does
    made.load_state_dict(small.state_dict())
    with BytesIO() as content:
        torch.save(dict(meta=dict(meta, pruned_by=PRUNED), state_dict=made.state_dict()), content)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, content.getvalue())
    # MMEngine puts the folder of the config there, so that both files can be moved together.
    start = f'load_from = r"""{{{{fileDirname}}}}""" + {f"/{out.name}"!r}\n'
    write_whole(out.with_suffix('.py'), PRUNED_CONFIG + plain.pretty_text + start)
    return PrunedDetector(out, out.with_suffix('.py'), pruned.__name__, before,
                          _measure_parts(made, count_costs(made.eval(), size)), size, importance, note=note)


def accumulate_gradients(detector: nn.Module, config: Config, batches: int) -> list[Tensor]:
    """Accumulates the gradients of the loss on some training images, of the frozen stages too."""
    learning = copy.deepcopy(detector).train().requires_grad_()
    for batch in _load_batches(config, batches):
        losses = learning(**learning.data_preprocessor(batch, True), mode='loss')
        learning.parse_losses(losses)[0].backward()
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in learning.parameters()]
    if not all(each.isfinite().all() for each in gradients):
        raise NotFiniteError('--importance taylor: the gradients of the loss on training images are not finite.')
    return gradients


def _load_batches(config: Config, count: int) -> Sequence[dict]:
    """Loads some batches of the training data, in this process, in the same order each time."""
    if not config.get('train_dataloader'):
        raise ConfigurationError('--importance taylor: the config has no train_dataloader, of whose images the '
                                 'gradients would be.')
    settings = copy.deepcopy(config.train_dataloader)
    settings.update(num_workers=0, persistent_workers=False)
    settings.pop('prefetch_factor', None)
    with redirect_stdout(StringIO()):  # pycocotools writes
        loader = Runner.build_dataloader(settings, seed=0)
    if not len(loader):
        raise ConfigurationError('--importance taylor: the training data is empty.')
    return list(islice(cycle(loader), count))


def _measure_parts(detector: nn.Module, costs: Costs) -> dict[str, PartSize]:
    """Measures the parts of a detector that have weights."""
    parts = {}
    for name, part in detector.named_children():
        layers = {path: layer for path, layer in part.named_modules(prefix=name)
                  if isinstance(layer, (_ConvNd, nn.Linear))}
        parameters = sum(parameter.numel() for parameter in part.parameters())
        if parameters:
            parts[name] = PartSize(sum(count_channels(layer, 'outputs') for layer in layers.values()), parameters,
                                   sum(costs.layers.get(path, 0) for path in layers))
    return {**parts, 'attention': PartSize(0, 0, costs.rest)} if costs.rest else parts


def _describe_pruned(plain: Config, kind: type, kept: Kept) -> None:
    """Makes the config of a detector that of the pruned one."""
    plain.custom_imports = dict(imports=list(dict.fromkeys(['kd_det', *list_imports(plain)])),
                                allow_failed_imports=False)
    model = remove_pretrained(plain.model)
    scope = '' if get_scope(plain) == HOME and model.get('_scope_', HOME) == HOME else f'{HOME}.'
    if (model.backbone.get('frozen_stages') or -1) >= 0:
        model.backbone.frozen_stages = -1  # they have lost channels, and have to learn without
    plain.model = ConfigDict({**model, 'type': f'{scope}{kind.__name__}', 'kept': write_kept(kept)})
    plain.pop('load_from', None)
    plain.resume = False


def _evaluate(result: PrunedDetector, config: Config, checkpoint: str | Path) -> PrunedDetector:
    """Evaluates a detector before and after, where there is data."""
    with TemporaryDirectory() as folder:
        try:
            before, after = (evaluate(copy.deepcopy(each), file, work_dir=Path(folder) / name).metrics
                             for name, each, file in (('before', config, checkpoint),
                                                      ('after', Config.fromfile(result.config), result.checkpoint)))
        except (ConfigurationError, ValueError, OSError) as error:
            return _add_note(result, f'It was not evaluated: {str(error).splitlines()[0]}')
    return replace(result, metrics={name: (value, after[name]) for name, value in before.items() if name in after})
