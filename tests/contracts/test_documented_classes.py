"""The mask and the term of docs/methods.md, as they stand there."""
import re
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.context import DistillContext
from kd_det.masks import build_mask

DOCUMENTATION = Path(__file__).parents[2] / 'docs' / 'methods.md'
SNIPPETS = re.findall(r'```python\n("""kd_det/.*?)```', DOCUMENTATION.read_text(encoding='utf-8'), re.DOTALL)


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """Imports a snippet of the page from a file, as from outside of the package; forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    known = dict(MODELS.module_dict)

    def load(package: str) -> None:
        snippet, = (each for each in SNIPPETS if each.startswith(f'"""kd_det/{package}/'))
        (tmp_path / f'documented_{package}.py').write_text(snippet)
        __import__(f'documented_{package}')

    yield load
    for name in set(MODELS.module_dict) - set(known):
        del MODELS.module_dict[name]
    for name in [name for name in sys.modules if name.startswith('documented_')]:
        del sys.modules[name]


def test_the_documented_mask(documented):
    documented('masks')
    feature = torch.zeros(2, 1, 8, 12)
    boxes = [torch.tensor([[8., 8., 40., 24.], [0., 32., 90., 60.]]), torch.zeros(0, 4)]
    level = DistillContext.of_features(feature, feature, 8, boxes).read_level()
    cells = build_mask(dict(type='SmallBoxForeground', size=32)).cells(level)
    expected = torch.zeros(2, 8, 12)
    expected[0, 1:3, 1:5] = 1
    assert torch.equal(cells, expected)
    with pytest.raises(ValueError, match='size: expected a number above 0, got 0'):
        build_mask(dict(type='SmallBoxForeground', size=0))


def test_the_documented_term(documented, connected):
    documented('losses')
    student, teacher = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12)
    context = DistillContext.of_features(student, teacher, 8, image_shapes=[(64, 96), (32, 48)])
    value = connected(MODELS.build(dict(type='MeanResponse')), context)(context)['means']
    parts = [(slice(None), ) * 2, (slice(4), slice(6))]
    expected = sum((s[:, rows, columns].mean((1, 2)) - t[:, rows, columns].mean((1, 2))).square().sum()
                   for s, t, (rows, columns) in zip(student, teacher, parts)) / 2
    torch.testing.assert_close(value, expected)
