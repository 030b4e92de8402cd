"""``kd-det export``: a plain student's checkpoint and config, for stock MMDetection and whatever reads its models."""
from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import add_config_options, apply_config_options

if TYPE_CHECKING:
    from mmengine.config import Config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help='config of the run that wrote the checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out',
                        metavar='OUT.pth',
                        type=Path,
                        help='file to write; the config comes beside it, as OUT.py')
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat import CheckpointError
    from kd_det.config.files import ConfigurationError, get_type_name, load_config
    from kd_det.registry import build_detector, enter_scope, get_scope
    from kd_det.teachers import load_strictly
    config = load_config(options.config)
    apply_config_options(config, options)
    config = plain_config(config)
    enter_scope(get_scope(config))
    model = build_detector(config.model)
    try:
        found = load_strictly(model, options.checkpoint, role='student')
    except CheckpointError as error:
        raise ConfigurationError(f"The checkpoint '{options.checkpoint}' is not of the student in '{options.config}': "
                                 f'{error}') from error
    meta = {key: value for key, value in found.items() if key in ('dataset_meta', 'epoch', 'iter')}
    write(dict(meta=meta, state_dict=model.state_dict()), options.out)
    config_file = options.out.with_suffix('.py')
    config.dump(config_file)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f'{options.out} holds the {count:,} parameters of a {get_type_name(config.model)}, {config_file} its config.')
    return 0


def plain_config(config: Config) -> Config:
    """The config of the plain student, which needs kd_det no more."""
    from kd_det.config.files import list_imports, student_config
    from kd_det.config.methods import available_methods
    plain = student_config(config)
    for method in available_methods():
        plain.pop(method, None)
    others = [name for name in list_imports(plain) if name.split('.')[0] != 'kd_det']
    if others:
        plain.custom_imports.imports = others
    else:
        plain.pop('custom_imports', None)
    return plain


def write(checkpoint: dict, path: Path) -> None:
    """Saves a checkpoint whole or not at all."""
    import torch
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    torch.save(checkpoint, partial)
    os.replace(partial, path)
