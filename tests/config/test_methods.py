"""The methods' files: what ``kd-det methods`` shows of them, and that it is so."""
import ast
import json
import subprocess
import sys

import pytest
from mmengine.config import Config

from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.config.choices import DETECTOR_FAMILIES, FAMILIES
from kd_det.config.composition import find_parts, find_served, load_method
from kd_det.config.detectors import DETECTORS, find_family
from kd_det.config.methods import (
    ABOUT,
    ALL,
    PARTS,
    available_methods,
    find_files,
    methods,
    name_sum,
    read_about,
    served_kinds,
    split_family,
)

FILES = [(files, family) for files in available_methods().values() for family in files]
ABOUT_MINE = '''__about__ = {about}
mine = dict(mine=dict(type='mmdet.PKD', tap='neck'))
'''


@pytest.fixture(scope='module')
def listed():
    return {method.name: method for method in methods()}


@pytest.fixture
def method_root(tmp_path, monkeypatch):
    """A folder in place of that of kd_det's own methods."""
    folder = tmp_path / 'methods'
    folder.mkdir()
    monkeypatch.setattr('kd_det.config.methods.METHOD_ROOT', folder)
    return folder


@pytest.mark.parametrize('files, family', FILES, ids=lambda each: each if isinstance(each, str) else '')
def test_a_file_states_what_its_terms_are_found_to_read_and_to_serve(files, family):
    about, kinds = read_about(files[family]), served_kinds(files, family)
    terms = load_method(files[family]).terms
    served = find_served(terms, kinds)
    assert about['reads'] == find_parts(terms) and set(about['reads']) <= set(PARTS)
    assert about['serves'] == (ALL if served == kinds else served)
    assert {key: read_about(file)[key] for file in files.values() for key in ('paper', 'idea')} == {
        key: about[key] for key in ('paper', 'idea')}
    assert ast.get_docstring(ast.parse(files[family].read_text(encoding='utf-8'))).splitlines()[0].endswith(
        f": {about['idea']}.")


def test_kinds_of_detectors_are_of_the_families_that_their_heads_tell():
    assert {kind: find_family(kind, heads) for kind, heads in DETECTORS.items()} == DETECTOR_FAMILIES
    assert list(DETECTORS) == list(DETECTOR_FAMILIES) and set(DETECTOR_FAMILIES.values()) == set(FAMILIES)


def test_methods_are_what_the_files_hold(listed):
    assert listed.keys() == available_methods().keys() and not any(method.error for method in listed.values())
    assert listed['fgd'].paper == 'arXiv 2111.11837' and listed['fgd'].families == FAMILIES[:3]
    assert listed['fsp'].paper == 'Yim et al., CVPR 2017' and listed['fsp'].reads == ('backbone', )
    assert listed['dkd'].families == ('two_stage', ) and listed['dkd'].reads == ('roi_head', )
    assert listed['frs'].reads == ('neck', 'bbox_head', 'rpn_head')  # for one-stage and for two-stage detectors
    assert listed['pgd'].reads == ('neck', 'bbox_head')  # a mask reads the teacher's head alone
    assert listed['pkd'].families == FAMILIES  # two files: one family's, and all others'
    assert listed['querykd'].families == ('detr', ) and listed['querykd'].reads == ('bbox_head.queries', )
    assert listed['encoder'].reads == ('encoder', 'bbox_head.queries')


def test_a_method_serves_the_detectors_whose_heads_have_what_its_terms_read(listed):
    assert listed['cwd'].detectors == tuple(DETECTORS)
    assert set(DETECTORS) - set(listed['fgd'].detectors) == {*listed['querykd'].detectors}  # the DETRs
    assert listed['dkd'].detectors == ('Faster R-CNN', 'Cascade R-CNN', 'Mask R-CNN')
    assert listed['ld'].detectors == ('GFL', )  # distributions
    assert listed['crosskd'].detectors == ('RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX')  # towers
    assert {*DETECTORS} - {*listed['kd'].detectors} == {*listed['querykd'].detectors}
    assert {*listed['rm'].detectors} == {*listed['kd'].detectors} - {*listed['dkd'].detectors}  # positives
    assert 'FCOS' not in listed['fgfi'].detectors  # no weights for its family
    assert 'DETR' not in listed['fsp'].detectors and 'DINO' in listed['fsp'].detectors  # several levels


def test_methods_are_data_and_a_table():
    found = methods()
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored['fgd']['paper'] == 'arXiv 2111.11837' and stored['fgd']['families'] == list(FAMILIES[:3])
    assert stored['fgd']['files']['two_stage'].endswith('fgd_two_stage.py')
    row = found._repr_html_().split('<tr>')[2 + list(stored).index('mgd')]
    assert row.startswith('<td>mgd</td><td>the teacher&#x27;s feature') and 'neck features' in row


def test_methods_are_listed_without_anything_heavy():
    """Nor is a file run; the benchmark of the command line has the time that it takes."""
    program = ("import sys; from kd_det.cli.main import main; assert main(['methods']) == 0;"
               "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'mmengine', 'mmdet', 'mmcv', 'numpy'})")
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0 and 'arXiv' in done.stdout and done.stdout.splitlines()[-1] == '', done.stderr


@pytest.mark.parametrize('mode', ['text', 'lazy'])
def test_what_a_file_states_is_no_part_of_a_config(mode, tmp_path):
    file, base = tmp_path / 'mine.py', tmp_path / 'base.py'
    base.write_text(ABOUT_MINE.format(about="dict(paper='a book')"))
    file.write_text("__about__ = dict(idea='all')\n" + (
        "_base_ = './base.py'\nmodel = dict(distill=_base_.mine)\n" if mode == 'text' else
        'from mmengine.config import read_base\nwith read_base():\n    from .base import *\n'
        'model = dict(distill=mine)\n'))
    config = Config.fromfile(file)
    assert Config._is_lazy_import(str(file)) == (mode == 'lazy')
    assert set(config) - {'read_base'} == {'mine', 'model'} and ABOUT not in config.pretty_text
    config.dump(tmp_path / 'saved.py')
    assert Config.fromfile(tmp_path / 'saved.py').to_dict() == config.to_dict()


@pytest.mark.parametrize('about', [
    "dict(paper='a book', idea='all', reads=['neck', 'my_part'], serves='all')",
    "{'paper': 'a book', 'idea': 'all', 'reads': ('neck', 'my_part'), 'serves': 'all'}"])
def test_a_file_may_state_it_as_either_kind_of_dict(about, method_root):
    (method_root / 'mine.py').write_text(ABOUT_MINE.format(about=about))
    method, = methods()
    assert (method.paper, method.idea, method.reads) == ('a book', 'all', ('neck', 'my_part'))
    assert next(methods().rows()) == ('mine', 'all', 'neck features, my_part', 'all', 'a book')


@pytest.mark.parametrize('about', [
    "dict(paper=7)", "dict(reads='neck')", "dict(serves='some')", "dict(papers='a book')", "dict(idea=1 + x)", "'text'",
    "dict(zip(['paper'], ['a book']))", "dict(reads=['neck', 1])", "{'paper': {[]: 1}}"])
def test_what_is_stated_in_another_form_is_told_with_its_line(about, tmp_path):
    (tmp_path / 'mine.py').write_text('\n' + ABOUT_MINE.format(about=about))
    with pytest.raises(ConfigurationError, match=r"mine.py, line 2: __about__ is expected in the form dict\(paper="):
        read_about(tmp_path / 'mine.py')


def test_one_bad_file_spoils_its_own_row_alone(method_root, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '250')
    (method_root / 'broken.py').write_text('broken = dict(\n')
    (method_root / 'lying_detr.py').write_text(ABOUT_MINE.format(about="dict(serves='everything')"))
    (method_root / 'mine.py').write_text(ABOUT_MINE.format(about="dict(paper='a book', idea='all', serves=['DINO'])"))
    (method_root / 'silent.py').write_text('silent = dict(raise_=1 / 0)\n')  # no file is run
    assert main(['methods']) == 0
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row and row[0]}
    assert rows['broken'][0].startswith("The method's file") and 'is not valid Python' in rows['broken'][0]
    assert '__about__ is expected in the form' in rows['lying'][0]
    assert rows['mine'] == ['all', 'not stated', 'DINO', 'a book'] and rows['silent'] == ['not stated'] * 4
    assert list(load_method(find_files('mine')['']).terms) == ['mine']
    with pytest.raises(ConfigurationError, match='not valid Python'):
        load_method(find_files('broken')[''])


def test_what_a_file_does_not_state_is_found_when_it_is_asked_for(method_root, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '250')
    (method_root / 'mine_one_stage.py').write_text("mine = dict(mine=dict(type='mmdet.CrossKD', head='bbox_head'))\n")
    (method_root / 'mine.py').write_text(ABOUT_MINE.format(about="dict(idea='all')"))
    assert next(methods().rows()) == ('mine', 'all', 'not stated', 'not stated', 'not stated')
    method, = methods('mine')
    assert method.reads == ('neck', 'bbox_head')
    others = {kind for kind, family in DETECTOR_FAMILIES.items() if family != 'one_stage'}
    assert set(method.detectors) == {'RetinaNet', 'ATSS', 'GFL', 'RTMDet', *others}
    assert main(['methods', str(method_root / 'mine.py')]) == 0
    assert str(method_root / 'mine.py') in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="no method 'mien'.*Nearest: mine"):
        methods('mien')


@pytest.mark.parametrize('stem, parts', [
    ('fgd_two_stage', ('fgd', 'two_stage')), ('pkd', ('pkd', '')), ('my_detr_one_stage', ('my_detr', 'one_stage')),
    ('anchor_free', ('anchor_free', '')), ('detr', ('detr', ''))])
def test_a_files_name_is_that_of_the_method_and_of_a_family(stem, parts, tmp_path):
    assert split_family(tmp_path / f'{stem}.py') == parts


def test_a_sum_has_a_name_that_a_file_can_have():
    assert name_sum('fgd+pkd') == 'fgd+pkd' and name_sum('none') == 'none'
    assert name_sum('fgd+../a/my.py+pkg::b/other.py') == 'fgd+my+other'
