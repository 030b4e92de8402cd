"""What a command line offers, and reads before anything heavy is imported: the standard library alone is."""
from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

# Configs and tools travel inside the package, where MMEngine and mim look for them.
CONFIG_ROOT = Path(__file__).parents[1] / '.mim' / 'configs'

# Published weights differ between these families of heads.
FAMILIES = ('two_stage', 'one_stage', 'anchor_free', 'detr')

# The kinds of detectors that the methods are tried on, and the family of each; their heads are in config/detectors.py.
DETECTOR_FAMILIES = {
    'RetinaNet': 'one_stage',
    'ATSS': 'one_stage',
    'GFL': 'one_stage',
    'FCOS': 'anchor_free',
    'RTMDet': 'one_stage',
    'YOLOX': 'anchor_free',
    'SSD': 'one_stage',
    'YOLOv3': 'one_stage',
    'Faster R-CNN': 'two_stage',
    'Cascade R-CNN': 'two_stage',
    'Mask R-CNN': 'two_stage',
    'DETR': 'detr',
    'Conditional DETR': 'detr',
    'DAB-DETR': 'detr',
    'Deformable DETR': 'detr',
    'DINO': 'detr',
}

RATIO = 1.0  # of a method's gradient to the task's: what served best on data smaller than COCO, see docs/results.md
PAPER = 'paper'  # in place of a ratio: the weights in the method's file

IMPORTANCES = ('group_norm', 'taylor', 'random')  # of channels, by which they are pruned
AUTO = 'auto'  # in place of one: taylor, or without training images group_norm

InheritanceRule = Literal['shape', 'selection', 'growth']  # how a student starts from a teacher of another size
INHERITANCE_RULES = get_args(InheritanceRule)

TREATMENTS = ('none', 'cwtm', 'dkpp')  # of what a teacher says of classes

Split = Literal['val', 'train']  # on whose images fidelity is measured
SPLITS = get_args(Split)

# Where runs log beside MMEngine's own files; each is the module, and the package, of that name.
TRACKERS = ('tensorboard', 'wandb', 'mlflow')

# How the names of checkpoints and of exported files end, and by what these are run.
CHECKPOINTS = ('.pth', '.pt')
EXPORTED = ('.onnx', '.xml')
RUNTIMES = ('onnxruntime', 'openvino')

# How the range of an activation is found after training.
RANGES = ('minmax', 'entropy', 'percentile')

# Who teaches when there are several, by the names that the command line has for them.
POLICIES = {
    'uniform': dict(type='Uniform'),
    'random': dict(type='Random'),
    'fixed': dict(type='Fixed'),
    'confidence': dict(type='Confidence'),
    'sequence': dict(type='Sequence', patience=2),
    'route': dict(type='Route'),
    'bandit': dict(type='Bandit'),
    'agent': dict(type='Agent'),
}

# What several learners learn from: each other, their mean, their mean by a learnt gate, a learner of their fusion.
LearntFrom = Literal['peers', 'mean', 'gate', 'fusion']
LEARNT_FROM = get_args(LearntFrom)


def split_values(text: str) -> list[str]:
    """Splits a text at its commas, but for those within brackets: they are a list's.

    Example:
        >>> split_values('kd,fgd@a.b=[[1,2],[3]]'), split_values('[[1,2],[3]],[[4]]')
        (['kd', 'fgd@a.b=[[1,2],[3]]'], ['[[1,2],[3]]', '[[4]]'])
    """
    parts, depth = [''], 0
    for letter in text:
        depth += (letter in '([') - (letter in ')]')
        if letter == ',' and depth <= 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
