"""Methods from outside the package: files, files within packages, and what entry points lead to."""
import re
import sys
from pathlib import Path

import pytest

from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.config.composition import distillation_config, method_terms
from kd_det.config.files import load_config
from kd_det.config.methods import ENTRY_POINTS, PARTS, available_methods, find_files, find_module, methods
from kd_det.study.pair import Pair
from kd_det.study.variants import parse_variants, variant_config

DOCUMENTATION = Path(__file__).parents[2] / 'docs' / 'methods.md'
RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
TEACHER = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'
MINE = '''"""Mine: every feature."""
__about__ = dict(paper='a book', idea='every feature', reads=['neck'], serves='all')
{name} = dict({name}=dict(type='mmdet.FeatureImitation', tap='neck', weight={weight}))
'''


def write_method(file, weight=2.0, name='', before=''):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(before + MINE.format(name=name or file.stem, weight=weight))
    return file


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path / 'site')
    yield tmp_path / 'site'
    for name in [name for name in sys.modules if name.split('.')[0] in ('plugin', 'loud', 'single')]:
        del sys.modules[name]


def install(site, distribution, entries):
    """Writes a package's metadata: that it has these entry points."""
    folder = site / f'{distribution}-1.0.dist-info'
    folder.mkdir(parents=True)
    (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n')
    (folder / 'entry_points.txt').write_text(f'[{ENTRY_POINTS}]\n' + ''.join(f'{entry}\n' for entry in entries))


def test_a_file_is_a_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_method(tmp_path / 'my_method.py')
    write_method(tmp_path / 'others' / 'another.py', weight=3.0)
    for given in ('my_method.py', './my_method.py', str(tmp_path / 'my_method.py')):
        assert method_terms(given, 'detr').my_method.weight == 2.0
    assert list(method_terms('fgd+my_method.py+others/another.py', 'one_stage')) == ['fgd', 'my_method', 'another']
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'pkd+my_method.py', balance=0.5).model.distill
    assert made.my_method.weight == dict(type='mmdet.Balance', ratio=0.5) and list(made) == ['pkd', 'my_method']


def test_a_file_of_one_family_serves_that_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_method(tmp_path / 'mine_two_stage.py', name='mine')
    assert list(method_terms('mine_two_stage.py', 'two_stage')) == ['mine']
    with pytest.raises(ConfigurationError, match="no weights for one_stage detectors, only for two_stage"):
        method_terms('mine_two_stage.py', 'one_stage')


def test_what_a_file_imports_the_config_imports(tmp_path, monkeypatch):
    write_method(tmp_path / 'mine.py', before="custom_imports = dict(imports=['mine_terms'])\n")
    (tmp_path / 'mine_terms.py').write_text(
        'from kd_det.losses import FeatureImitation\nfrom mmdet.registry import MODELS\n\n'
        '@MODELS.register_module(force=True)\nclass MyTerm(FeatureImitation):\n    pass\n')
    (tmp_path / 'mine.py').write_text((tmp_path / 'mine.py').read_text().replace('FeatureImitation', 'MyTerm'))
    monkeypatch.syspath_prepend(tmp_path)
    config = distillation_config(RETINANET, TEACHER, 'x.pth', f"fgd+{tmp_path / 'mine.py'}")
    assert config.custom_imports.imports == ['kd_det', 'mine_terms']
    config.dump(tmp_path / 'saved.py')
    monkeypatch.delitem(sys.modules, 'mine_terms')
    assert load_config(tmp_path / 'saved.py').model.distill.mine.type == 'mmdet.MyTerm'
    assert 'mine_terms' in sys.modules


def test_a_file_within_a_package_is_a_method(site):
    write_method(site / 'plugin' / 'recipes' / 'mine.py')
    write_method(site / 'plugin' / '.mim' / 'configs' / 'hers.py', weight=4.0)
    (site / 'plugin' / '__init__.py').write_text("raise RuntimeError('a method is found without importing anything')")
    assert method_terms('plugin::recipes/mine.py', 'one_stage').mine.weight == 2.0
    assert method_terms('plugin::hers.py', 'one_stage').hers.weight == 4.0
    assert method_terms('kd_det::_base_/methods/fgd_two_stage.py', 'two_stage') == method_terms('fgd', 'two_stage')


@pytest.mark.parametrize('method, error, said', [
    ('my_metod.py', FileNotFoundError, "no method's file 'my_metod.py'. Nearest: my_method.py."),
    ('nowhere/my_method.py', FileNotFoundError, "no method's file 'nowhere/my_method.py'"),
    ('my_method', ConfigurationError, "no method 'my_method'. Choose from .* Did you mean the file 'my_method.py'"),
    ('fgx', ConfigurationError, "no method 'fgx'. Choose from .*fgd.*Nearest: fgd"),
    ('no_such_package::mine.py', ConfigurationError, "There is no package 'no_such_package'"),
    ('plugin::recipes/mien.py', FileNotFoundError, "'plugin::recipes/mien.py'. Nearest: mine.py."),
    ('renamed.py', ConfigurationError, "renamed.py' holds no method: expected renamed = dict.* it defines 'my_method'"),
    ('empty.py', ConfigurationError, "empty.py' holds no method: .*; it defines nothing"),
    ('flat.py', ConfigurationError, "flat.py' holds no method: expected flat = dict.*of terms by name"),
    ('broken.py', ConfigurationError, 'not valid Python'),
    ('my_method.py+my_method.py', ConfigurationError, "names 'my_method.py' twice"),
    ('my_method.py+./my_method.py', ConfigurationError, "both have a term 'my_method'")])
def test_what_is_no_method_is_told(method, error, said, tmp_path, site, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_method(site / 'plugin' / 'recipes' / 'mine.py')
    write_method(tmp_path / 'my_method.py')
    write_method(tmp_path / 'renamed.py', name='my_method')
    (tmp_path / 'empty.py').write_text('')
    (tmp_path / 'flat.py').write_text("flat = dict(type='mmdet.PKD', tap='neck')\n")
    (tmp_path / 'broken.py').write_text('broken = dict(\n')
    with pytest.raises(error, match=said):
        method_terms(method, 'one_stage')


@pytest.mark.parametrize('term, said', [
    ("type='mmdet.FGX'", "type: there is no 'FGX'. Nearest: FGD.* import it with custom_imports"),
    ("type='mmdet.FGD', tap='neck', tempreature=1", "tempreature: there is no such key. Nearest: temperature")])
def test_a_term_that_can_not_be_built_is_told_with_its_method(term, said, tmp_path):
    (tmp_path / 'mine.py').write_text(f'mine = dict(mine=dict({term}))\n')
    with pytest.raises(ConfigurationError, match=f"The method '.*mine.py': its term 'mine' can not be built: {said}"):
        distillation_config(RETINANET, TEACHER, 'x.pth', str(tmp_path / 'mine.py'))


def test_a_benchmark_takes_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_method(tmp_path / 'sub' / 'my_method.py')
    variants = parse_variants('fgd+sub/my_method.py@paper,sub/my_method.py@balance=0.5')
    assert [variant.folder for variant in variants] == [
        'none', 'fgd+sub_my_method.py@paper', 'sub_my_method.py@balance=0.5']
    pair = Pair(load_config(RETINANET), TEACHER)
    assert variant_config(variants[1], pair, ['x.pth']).model.distill.my_method.weight == 2.0
    assert variant_config(variants[2], pair, ['x.pth']).model.distill.my_method.weight.ratio == 0.5
    with pytest.raises(FileNotFoundError, match="no method's file 'my_metod.py'"):
        parse_variants('fgd,my_metod.py@paper')


def test_entry_points_lead_to_methods(site, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '250')
    write_method(site / 'plugin' / 'recipes' / 'mine.py')
    write_method(site / 'plugin' / 'recipes' / 'mine_detr.py', weight=3.0, name='mine')
    (site / 'plugin' / 'recipes' / '__init__.py').touch()
    (site / 'plugin' / '__init__.py').write_text("raise RuntimeError('a method is found without importing anything')")
    write_method(site / 'single.py', weight=5.0)
    install(site, 'my_plugin', ['all = plugin.recipes', 'one = single'])
    found = available_methods()
    assert list(found['mine']) == ['', 'detr'] and found['single'] == {'': site / 'single.py'}
    assert list(found)[0] == 'bckd' and set(found) > {'fgd', 'mine', 'single'}
    assert method_terms('fgd+mine+single', 'one_stage').single.weight == 5.0
    assert method_terms('mine', 'detr').mine.weight == 3.0
    config = distillation_config(RETINANET, TEACHER, 'x.pth', 'mine')
    assert config.model.distill.mine.type == 'mmdet.FeatureImitation'
    assert parse_variants('mine@paper')[1].method == 'mine'
    assert main(['methods']) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if 'mine (my_plugin)' in line)
    assert [cell.strip() for cell in row.split('│')[2:-1]] == ['every feature', 'neck features', 'all', 'a book']


def test_a_bad_entry_point_spoils_its_own_row_alone(site):
    (site / 'loud' / 'empty').mkdir(parents=True)
    write_method(site / 'loud' / 'fgd.py', weight=9.0)
    (site / 'single.py').write_text('single = dict(\n')
    install(site, 'bad_plugin', ['lost = no_such_package.recipes', 'vague = loud.empty', 'wrong = loud.nothing',
                                 'taken = loud.fgd', 'broken = single', 'odd = loud.fgd:attribute'])
    rows = methods()
    errors = {method.name: method.error for method in rows if method.source == 'bad_plugin'}
    assert errors['lost'] == "There is no package 'no_such_package'."
    assert 'holds no method' in errors['vague'] and errors['wrong'] == "There is no module 'loud.nothing'."
    assert errors['fgd'].startswith('The name is taken by a method of kd_det; this one goes by its file: ')
    assert 'not valid Python' in errors['single'] and 'no module' in errors['odd']
    assert not any(method.error for method in rows if not method.source)
    assert method_terms('fgd', 'one_stage').fgd.type == 'mmdet.FGD'
    assert rows.to_dict()['fgd']['paper'] == 'arXiv 2111.11837'
    assert method_terms(str(find_files('loud::fgd.py')['']), 'one_stage').fgd.weight == 9.0


def test_modules_are_found_without_being_imported(site):
    (site / 'plugin' / 'deep').mkdir(parents=True)
    (site / 'plugin' / 'deep' / 'file.py').write_text('raise RuntimeError')
    (site / 'single.py').write_text('raise RuntimeError')
    assert find_module('plugin.deep') == site / 'plugin' / 'deep'
    assert find_module('plugin.deep.file') == site / 'plugin' / 'deep' / 'file.py'
    assert find_module('single') == site / 'single.py'
    for name in ('single.deep', 'plugin.nothing', 'no_such_package', '', '.', 'sys'):
        with pytest.raises(ConfigurationError, match='There is no'):
            find_module(name)


def test_the_documented_method_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = DOCUMENTATION.read_text(encoding='utf-8').partition('## A method of your own')[2].partition('\n## ')[0]
    shown = re.search('```python\n(.*?)```', section, re.DOTALL)[1]
    Path('my_method.py').write_text(shown)
    stated, = methods('my_method.py')
    Path('my_method.py').write_text(re.sub(r"(?s)__about__ = .*?'\)\n", '', shown))
    found, = methods('my_method.py')
    assert stated.paper and found.paper is None
    assert (stated.reads, stated.detectors) == (found.reads, found.detectors)
    assert list(method_terms('fgd+my_method.py', 'two_stage')) == ['fgd', 'my_method']
    assert all(f'`{part}`' in section for part in PARTS) and f'entry-points."{ENTRY_POINTS}"' in section
