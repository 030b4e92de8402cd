"""A plain student out of a run's checkpoint, for whoever does not have kd_det."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from kd_det.compat import CheckpointError, NotFiniteError
from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.files import get_type_name, list_imports, student_config
from kd_det.config.methods import available_methods
from kd_det.registry import HOME, build_detector, enter_scope, find_class, get_scope
from kd_det.teachers import load_strictly

# By what an export is known, which another may replace.
EXPORTED, EXPORTED_CONFIG = 'kd-det export', '# Exported by kd-det: a plain student, for stock MMDetection.\n'


@dataclass(frozen=True)
class ExportedStudent:
    """A plain student, for stock MMDetection and whatever reads its models.

    Attributes:
        checkpoint: Its weights, and nothing else but what its classes are.
        config: Its config, which needs kd_det no more.
        detector: Its type, such as ``FasterRCNN``.
        parameters: How many it has.
    """
    checkpoint: Path
    config: Path
    detector: str
    parameters: int

    def tabulate(self) -> TextTable:
        """Makes a table of what it is and where."""
        rows = [('detector', self.detector), ('parameters', f'{self.parameters:,}'),
                ('checkpoint', str(self.checkpoint)), ('config', str(self.config))]
        return TextTable('Exported student', ('', ''), rows, words=(0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(asdict(self), checkpoint=str(self.checkpoint), config=str(self.config))

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


def export_checkpoint(config: Config, checkpoint: str | Path, out: Path, force: bool = False) -> ExportedStudent:
    """Writes a plain student, see :func:`kd_det.deploy.export.export`.

    Args:
        config: Of the run.
        checkpoint: A file.
        out: The file to write; the config comes beside it.
        force: Replace files of these names that no export wrote.
    """
    refuse_to_replace(out, lambda content: EXPORTED.encode() in content, 'an exported student', force)
    refuse_to_replace(out.with_suffix('.py'), lambda content: content.startswith(EXPORTED_CONFIG.encode()),
                      'the config of an exported student', force)
    plain, model, meta = load_student(config, checkpoint)
    with BytesIO() as content:
        torch.save(dict(meta=dict(meta, exported_by=EXPORTED), state_dict=model.state_dict()), content)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, content.getvalue())
    write_whole(out.with_suffix('.py'), EXPORTED_CONFIG + plain.pretty_text)
    return ExportedStudent(out, out.with_suffix('.py'), get_type_name(plain.model),
                           sum(parameter.numel() for parameter in model.parameters()))


def load_student(config: Config, checkpoint: str | Path) -> tuple[Config, nn.Module, dict[str, Any]]:
    """Builds the plain student of a config, and loads a checkpoint to the last key.

    Returns:
        The config without distillation, the detector in eval mode, and what the checkpoint says of its classes, epoch
        and iteration.

    Raises:
        ConfigurationError: The checkpoint is not of the student in the config.
        NotFiniteError: Its weights are NaN or infinite.
    """
    plain = _strip_distillation(config)
    enter_scope(get_scope(plain))
    model = build_detector(plain.model)
    try:
        loaded = load_strictly(model, str(checkpoint), role='student')
    except NotFiniteError:
        raise
    except CheckpointError as error:
        raise ConfigurationError(f"The checkpoint '{checkpoint}' is not of the student in '{config.filename}': "
                                 f'{error}') from error
    meta = {key: value for key, value in loaded.items() if key in ('dataset_meta', 'epoch', 'iter')}
    return plain, model.eval(), meta


def _strip_distillation(config: Config) -> Config:
    """Makes the config of the plain student, which needs kd_det no more, unless its type is kd_det's own."""
    plain = student_config(config)
    own = getattr(find_class(MODELS, plain.model, HOME), '__module__', '').startswith('kd_det.')
    for method in available_methods():
        plain.pop(method, None)
    others = [name for name in list_imports(plain) if name.split('.')[0] != 'kd_det' or own]
    if others:
        plain.custom_imports.imports = others
    else:
        plain.pop('custom_imports', None)
    return plain
