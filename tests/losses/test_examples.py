"""The examples in the docstrings of terms, of the functions behind them, and of the checks of their arguments."""
import doctest
import pkgutil
from importlib import import_module

import pytest
from mmdet.registry import MODELS

from kd_det import functional, losses
from kd_det.losses import DistillTerm

MODULES = ['kd_det.config.arguments', *sorted(
    f'{package.__name__}.{module.name}' for package in (functional, losses)
    for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)]
TERMS = [each for each in MODELS.module_dict.values()
         if issubclass(each, DistillTerm) and each.__module__.startswith('kd_det.')]


@pytest.mark.parametrize('name', MODULES)
def test_examples_give_what_they_say(name):
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.parametrize('term', TERMS, ids=[each.__name__ for each in TERMS])
def test_every_term_says_its_formula_its_paper_its_errors_and_how_it_is_used(term):
    description = term.__doc__
    assert '::\n\n' in description and ' = ' in description.partition('::\n\n')[2]
    assert any(source in description for source in ('arXiv 1', 'arXiv 2', 'openreview', 'CVPR', 'NeurIPS'))
    assert 'Raises:' in description and 'Example:' in description and 'term(context)' in description
