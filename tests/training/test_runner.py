"""The checkpoint that is tested or resumed."""
import re

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.checks.checkpoints import inspect_start_weights
from kd_det.compat import CheckpointError
from kd_det.compat.checkpoint import NotFiniteError
from kd_det.training.runner import check_start


@pytest.fixture
def runner_of(one_stage, make_runner, tmp_path):
    """Makes the runner of a GFL that is to load its own weights, without some of them."""

    def make(*lacking: str):
        config, checkpoint = one_stage('gfl'), str(tmp_path / 'student.pth')
        state = MODELS.build(config).state_dict()
        assert all(any(key.endswith(name) for key in state) for name in lacking)
        torch.save(dict(state_dict={key: value for key, value in state.items() if not key.endswith(lacking)}),
                   checkpoint)
        return make_runner(config, load_from=checkpoint)

    return make


def test_a_buffer_that_the_model_sets_itself_may_be_missing_and_is_named(runner_of, capsys):
    runner = runner_of('integral.project', 'num_batches_tracked')
    check_start(runner)
    runner.load_or_resume()
    assert 'missing keys in source state_dict: bbox_head.integral.project\n' in capsys.readouterr().out
    assert torch.equal(runner.model.bbox_head.integral.project, torch.linspace(0, 4, 5))


@pytest.mark.parametrize('key', ['running_mean', 'gfl_cls.bias'])
def test_what_was_learnt_may_not_be_missing(key, runner_of):
    with pytest.raises(CheckpointError, match=rf'does not fit the student SingleStageDetector.*\n.*missing.*{key}'):
        check_start(runner_of(key))


def _wrap(state, prefix):
    return {f'{prefix}{key}': value for key, value in state.items()}


STATES = {
    'torch.compile': lambda state: dict(state_dict=_wrap(state, '_orig_mod.')),
    'another entry': lambda state: dict(ema=None, model=state),
    'an average': lambda state: dict(ema_state_dict=dict(_wrap(state, 'module.'), steps=torch.tensor(3))),
}


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('kind', STATES)
def test_weights_that_mmengine_would_not_find_are_loaded(kind, whole, retinanet, make_runner, tmp_path):
    config, checkpoint = retinanet(), str(tmp_path / 'student.pth')
    state = MODELS.build(config).state_dict()
    torch.save(STATES[kind](state), checkpoint)
    runner = make_runner(config, load_from=checkpoint)
    check_start(runner, whole)
    runner.model.init_weights()  # as a training does before it loads
    runner.load_or_resume()
    assert all(torch.equal(value, state[key]) for key, value in runner.model.state_dict().items())


@pytest.mark.parametrize(('prefix', 'said'), [
    ('architecture.', "after 'architecture.'"),
    ('body.layer1.', "All keys of the file begin with 'body.'"),
])
def test_a_training_starts_from_no_file_of_which_nothing_fits(prefix, said, retinanet, make_runner, tmp_path):
    config, checkpoint = retinanet(), str(tmp_path / 'other.pth')
    state = MODELS.build(config).state_dict() if prefix == 'architecture.' else dict(weight=torch.zeros(2, 2))
    torch.save(dict(state_dict=_wrap(state, prefix)), checkpoint)
    runner = make_runner(config, load_from=checkpoint)
    with pytest.raises(CheckpointError, match=r'load_from: .* no weight of the student.*' + said):
        check_start(runner, whole=False)
    finding, = inspect_start_weights(runner.cfg)
    assert finding.fault and said in finding.found


def test_a_training_starts_from_part_of_another_detector(retinanet, make_runner, tmp_path):
    config, checkpoint = retinanet(), str(tmp_path / 'other.pth')
    state = {key: value + 1 for key, value in MODELS.build(config).state_dict().items() if key.startswith('backbone.')}
    torch.save(dict(state_dict=dict(state, other=torch.zeros(2))), checkpoint)
    runner = make_runner(config, load_from=checkpoint)
    check_start(runner, whole=False)
    runner.load_or_resume()
    assert all(torch.equal(runner.model.state_dict()[key], value) for key, value in state.items())
    assert not list(inspect_start_weights(runner.cfg))


def test_what_can_not_be_resumed_is_told(retinanet, make_runner, tmp_path):
    config, checkpoint = retinanet(), str(tmp_path / 'student.pth')
    torch.save(dict(state_dict=MODELS.build(config).state_dict(), meta=None, message_hub={}), checkpoint)
    runner = make_runner(config, load_from=checkpoint, resume=True)
    with pytest.raises(CheckpointError, match=r"can not be resumed: .* but lacks meta\['epoch'\], meta\['iter'\],"):
        check_start(runner)
    finding, = inspect_start_weights(runner.cfg)
    assert finding.fault and 'can not be resumed' in finding.found


@pytest.mark.parametrize('whole', [True, False])
def test_weights_that_are_not_finite_are_refused(whole, retinanet, make_runner, tmp_path):
    """Tested, resumed or started from; by the doctor too."""
    config, checkpoint = retinanet(), str(tmp_path / 'student.pth')
    state = MODELS.build(config).state_dict()
    state['neck.fpn_convs.1.conv.bias'][0] = float('inf')
    torch.save(dict(state_dict=state), checkpoint)
    runner = make_runner(config, load_from=checkpoint)
    said = (r"student.pth' of the student holds weights that are not finite: 1 of \d+ tensors, first "
            r'neck.fpn_convs.1.conv.bias \(1 of 8 numbers is infinite\)')
    with pytest.raises(NotFiniteError, match=said):
        check_start(runner, whole)
    finding, = inspect_start_weights(runner.cfg)
    assert finding.fault and re.search(said, finding.found)


@pytest.mark.parametrize('entry, path', [
    (dict(ema_state_dict={'module.neck.bias': torch.tensor([float('nan')])}), 'ema_state_dict.module.neck.bias'),
    (dict(distill=dict(terms={'fgd.weight': torch.tensor([float('nan')])}, weights={})), 'distill.terms.fgd.weight'),
    (dict(distill=dict(terms={}, weights=dict(pkd=dict(averages=torch.tensor([float('nan')]))))),
     'distill.weights.pkd.averages'),
    (dict(optimizer=dict(state={3: dict(exp_avg=torch.tensor([float('nan')]))}, param_groups=[])),
     'optimizer.state.3.exp_avg')])
def test_a_training_is_not_resumed_from_what_is_not_finite(entry, path, retinanet, make_runner, tmp_path):
    config, checkpoint = retinanet(), str(tmp_path / 'student.pth')
    torch.save(dict(state_dict=MODELS.build(config).state_dict(), meta=dict(epoch=1, iter=2), message_hub={}, **entry),
               checkpoint)
    check_start(make_runner(config, name='tested', load_from=checkpoint))  # which reads none of it
    with pytest.raises(NotFiniteError, match=f'not finite: 1 of 1 tensors, first {path} '):
        check_start(make_runner(config, load_from=checkpoint, resume=True))
