"""What a command line offers, and reads before anything heavy is imported: the standard library alone is."""
from __future__ import annotations

from pathlib import Path

# Configs and tools travel inside the package, where MMEngine and mim look for them.
CONFIG_ROOT = Path(__file__).parents[1] / '.mim' / 'configs'
METHOD_ROOT = CONFIG_ROOT / '_base_' / 'methods'

# Published weights differ between these families of heads.
FAMILIES = ('two_stage', 'one_stage', 'anchor_free', 'detr')

RATIO = 1.0  # of a method's gradient to the task's: what served best on data smaller than COCO, see docs/results.md
PAPER = 'paper'  # in place of a ratio: the weights in the method's file

SPLITS = ('val', 'train')  # on which fidelity is measured


def available_methods() -> dict[str, dict[str, Path]]:
    """The methods that have configs: name -> family -> file.

    A method has one file for each family of heads, ``<method>_<family>.py``, or one for all others, ``<method>.py``,
    whose family is ``''``.
    """
    methods: dict[str, dict[str, Path]] = {}
    for file in sorted(METHOD_ROOT.glob('*.py')):
        family = next((family for family in FAMILIES if file.stem.endswith(f'_{family}')), '')
        name = file.stem[:-len(family) - 1] if family else file.stem
        methods.setdefault(name, {})[family] = file
    return methods
