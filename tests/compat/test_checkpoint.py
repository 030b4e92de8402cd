import builtins
import functools
import gzip
import http.server
import itertools
import os
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner

from kd_det.compat import (
    CheckpointError,
    UnsafeCheckpointError,
    describe_not_finite,
    install_safe_loading,
    load_checkpoint,
)
from kd_det.compat.checkpoint import CAN_ALLOW_GLOBALS

needs_safe_globals = pytest.mark.skipif(not CAN_ALLOW_GLOBALS, reason='torch < 2.4 has no list of safe globals')


run_number = itertools.count()  # mmengine shares the history of runs of one name


class Regression(BaseModel):

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def forward(self, point, mode='loss'):
        return dict(loss=self.layers(torch.stack(point)).square().mean())


class Points(torch.utils.data.Dataset):
    metainfo = ConfigDict(classes=('a', 'b'), palette=np.array([[0, 1, 2]]), source=dict(year=2026))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(point=torch.tensor([index / 8, 1 - index / 4]))


def runner(work_dir, epochs, resume_from=None, optim_wrapper='OptimWrapper'):
    """mmengine's Runner with all that adds to a checkpoint: averaged weights, schedulers, momentum, history."""
    torch.manual_seed(0)
    return Runner(
        model=Regression(),
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=Points(), batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type=optim_wrapper, optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=2, by_epoch=False),
            dict(type='MultiStepLR', milestones=[2]),
            dict(type='OneCycleLR', eta_max=0.1, total_steps=50, by_epoch=False),
            dict(type='CosineAnnealingLR', T_max=4),
        ],
        custom_hooks=[dict(type='EMAHook')],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        load_from=resume_from and str(resume_from),
        resume=resume_from is not None,
        experiment_name=f'run_{next(run_number)}')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A checkpoint that mmengine wrote after one epoch."""
    work_dir = tmp_path_factory.mktemp('saved')
    runner(work_dir, epochs=1).train()
    return work_dir / 'epoch_1.pth'


@needs_safe_globals
def test_checkpoint_of_mmengine_loads(saved):
    checkpoint = load_checkpoint(saved)
    assert {'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub'} <= set(checkpoint)
    trusted = torch.load(saved, weights_only=False)  # our own file
    history, expected = (file['message_hub']['log_scalars']['train/loss'] for file in (checkpoint, trusted))
    assert isinstance(history, HistoryBuffer) and len(history.data[0]) == 2
    for statistic in ('min', 'max', 'mean', 'current'):
        assert history.statistics(statistic) == expected.statistics(statistic)
    meta = checkpoint['meta']['dataset_meta']
    assert meta.classes == ('a', 'b') and meta.source.year == 2026 and np.array_equal(meta.palette, [[0, 1, 2]])


@pytest.mark.parametrize('optim_wrapper', [
    'OptimWrapper',
    pytest.param('AmpOptimWrapper',
                 marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='mmengine wants a GPU for it')),
])
def test_resume_continues_as_if_never_stopped(tmp_path, optim_wrapper):
    straight = runner(tmp_path / 'straight', 3, optim_wrapper=optim_wrapper)
    straight.train()
    resumed = runner(tmp_path / 'resumed', 3, resume_from=tmp_path / 'straight' / 'epoch_2.pth',
                     optim_wrapper=optim_wrapper)
    resumed.train()
    assert resumed.iter == straight.iter == 6
    for key, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    losses = [run.message_hub.get_scalar('train/loss').data[0] for run in (straight, resumed)]
    assert np.array_equal(*losses), 'the history of before the stop is part of it'


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class OwnClass:
    pass


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('code, refused', [
    (lambda marker: Call(os.system, f'touch {marker}'), 'system'),
    (lambda marker: Call(eval, f'open({str(marker)!r}, "w")'), 'eval'),
    (lambda marker: Call(getattr, HistoryBuffer, '__init__'), 'getattr|HistoryBuffer'),
    (lambda marker: Call(getattr, 'mean', '__class__'), 'getattr'),
    (lambda marker: Call(builtins.__import__, 'antigravity'), '__import__'),
    (lambda marker: OwnClass(), 'OwnClass'),
    (lambda marker: torch.nn.Linear(1, 1), 'torch.nn.modules.linear.Linear'),
])
def test_code_is_refused_and_not_run(tmp_path, code, refused, zipped):
    file, marker = tmp_path / 'foreign.pth', tmp_path / 'was_run'
    torch.save(dict(state_dict={}, extra=code(marker)), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match=f'foreign.pth was refused.*({refused}).*state_dict alone'):
        load_checkpoint(file)
    assert not marker.exists()


@needs_safe_globals
def test_mmengine_refuses_as_we_do(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # must not open a back door
    file, marker = tmp_path / 'foreign.pth', tmp_path / 'was_run'
    torch.save(Call(os.system, f'touch {marker}'), file)
    with pytest.raises(UnsafeCheckpointError, match='foreign.pth.*system'):
        CheckpointLoader.load_checkpoint(str(file))
    assert not marker.exists()
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1' and 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


def test_unusable_files_say_so(tmp_path):
    file = tmp_path / 'broken.pth'

    def assert_refused(reason):
        with pytest.raises(CheckpointError, match=f'broken.pth.*{reason}') as caught:
            load_checkpoint(file)
        assert not isinstance(caught.value, UnsafeCheckpointError)
        assert 'weights_only' not in str(caught.value), 'no advice to load it unsafely'

    file.write_bytes(b'')
    assert_refused('empty')
    file.write_text('<html>404 Not Found</html>')
    assert_refused('something else')
    torch.save([1, 2], file)
    assert_refused('holds a list')
    for zipped in (True, False):
        torch.save(dict(state_dict=dict(weight=torch.zeros(4096))), file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        for length in (20, len(whole) // 2, len(whole) - 100):
            file.write_bytes(whole[:length])
            assert_refused('damaged')


def _torch_script(file):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))


def _safetensors(file):
    header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))


def _zip(file):
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('run/epoch_12.pth', 'weights')


def _tar(file):
    with tarfile.open(file, 'w') as archive:
        archive.add(__file__, 'epoch_12.pth')


@pytest.mark.parametrize('write, kind', [
    (lambda file: file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'),
     'a Git LFS pointer. Run `git lfs pull`'),
    (lambda file: file.write_text('\n<!DOCTYPE html>\n<html><body>Sign in</body></html>'), 'a web page'),
    (_torch_script, 'a TorchScript archive'),
    (_safetensors, r"safetensors. Convert it once.*load_file\('teacher.pth'\)"),
    (lambda file: file.write_bytes(b'\x08\x07\x12\x07pytorch\x1a\x052.0.0:\x00'), 'an ONNX model'),
    (_zip, 'a zip archive of run/epoch_12.pth. Unpack it'),
    (_tar, 'an archive. Unpack it'),
    (lambda file: file.write_bytes(gzip.compress(b'weights')), 'an archive. Unpack it'),
    (lambda file: file.write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(9)), 'HDF5'),
    (lambda file: file.write_bytes(pickle.dumps(dict(model=dict(weight=[1.0])))), 'a pickle that torch.save did not'),
    (lambda file: file.write_bytes(b'\x93NUMPY\x01\x00' + bytes(9)), 'a NumPy array'),
    (lambda file: file.write_text("_base_ = './faster_rcnn.py'\nmodel = dict()\n"), 'text that begins with "_base_'),
])
@pytest.mark.parametrize('load', [load_checkpoint, pytest.param(
    lambda file: CheckpointLoader.load_checkpoint(str(file)), marks=needs_safe_globals)])
def test_files_of_another_kind_are_called_what_they_are(tmp_path, load, write, kind):
    file = tmp_path / 'teacher.pth'
    write(file)
    with pytest.raises(CheckpointError, match=f'teacher.pth cannot be read.*it holds something else, {kind}') as error:
        load(file)
    assert 'weights_only' not in f'{error.value} {error.value.__cause__}', 'no advice to load it unsafely'


@pytest.mark.parametrize('name', ['torchvision://resnet0', 'open-mmlab://resnet0'])
def test_a_name_that_mmengine_does_not_know_is_no_damaged_file(name):
    with pytest.raises(CheckpointError, match=f"^{name}: mmengine knows no weights of that name"):
        load_checkpoint(name)


@needs_safe_globals
@pytest.mark.parametrize('scheme', ['kept://', 'local://'])
def test_other_loaders_of_mmengine_pass_on_no_advice_of_torchs(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    torch.save(Call(os.system, f'touch {tmp_path / "was_run"}'), tmp_path / 'x.pth')

    @CheckpointLoader.register_scheme(prefixes=scheme)
    def load_from_kept(name, map_location):
        return torch.load(tmp_path / name[len(scheme):], map_location=map_location)

    install_safe_loading()
    install_safe_loading()
    with pytest.raises(UnsafeCheckpointError, match='was refused') as error:
        CheckpointLoader.load_checkpoint(f'{scheme}x.pth')
    assert 'weights_only' not in str(error.value) and not (tmp_path / 'was_run').exists()


@pytest.mark.parametrize('content, meta', [
    (dict(meta=None), {}),
    (dict(meta=[1]), {}),
    (dict(meta=dict(epoch=3)), dict(epoch=3)),
    (dict(meta=dict(dataset_meta=None)), dict(dataset_meta={})),
    (dict(meta=dict(dataset_meta=dict(classes=('a', 'b'), palette=[1]))),
     dict(dataset_meta=dict(classes=('a', 'b'), palette=[1]))),
    (dict(meta=dict(dataset_meta=[dict(classes=('a', ), palette=[1]), dict(classes=['a'], palette=[2])])),
     dict(dataset_meta=dict(classes=('a', ), palette=[1]))),
    (dict(meta=dict(dataset_meta=[dict(classes=('a', )), dict(classes=('b', ))])), dict(dataset_meta={})),
    (dict(meta=dict(CLASSES=['a', 'b'])), dict(CLASSES=['a', 'b'], dataset_meta=dict(classes=('a', 'b')))),
    (dict(meta=dict(dataset_meta=dict(CLASSES=('a', )))), dict(dataset_meta=dict(CLASSES=('a', ), classes=('a', )))),
    (dict(classes=['a', 'b']), dict(dataset_meta=dict(classes=('a', 'b')))),
    (dict(meta=None, names={0: 'a', 1: 'b'}), dict(dataset_meta=dict(classes=('a', 'b')))),
])
def test_meta_is_a_dict_and_names_classes_in_one_place(tmp_path, content, meta):
    torch.save(dict(content, state_dict={}), tmp_path / 'x.pth')
    assert load_checkpoint(tmp_path / 'x.pth')['meta'] == meta


def test_a_state_dict_alone_gets_no_meta(tmp_path):
    torch.save(dict(weight=torch.ones(1)), tmp_path / 'x.pth')
    assert set(load_checkpoint(tmp_path / 'x.pth')) == {'weight'}


def test_a_folder_names_the_checkpoints_within(tmp_path):
    torch.save({}, tmp_path / 'epoch_12.pth')
    with pytest.raises(FileNotFoundError, match='is a folder.*epoch_12.pth'):
        load_checkpoint(tmp_path)


def test_missing_file_is_named(tmp_path):
    for missing in (tmp_path / 'teacher.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match=str(missing)):
            load_checkpoint(missing)


@pytest.fixture
def served_folder(tmp_path, monkeypatch):
    """A folder and the address under which HTTP serves it."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'downloads'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_url(served_folder):
    folder, address = served_folder
    torch.save(dict(state_dict=dict(weight=torch.ones(3))), folder / 'good.pth')
    assert torch.equal(load_checkpoint(f'{address}/good.pth')['state_dict']['weight'], torch.ones(3))

    torch.save(dict(extra=Call(os.system, f'touch {folder / "was_run"}')), folder / 'foreign.pth')
    with pytest.raises(UnsafeCheckpointError, match='foreign.pth.*system'):
        load_checkpoint(f'{address}/foreign.pth')
    assert not (folder / 'was_run').exists()

    (folder / 'pointer.pth').write_text('version https://git-lfs.github.com/spec/v1\n')
    with pytest.raises(CheckpointError, match='pointer.pth.*a Git LFS pointer'):
        load_checkpoint(f'{address}/pointer.pth')

    with pytest.raises(CheckpointError, match='absent.pth cannot be downloaded.*404'):
        load_checkpoint(f'{address}/absent.pth')


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('key, value, parameters, found', [
    ('neck.weight', [1.0, NAN, NAN], None, '1 of 2 tensors, first neck.weight (2 of 3 numbers are nan)'),
    ('neck.weight', [-INF, 0.0], None, '1 of 2 tensors, first neck.weight (1 of 2 numbers is infinite)'),
    ('neck.weight', [INF, -INF], ['neck.weight'], '1 of 2 tensors, first neck.weight (2 of 2 numbers are infinite)'),
    ('attn_mask', [0.0, -INF], ['neck.weight'], None),  # a buffer, as masks of attention are
    ('attn_mask', [NAN, -INF], ['neck.weight'], '1 of 2 tensors, first attn_mask (1 of 2 numbers is nan)'),
    ('bn.running_mean', [INF], [], '1 of 2 tensors, first bn.running_mean (1 of 1 numbers is infinite)'),
    ('large', [3e38, 3e38], None, None),  # whose sum overflows
    ('none', [], None, None)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_not_finite_is_described(key, value, parameters, found, dtype):
    state = {key: torch.tensor(value, dtype=dtype), 'bn.num_batches_tracked': torch.tensor(3),
             'half': torch.ones(70_000, dtype=torch.float16)}
    assert describe_not_finite(state, parameters) == found
