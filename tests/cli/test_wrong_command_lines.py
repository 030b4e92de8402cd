"""Wrong command lines, and surroundings in which a right one can not work: one line that says where, and status 2."""
import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from io import StringIO
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from kd_det.cli import main as entry
from kd_det.cli.main import main, run_tool
from kd_det.compat import process

ROOT = Path(__file__).parents[2]
LAUNCH_VARIABLES = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_PROCID', 'SLURM_NTASKS',
                    'SLURM_NODELIST', 'OMPI_COMM_WORLD_RANK', 'TORCHELASTIC_RUN_ID')
DISTILL = ['distill', 'student.py', '--teacher', 'teacher.py', '--teacher-checkpoint', 'teacher.pth', '--method']
BENCHMARK = ['benchmark', '--student', 'student.py', '--teacher', 'teacher.py', '--work-dir', 'bench', '--methods']
SWEEP = ['sweep', '--student', 'student.py', '--teacher', 'teacher.py', '--work-dir', 'bench', '--method', 'fgd']

FILES = {
    'exits.py': 'x = 1\nimport sys\nsys.exit(0)\n',
    'exits_with_text.py': "raise SystemExit('enough')\n",
    'interrupts.py': 'raise KeyboardInterrupt\n',
    'raises.py': 'x = 1\n1 / 0\n',
    'recurses.py': "_base_ = 'recurses.py'\n",
    'calls_itself.py': 'def f():\n    return f()\nf()\n',
    'no_memory.py': 'raise MemoryError\n',
    'generator.py': 'raise GeneratorExit\n',
    'no_base.py': "_base_ = 'gone.py'\n",
    'two_bases.py': "_base_ = ['raises.py', 'exits.py']\n",
    'syntax.py': 'a = 1\nmodel = dict(\n',
    'lazy.py': 'from mmengine.config import read_base\nwith read_base():\n    from .gone import *\n',
    'list.json': '[1, 2]',
    'cut.json': '{"model": ',
    'broken.yaml': 'a: [1',
    'config.txt': 'model = 1',
    'imports_nothing.py': "custom_imports = dict(imports=['kd_no_such_module'])\n",
    'imports_broken.py': "custom_imports = dict(imports=['kd_broken_module'])\n",
    'kd_broken_module.py': 'x = 1\nimport kd_no_such_package\n',
    'imports_exit.py': "custom_imports = dict(imports=['kd_exit_module'])\n",
    'kd_exit_module.py': 'x = 1\n\nraise SystemExit(0)\n',
    'imports_syntax.py': "custom_imports = dict(imports=['kd_syntax_module'])\n",
    'kd_syntax_module.py': 'def f(:\n',
    'empty.py': '',
    'a b ü.py': 'x = 1\n1 / 0\n',
    'method_without_terms.py': 'x = 1\n',
    'kd_broken_exit.py': 'def leave(options):\n    raise SystemExit(0)\n',
}


@pytest.fixture(scope='module')
def files(tmp_path_factory, coco_folder, retinanet):
    """A folder with data, a student and a teacher that would do, and much that would not; the data are read only."""
    folder = tmp_path_factory.mktemp('wrong')
    (folder / 'coco').symlink_to(coco_folder)
    loader = dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
        type='CocoDataset', data_root='coco/', ann_file='all.json', data_prefix=dict(img=''),
        metainfo=dict(classes=('blue', 'green', 'red')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                  dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')]))
    common = dict(default_scope='mmdet', data_root='coco/', train_dataloader=loader, val_dataloader=loader,
                  val_evaluator=dict(type='CocoMetric', ann_file='coco/all.json', metric='bbox'),
                  test_dataloader=loader, test_cfg=dict(type='TestLoop'),
                  test_evaluator=dict(type='CocoMetric', ann_file='coco/all.json', metric='bbox'),
                  train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1), val_cfg=dict(type='ValLoop'),
                  optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)), log_level='WARNING')
    Config(dict(common, model=retinanet())).dump(folder / 'student.py')
    Config(dict(common, model=retinanet(depth=50))).dump(folder / 'teacher.py')
    model = dict(type='DetectionDistiller', student=retinanet(), teacher=dict(config='teacher.py', checkpoint='t.pth'),
                 distill=dict(fgd=dict(type='FGD')))
    Config(dict(common, model=model)).dump(folder / 'run.py')
    torch.save(dict(state_dict={}), folder / 'teacher.pth')
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding='utf-8')
    (folder / 'latin.py').write_bytes("name = 'café'\n".encode('latin-1'))
    (folder / 'binary.py').write_bytes(bytes(range(256)))
    (folder / 'folder.py').mkdir()
    (folder / 'empty_folder').mkdir()
    run = folder / 'other_results'
    run.mkdir()
    (run / 'results.json').write_text('{"runs": {"plain": []}}')
    (folder / 'cut_results').mkdir()
    (folder / 'cut_results' / 'results.json').write_text('{"runs": [\n{"varia')
    (folder / 'unfinished').mkdir()
    (folder / 'unfinished' / 'none').mkdir()
    (folder / 'unfinished' / 'none' / 'seed0').mkdir()
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    monkeypatch.delenv('KD_DET_DEBUG', raising=False)
    monkeypatch.setattr(MMLogger, '_instance_dict', OrderedDict())  # those of earlier tests write to closed streams
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('LOCAL_RANK', '0')
    return files


def said_by(arguments, capsys, command=main) -> str:
    """What a command that ends with status 2 says: one line on stderr, unless it is a list of faults."""
    capsys.readouterr()
    try:
        status = command(arguments)
    except SystemExit as exit_:
        status = exit_.code
    said = capsys.readouterr().err
    assert status == 2, said
    lines = [line for line in said.splitlines() if 'UserWarning' not in line and 'warnings.warn' not in line]
    assert 'Traceback' not in said and lines[0].startswith('kd-det: error: ')
    assert not [line for line in lines[1:] if not line.startswith('  ')]  # of several faults each has a line
    return '\n'.join(lines)


WRONG = [
    # the command line itself
    ([], 'arguments are required: COMMAND'),
    (['distil'], "invalid choice: 'distil', did you mean 'distill'?"),
    (['trian', 'student.py'], "'trian', did you mean 'train'?"),
    (['benchmark_step', 'run.py'], "did you mean 'benchmark-step'?"),
    (['--versoin'], "unrecognized arguments: --versoin, did you mean '--version'?"),
    (['train'], 'arguments are required: config. See kd-det train --help'),
    (['train', 'student.py', 'more.py'], 'unrecognized arguments: more.py'),
    (['train', 'student.py', '--epoch-s', '1'], "--epoch-s, did you mean '--epochs'?"),
    (['train', 'student.py', '--workdir', 'x'], "--workdir, did you mean '--work-dir'?"),
    (['test', 'student.py', 't.pth', '--showdir=x'], "--showdir=x, did you mean '--show-dir'?"),
    (['train', 'student.py', '--launcher', 'pytroch'], "'pytroch', did you mean 'pytorch'?"),
    (['train', 'student.py', '--track', 'tensorbord'], "'tensorbord', did you mean 'tensorboard'?"),
    ([*DISTILL, 'fgd', '--family', 'onestage'], "'onestage', did you mean 'one_stage'?"),
    ([*BENCHMARK, 'fgd', '--fidelity', 'vall'], "'vall', did you mean 'val'?"),
    (['--completion', 'bahs'], "'bahs', did you mean 'bash'?"),
    (['train', 'student.py', '--epochs', 'two'], '--epochs'),
    (['train', 'student.py', '--epochs', '1\n2'], '1\\n2'),
    (['train', 'student.py', '--seed', '1.5'], 'argument --seed: expected an integer'),
    (['test', 'student.py', 't.pth', '--out', 'x.json'], "'x.json' does not end in .pkl"),
    ([*DISTILL, 'fgd', '--balance', '1', '--paper-weights'], 'not allowed with argument'),
    # settings
    (['train', 'student.py', '--cfg-options', 'seed'], "--cfg-options: expected KEY=VALUE, got 'seed'"),
    (['train', 'student.py', '--cfg-options', '=1'], "expected KEY=VALUE, got '=1'"),
    (['train', 'student.py', '--cfg-options', 'model..x=1'], "expected KEY=VALUE, got 'model..x=1'"),
    (['train', 'student.py', '--cfg-options', '.model=1'], "expected KEY=VALUE, got '.model=1'"),
    (['train', 'student.py', '--cfg-options', 'model.levels=[0,1'],
     "--cfg-options model.levels: expected one value or one list, whose brackets match, got '[0,1'"),
    (['train', 'student.py', '--cfg-options', 'model.levels=[0'], "got '[0'"),
    (['train', 'student.py', '--cfg-options', 'model.levels=0,1]'], "got '0,1]'"),
    (['train', 'student.py', '--cfg-options', 'model.levels=[(0,1]'], "got '[(0,1]'"),
    (['train', 'student.py', '--cfg-options', 'model.levels=[0],[1]'], "got '[0],[1]'"),
    (['train', 'student.py', '--cfg-options', 'optimizer.lr=1'], "no run reads a key 'optimizer'"),
    (['train', 'student.py', '--cfg-options', 'train_dataloder.batch_size=1'], "Nearest: train_dataloader."),
    ([*BENCHMARK, 'fgd@model.distill.fgd.levels=[0,1'],
     "--methods fgd@model.distill.fgd.levels=[0,1: expected one value or one list, whose brackets match"),
    ([*BENCHMARK, 'fgd@model.distill.fgd.levels=(0'], "got '(0'"),
    ([*BENCHMARK, 'fgd@'], "there is no setting '@'"),
    ([*BENCHMARK, 'fgd@temperature=1'], "there is no setting '@temperature=1'"),
    ([*BENCHMARK, 'fgd@balance=much'], "expected @balance=RATIO, a number of at least 0, got 'much'"),
    ([*BENCHMARK, 'fgd@teachers=0'], 'expected @teachers=N'),
    ([*BENCHMARK, 'fgd@augment=mosaik'], 'expected @augment=mosaic, mixup'),
    ([*BENCHMARK, 'fgd,fgd'], "names 'fgd' 2 times"),
    ([*BENCHMARK, 'fgdd'], "there is no method 'fgdd'"),
    ([*BENCHMARK, 'fgd+'], "there is no method ''"),
    ([*BENCHMARK, 'gone.py'], "'gone.py'"),
    ([*SWEEP, '--set', 'fgd.temperature='], "expected KEY=A,B,C with a dotted key"),
    ([*SWEEP, '--set', 'fgd.temperature=,'], "got 'fgd.temperature=,'"),
    ([*SWEEP, '--set', 'temperature=1'], "got 'temperature=1'"),
    ([*SWEEP, '--set', 'fgd.levels=[0,1'], 'whose brackets match'),
    (SWEEP, 'give --set, --teachers, --augment, --noise, --shift or --without'),
    # devices and launchers
    (['benchmark-step', 'run.py', '--device', 'gpu'], "--device: expected a device that is there: cpu, got 'gpu'"),
    (['benchmark-step', 'run.py', '--device', 'xpu'], "got 'xpu'"),
    (['benchmark-step', 'run.py', '--device', ''], "got ''"),
    (['benchmark-step', 'run.py', '--device', 'cpu:x'], "got 'cpu:x'"),
    (['train', 'student.py', '--launcher', 'pytorch'],
     '--launcher pytorch: there is no environment variable RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT'),
    (['train', 'student.py', '--launcher', 'slurm'], 'no environment variable SLURM_PROCID'),
    (['test', 'student.py', 'teacher.pth', '--launcher', 'mpi'], 'no environment variable OMPI_COMM_WORLD_RANK'),
    # configs
    (['train', 'gone.py'], "There is no config file 'gone.py'"),
    (['train', 'folder.py'], "There is no config file 'folder.py': it is a folder."),
    (['train', '.'], 'it is a folder'),
    (['train', 'student.py/x'], "'student.py/x'"),
    (['train', 'coco/0.png'], "'coco/0.png' can not be read"),
    (['train', 'exits.py'], "'exits.py' can not be read: it calls sys.exit(0) ('"),
    (['train', 'exits.py'], "exits.py', line 3)"),
    (['train', 'exits_with_text.py'], "it calls sys.exit('enough')"),
    (['train', 'interrupts.py'], "'interrupts.py' can not be read: KeyboardInterrupt"),
    (['train', 'raises.py'], "raises.py', line 2)"),
    (['train', 'calls_itself.py'], "RecursionError: maximum recursion depth exceeded"),
    (['train', 'no_memory.py'], "'no_memory.py' can not be read: MemoryError"),
    (['train', 'generator.py'], "'generator.py' can not be read: GeneratorExit"),
    (['train', 'no_base.py'], "'no_base.py' can not be read: FileNotFoundError"),
    (['train', 'two_bases.py'], "raises.py', line 2)"),
    (['train', 'syntax.py'], "'syntax.py' is not valid Python"),
    (['train', 'lazy.py'], "'lazy.py' can not be read"),
    (['train', 'list.json'], "'list.json' can not be read"),
    (['train', 'cut.json'], "'cut.json' can not be read"),
    (['train', 'broken.yaml'], "'broken.yaml' can not be read: ParserError"),
    (['train', 'config.txt'], "'config.txt' can not be read"),
    (['train', 'latin.py'], "'latin.py' can not be read: UnicodeDecodeError"),
    (['train', 'binary.py'], "'binary.py'"),
    (['train', 'empty.py'], "'empty.py' has no model"),
    (['train', 'a b ü.py'], "'a b ü.py' can not be read: ZeroDivisionError"),
    (['train', 'imports_nothing.py'], "custom_imports: ModuleNotFoundError: No module named 'kd_no_such_module'"),
    (['train', 'imports_broken.py'], "kd_broken_module.py', line 2)"),
    (['train', 'imports_exit.py'], "it calls sys.exit(0) ('"),
    (['train', 'imports_exit.py'], "kd_exit_module.py', line 3)"),
    (['train', 'imports_syntax.py'], 'not valid Python'),
    (['train', 'mmdet::gone.py'], "'mmdet::gone.py' can not be read"),
    (['train', 'gone::x/y.py'], "'gone::x/y.py' can not be read"),
    (['test', 'exits.py', 'teacher.pth'], 'it calls sys.exit(0)'),
    (['export', 'exits.py', 'teacher.pth', 'out.pth'], 'it calls sys.exit(0)'),
    (['inspect', 'exits.py'], 'it calls sys.exit(0)'),
    (['benchmark-step', 'exits.py', '--device', 'cpu'], 'it calls sys.exit(0)'),
    (['distill', 'exits.py', *DISTILL[2:], 'fgd'], 'it calls sys.exit(0)'),
    ([*DISTILL[:3], 'exits.py', *DISTILL[4:], 'fgd'], 'it calls sys.exit(0)'),
    ([*DISTILL, 'exits.py'], 'exits.py'),
    ([*DISTILL, 'method_without_terms.py'], 'method_without_terms.py'),
    ([*BENCHMARK[:2], 'exits.py', *BENCHMARK[3:], 'fgd'], 'it calls sys.exit(0)'),
    (['methods', 'syntax.py'], 'syntax.py'),
    (['methods', 'gone.py'], 'gone.py'),
    (['methods', 'fgdd'], "Nearest: fgd."),
    (['demo', '--config', 'gone.py', '--out', 'demo'], "'gone.py'"),
    (['demo', '--config', 'student.py', '--out', 'demo'], '--config student.py is no distillation'),
    # files and folders
    (['train', 'student.py', '--work-dir', 'student.py'], 'student.py'),
    (['train', 'student.py', '--work-dir', '/proc/none'], '/proc/none'),
    (['train', 'student.py', '--data-root', 'gone'], 'gone/all.json'),
    (['test', 'student.py', '.'], "there is no file '.'"),
    (['test', 'student.py', 'teacher.pth', '--cfg-options', 'test_dataloader=None', 'test_evaluator=None',
      'test_cfg=None'], 'has no test_dataloader'),
    (['test', 'student.py', 'coco/all.json'], 'coco/all.json cannot be read as a PyTorch checkpoint'),
    (['test', 'student.py', 'student.py'], 'student.py cannot be read as a PyTorch checkpoint'),
    (['export', 'student.py', 'gone.pth', 'out.pth'], 'gone.pth'),
    (['benchmark-step', 'student.py', '--device', 'cpu'], "'student.py' is a plain detector"),
    ([*BENCHMARK[:-3], '--work-dir', 'student.py', '--methods', 'fgd'], 'student.py'),
    (['report', 'gone'], "There is no work dir 'gone'"),
    (['report', 'student.py'], "There is no work dir 'student.py'"),
    (['report', 'empty_folder'], "'empty_folder' is no work dir"),
    (['report', 'other_results'], "'other_results/results.json' is not that of kd-det benchmark"),
    (['report', 'cut_results'], "'cut_results/results.json': cut off in line 2: no JSON"),
    (['report', 'unfinished'], "'unfinished' has no run that has finished and can be read"),
]


@pytest.mark.parametrize('arguments, said', WRONG, ids=[' '.join(arguments)[:70] for arguments, _ in WRONG])
def test_a_wrong_command_line_is_one_clear_line(arguments, said, here, capsys):
    assert said in said_by(arguments, capsys)
    assert [file.name for file in here.glob('**/*.pth')] == ['teacher.pth']  # nothing was trained


@pytest.mark.parametrize('tool, arguments, said', [
    ('train', ['exits.py'], 'it calls sys.exit(0)'),
    ('train', ['student.py', '--cfg-options', 'model.levels=[0,1'], 'whose brackets match'),
    ('train', ['student.py', '--amq'], "--amq, did you mean '--amp'?"),
    ('test', ['student.py', 'teacher.pth', '--launcher', 'pytorch'], 'no environment variable RANK'),
    ('benchmark', ['--jobs', 'x'], '--jobs'),
])
def test_the_tools_say_the_same(tool, arguments, said, here, capsys):
    assert said in said_by(arguments, capsys, lambda arguments: run_tool(tool, arguments))


@pytest.mark.parametrize('environment, said', [
    (dict(RANK='x'), "expected a number in the environment variable RANK, got 'x'"),
    (dict(RANK='2'), 'expected RANK below WORLD_SIZE, got 2 of 2'),
    (dict(MASTER_PORT='a'), "MASTER_PORT, got 'a'"),
    (dict(WORLD_SIZE=''), 'no environment variable WORLD_SIZE'),
    (dict(), 'each process needs a GPU, and there is none'),
])
def test_what_a_launcher_tells_must_be_possible(environment, said, here, capsys, monkeypatch):
    monkeypatch.setattr('kd_det.training.runner.get_device', lambda: 'cpu')
    for name, value in {**dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='1'),
                        **environment}.items():
        monkeypatch.setenv(name, value)
    assert said in said_by(['train', 'student.py', '--launcher', 'pytorch'], capsys)


def test_a_config_that_is_its_own_base_is_told_of(here, capsys):
    """Each level reads the file again: few are enough here."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert 'does a _base_ name a file that names this one?' in said_by(['train', 'recurses.py'], capsys)
    finally:
        sys.setrecursionlimit(before)


# ---------------------------------------------------------------- what happens to a running program


@pytest.fixture
def run_command(tmp_path):
    """Starts kd-det in a process of its own, where importing PyTorch takes for ever, and bears being interrupted."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text(
        'import sys, time\nprint("importing", flush=True)\n'
        'for _ in range(600):\n    try:\n        time.sleep(0.1)\n    except BaseException:\n        pass\n')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment.pop('PYTHONUNBUFFERED', None)

    def run(*arguments, program=('-m', 'kd_det'), **settings) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *program, *arguments], stderr=subprocess.PIPE, text=True,
                                env=environment, **{'stdout': subprocess.PIPE, **settings})

    return run


@pytest.mark.parametrize('number, status, said', [(signal.SIGINT, 130, 'kd-det: interrupted\n'),
                                                  (signal.SIGTERM, -signal.SIGTERM, '')])
@pytest.mark.parametrize('program', [('-m', 'kd_det', 'train'), (str(ROOT / 'tools' / 'train.py'), )],
                         ids=['kd-det', 'tools'])
def test_a_signal_while_modules_are_imported_ends_at_once(program, number, status, said, run_command):
    running = run_command('student.py', program=program)
    assert running.stdout.readline() == 'importing\n'
    running.send_signal(number)
    assert (running.wait(20), running.stderr.read()) == (status, said)


def test_an_interrupt_before_the_command_line_is_there_is_one_line(run_command):
    running = run_command(program=('-c', 'import kd_det.cli\nraise KeyboardInterrupt'))
    assert (running.wait(20), running.stderr.read()) == (130, 'kd-det: interrupted\n')


@pytest.mark.parametrize('unbuffered', [False, True])
@pytest.mark.parametrize('arguments', [['--help'], ['train', '--help'], ['methods'], ['--completion', 'bash']],
                         ids=' '.join)
def test_what_nobody_reads_ends_the_program_as_others(arguments, unbuffered, run_command):
    """As ``kd-det methods | head -1`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    running = run_command(*arguments, program=(*(['-u'] if unbuffered else []), '-m', 'kd_det'), stdout=writing)
    os.close(writing)
    assert (running.wait(20), running.stderr.read()) == (141, '')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no full device')
@pytest.mark.parametrize('arguments', [['--help'], ['methods']], ids=' '.join)
def test_a_full_disk_is_one_line(arguments, run_command):
    with open('/dev/full', 'w') as full:
        running = run_command(*arguments, stdout=full)
    assert (running.wait(20), running.stderr.read()) == (2, 'kd-det: error: [Errno 28] No space left on device\n')


def test_a_log_to_a_closed_pipe_is_no_traceback(here, capsys, monkeypatch):
    """MMEngine logs through handlers that would print a traceback for each line."""
    def log(options):
        logging.getLogger('kd_det.test').warning('a line')

    class Closed(StringIO):

        def write(self, text):
            raise BrokenPipeError

    handler = logging.StreamHandler(Closed())
    logging.getLogger('kd_det.test').addHandler(handler)
    monkeypatch.setattr('kd_det.cli.methods.run', log)
    monkeypatch.setattr(entry, 'is_pipe_closed', lambda stream: True)
    try:
        assert main(['methods']) == 141 and capsys.readouterr().err == ''
    finally:
        logging.getLogger('kd_det.test').removeHandler(handler)


@pytest.mark.parametrize('error, said', [
    (MemoryError(), 'out of memory. Take a smaller train_dataloader.batch_size'),
    (MemoryError('Unable to allocate 8 TiB'), 'out of memory: Unable to allocate 8 TiB. Take a smaller'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'),
     'CUDA out of memory. Tried to allocate 2.00 GiB. Take a smaller'),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
                  'allocate 9 bytes. Error code 12 (Cannot allocate memory)\nat frame #0'), 'Take a smaller'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), 'take fewer num_workers'),
    (RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'), 'take fewer num_workers'),
    (RuntimeError('[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1'), 'rank 1 is gone'),
    (RuntimeError('NCCL communicator was aborted on rank 0.'), 'rank 1 is gone'),
    (ModuleNotFoundError("No module named 'jinja2'", name='jinja2'), "there is no module 'jinja2'"),
    (PermissionError(13, 'Permission denied', '/x/config.py'), "Permission denied: '/x/config.py'"),
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (SystemExit(0), 'sys.exit(0) was called'),
])
def test_what_the_surroundings_cause_is_one_line(error, said, here, capsys, monkeypatch):
    def fail(options):
        raise error

    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr('kd_det.cli.methods.run', fail)
    assert said in (text := said_by(['methods'], capsys)) and '\n' not in text


def test_a_package_that_only_one_command_needs_may_lack(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'shtab', None)  # as if it were not installed
    assert "there is no module 'shtab'" in said_by(['--completion', 'bash'], capsys)


def test_debug_shows_where_an_exit_was_called(here, capsys, monkeypatch):
    from kd_broken_exit import leave
    monkeypatch.setattr('kd_det.cli.methods.run', leave)
    assert main(['methods', '--debug']) == 2
    assert 'Traceback' in (said := capsys.readouterr().err) and said.splitlines()[-1].startswith('kd-det: error: ')


def test_of_many_ranks_it_is_not_known_which_is_gone(monkeypatch):
    monkeypatch.setenv('RANK', '3')
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert 'another rank of 4 (this is 3) is gone' in process.describe(RuntimeError('Connection closed by peer'))


def test_an_exit_within_the_users_code_is_told_with_its_place(here, capsys, monkeypatch):
    from kd_broken_exit import leave
    monkeypatch.setattr('kd_det.cli.methods.run', leave)
    assert f"sys.exit(0) was called in '{here / 'kd_broken_exit.py'}', line 2" in said_by(['methods'], capsys)


def test_a_rank_that_is_killed_is_one_line_of_the_other(tmp_path):
    """Both wait for each other in one operation after the other, as gradients do."""
    (tmp_path / 'rank.py').write_text("""
import os, signal
import kd_det.cli.main as entry

def work(options):
    import torch
    import torch.distributed as dist
    dist.init_process_group('gloo')
    for step in range(1000):
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

parser = entry.Parser()
parser.set_defaults(run=work, command='methods', debug=False)
raise SystemExit(entry._run(lambda: parser, []))
""")
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, tmp_path / 'rank.py'], stderr=subprocess.PIPE, text=True, env={
        **os.environ, 'PYTHONPATH': str(ROOT), 'RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost',
        'MASTER_PORT': str(port)}) for rank in range(2)]
    said = ranks[0].communicate(timeout=120)[1]
    assert (ranks[0].returncode, ranks[1].wait(120)) == (2, -signal.SIGKILL), said
    lines = [line for line in said.splitlines() if line.startswith('kd-det')]
    assert len(lines) == 1 and lines[0].startswith('kd-det: error: rank 1 is gone') and 'Traceback' not in said


# ---------------------------------------------------------------- what is left when the parent is killed


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = """
import sys, time
sys.platform = {platform!r}
from kd_det.compat.process import end_with_parent
end_with_parent({watch_input})
print('ready', flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='there is no SIGKILL')
@pytest.mark.parametrize('child', [
    ['-c', CHILD.format(platform='linux', watch_input=False)],
    ['-c', CHILD.format(platform='linux', watch_input=True)],
    ['-c', CHILD.format(platform='other', watch_input=False)],  # where the system does not see to it
    ['-c', CHILD.format(platform='other', watch_input=True)],
    ['-m', 'kd_det.study.worker', 'config.py', 'identity'],  # as soon as it is started: it imports for ever
], ids=['by Linux', 'by Linux, of a pipe', 'by its number', 'by a pipe', 'worker'])
def test_who_is_left_behind_ends(child, run_command):
    parent = run_command(*child, program=('-c', PARENT))
    left = int(parent.stdout.readline())
    os.kill(left, 0)  # it is there
    parent.kill()
    parent.wait(20)
    assert has_ended(left)


def test_a_rank_ends_with_its_torchrun(here, monkeypatch):
    watched = []
    monkeypatch.setattr(entry, 'end_with_parent', lambda: watched.append(True))
    monkeypatch.setattr('kd_det.cli.methods.run', lambda options: 0)
    assert main(['methods']) == 0 and not watched  # others may outlive who started them, as with nohup
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert main(['methods']) == 0 and watched


def has_ended(number: int) -> bool:
    """Whether a process ends within seconds; one that nobody has waited for is over, too."""
    for _ in range(200):
        try:
            state = Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == 'Z':
            return True
        time.sleep(0.05)
    os.kill(number, signal.SIGKILL)
    return False
