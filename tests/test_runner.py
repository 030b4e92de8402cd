"""The checkpoint that is tested or resumed."""
import pytest
import torch
from mmdet.registry import MODELS

from kd_det.compat import CheckpointError
from kd_det.runner import check_start


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
