"""Every example of the docstrings runs and shows what it says; so do those of the docs' pages."""
from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import kd_det

ROOT = Path(kd_det.__file__).parents[1]
MODULES = sorted('.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
                 for path in (ROOT / 'kd_det').rglob('*.py')
                 if '>>>' in path.read_text(encoding='utf-8') and '.mim' not in path.parts)
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_examples(tests: list[doctest.DocTest]) -> int:
    """Runs them; what went wrong is the message of the failure. Returns how many there were."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    for test in tests:
        runner.run(test, out=report.append)
    if runner.failures:
        pytest.fail(''.join(report), pytrace=False)
    return runner.tries


@pytest.mark.parametrize('name', MODULES)
def test_examples_of_a_module(name):
    assert run_examples(doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)))


@pytest.mark.parametrize('page', [page for page in PAGES if '>>>' in page.read_text(encoding='utf-8')],
                         ids=lambda page: page.stem)
def test_examples_of_a_page(page):
    """Those of a page share their names, as a reader would type them."""
    text = re.sub(r'^```.*$', '', page.read_text(encoding='utf-8'), flags=re.MULTILINE)
    assert run_examples([doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)])


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_is_python(page):
    for block in re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL):
        if '>>>' not in block:
            compile(re.sub('…,? *', '', block.replace('=…', '=...')), page.name, 'exec')  # what is left out


def test_the_site_converts_docstrings_as_its_examples_say():
    path = ROOT / 'docs' / 'site' / 'markup.py'
    spec = importlib.util.spec_from_file_location('markup', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert run_examples(doctest.DocTestFinder().find(module)) >= 5


def test_a_wrong_example_fails():
    test = doctest.DocTestParser().get_doctest('>>> 1 + 1\n3\n', {}, 'wrong', None, 0)
    with pytest.raises(pytest.fail.Exception, match='Expected:\n    3\nGot:\n    2'):
        run_examples([test])
