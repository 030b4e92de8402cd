"""Examples of docstrings and pages run and show what they say; messages that pages explain are said."""
from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
from collections.abc import Iterator
from itertools import pairwise
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


OF_OTHERS = ('libGL.so.1', 'Job not requeued')  # messages that other libraries give
FEWEST = 6  # words of a message that tell it from others


def list_texts(source: str) -> Iterator[str]:
    """All texts of a module but its docstrings; '…' stands for what an f-string fills in."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in (each for each in ast.walk(tree) if id(each) not in docstrings):
        if isinstance(node, ast.JoinedStr):
            yield ''.join(part.value if isinstance(part, ast.Constant) else ' … ' for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def list_words(text: str) -> list[str]:
    return re.findall('[a-z]+', text.lower())


def share_that_is_said(message: str, pairs: set[tuple[str, str]]) -> float:
    """The share of a message's words that stand beside one of their neighbours in some text."""
    words = list_words(re.sub(r"'[^']*'|^\S+: ", ' … ', message))  # names and places in it are an example's
    beside = [pair in pairs for pair in pairwise(words)]
    said = sum(map(any, zip([False, *beside], [*beside, False])))
    return said / len(words) if len(words) >= FEWEST else 1.0


def test_messages_that_the_pages_explain_are_said():
    sources = [file.read_text(encoding='utf-8') for file in (ROOT / 'kd_det').rglob('*.py') if '.mim' not in file.parts]
    pairs = {pair for source in sources for text in list_texts(source) for pair in pairwise(list_words(text))}
    rows = re.findall(r'^\| (.*?) \|', (ROOT / 'docs' / 'troubleshooting.md').read_text(encoding='utf-8'), re.MULTILINE)
    messages = [message for row in rows for message in re.findall('`([^`]+)`', row)
                if not any(other in message for other in OF_OTHERS)]
    assert len(messages) > 250
    unsaid = [message for message in messages if share_that_is_said(message, pairs) < 0.5]
    assert not unsaid
    assert share_that_is_said('The pupil is not as clever as its master, who sighs and leaves', pairs) < 0.5
