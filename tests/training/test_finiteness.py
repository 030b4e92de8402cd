"""Trainings whose numbers are no more: they end at once, in one line that says what, where, when and what to do."""
import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import RUNNERS

import kd_det
from kd_det.config import ConfigurationError
from kd_det.distillers.schedules import Schedule
from kd_det.losses import DistillTerm
from kd_det.study.runs import train as train_job
from kd_det.training.finiteness import FiniteHook, add_finite_hook, explain_divergence
from kd_det.training.runner import build_runner

NAN, INF = float('nan'), float('inf')


@MODELS.register_module(force=True)
class Faulty(DistillTerm):
    """A user's own term: from an iteration on, for so many, one of its parts is of this value."""
    student_taps = teacher_taps = ('neck', )

    def __init__(self, start: int = 0, steps: int = 10**6, value: float = NAN, way: str = 'value') -> None:
        super().__init__()
        self.faulty, self.value, self.way = range(start, start + steps), value, way

    def forward(self, context):
        student, teacher = (each['neck'][0].mean() for each in (context.student, context.teachers[0]))
        now = context.progress.iteration in self.faulty
        if now and self.way == 'root':  # of 0: finite, unlike its derivative
            return dict(fine=(student - teacher).square(), broken=(student * 0).sqrt())
        if now and self.way == 'error':
            raise RuntimeError('matrix contains invalid numeric entries')
        return dict(fine=(student - teacher).square(), broken=student * (self.value if now else 0.0))


@TASK_UTILS.register_module(force=True)
class FaultySchedule(Schedule):

    def __init__(self, value=1.0, iteration=2) -> None:
        super().__init__(value)
        self.iteration = iteration

    def __call__(self, progress):
        return NAN if progress.iteration == self.iteration else 1.0

    @property
    def is_constant(self) -> bool:
        return False


class Spoil(Hook):
    """Writes into a module at an iteration."""
    priority = 'VERY_HIGH'

    def __init__(self, find, iteration: int = 2, value: float = NAN) -> None:
        self.find, self.iteration, self.value = find, iteration, value

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.iteration:
            with torch.no_grad():
                tensor = self.find(runner)
                tensor[(0, ) * tensor.dim()] = self.value


@pytest.fixture
def distilled(retinanet):

    def make(**terms) -> dict:
        return dict(type='DetectionDistiller', student=retinanet(), teacher=dict(config=retinanet(neck=12),
                                                                                 random_teacher=True), distill=terms)

    return make


@pytest.fixture
def make_run(make_runner):
    """Makes the runner of a training of one image a step, eight steps an epoch."""
    return partial(make_runner, **{'train_dataloader.batch_size': 1})


def message_of(runner, *hooks) -> str:
    for hook in hooks:
        runner.register_hook(hook)
    with pytest.raises(ConfigurationError) as error:
        runner.train()
    text = str(error.value)
    assert '\n' not in text
    return text


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize('value, iteration', [(NAN, 0), (INF, 9)])
def test_a_term_of_ones_own_ends_the_run_in_its_step(value, iteration, distilled, make_run):
    runner = make_run(distilled(fgd=dict(type='FGD', weight=1e-3), mine=dict(type='Faulty', start=iteration,
                                                                                value=value)))
    text = message_of(runner)
    sign = '-' if f'-{value}' in text else ''
    assert text.startswith(f"model.distill.mine (part 'broken' {sign}{value}) is not finite in iteration "
                           f'{iteration + 1} (epoch {iteration // 8 + 1}), though the features')
    assert 'the term alone' in text
    assert 'kd-det inspect CONFIG' in text and 'fgd' not in text and 'fine' not in text
    assert runner.iter == iteration
    checkpoints = sorted(each.name for each in Path(runner.work_dir).glob('epoch*'))
    assert checkpoints == [f'epoch_{epoch}.pth' for epoch in range(1, iteration // 8 + 1)]


def test_the_students_own_losses(retinanet, make_run):
    """Too large a learning rate, of a plain detector."""
    runner = make_run(retinanet(), epochs=4, optimizer=dict(type='SGD', lr=1e4))
    text = message_of(runner)
    assert "The student's own loss_" in text and 'is not finite in iteration' in text
    assert 'lower optim_wrapper.optimizer.lr (now' in text and 'model.distill' not in text


def test_a_box_of_the_data_is_named(detr, make_run):
    """Which the matcher of a DETR refuses."""
    runner = make_run(detr('DETR', embed=16, layers=1))

    class SpoilBoxes(Hook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            sample = data_batch['data_samples'][0]
            sample.gt_instances.bboxes.tensor[:] = NAN
            self.path = sample.img_path

    hook = SpoilBoxes()
    runner.register_hook(hook)
    with pytest.raises(ConfigurationError) as error, explain_divergence(runner):
        runner.train()
    assert str(error.value).startswith(f"A box of the image '{hook.path}' is not finite: correct it. (ValueError: ")


def test_images_that_the_preprocessor_spoils(retinanet, make_run):
    model = retinanet()
    model.data_preprocessor = dict(model.data_preprocessor, std=[0.0, 57.0, 57.0])
    assert 'look at mean and std of the data_preprocessor' in message_of(make_run(model))


# ---------------------------------------------------------------- features


def test_a_teachers_feature_ends_the_run_and_names_tap_and_level(distilled, make_run):
    runner = make_run(distilled(fgd=dict(type='FGD')), epochs=4)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.neck.lateral_convs[0].conv.weight))
    assert text.startswith("The teacher's feature at 'neck' (level 0) is not finite in iteration 3 (epoch 1), and so "
                           "is model.distill.fgd (part '")
    assert 'kd-det test TEACHER_CONFIG CHECKPOINT' in text


def test_a_teachers_feature_that_reaches_no_loss(distilled, make_run):
    """Within a few steps, with the step that it was: nobody waits for the device in each."""

    @MODELS.register_module(force=True)
    class Blind(Faulty):

        def forward(self, context):
            return dict(some=context.student['neck'][1].square().mean())

    model = distilled(mine=dict(type='Blind'))
    model['teacher'] = [model['teacher'], dict(model['teacher'])]
    runner = make_run(model, epochs=2)
    text = message_of(runner, FiniteHook(interval=4),
                      Spoil(lambda runner: runner.model.teachers[0].model.backbone.conv1.weight))
    assert "The teacher[0]'s feature at 'neck' (level 0, 1, 2" in text and 'in iteration 3 (epoch 1).' in text
    assert runner.iter == 3


def test_the_logits_of_a_teachers_head(distilled, make_run):
    runner = make_run(distilled(classes=dict(type='DenseClassification', head='bbox_head')), epochs=3)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.bbox_head.retina_cls.bias))
    assert "The teacher's logits of 'bbox_head' (level 0, 1, 2, 3, 4) is not finite in iteration 3" in text


def test_a_teacher_of_pseudo_labels(distilled, make_run):
    """Its boxes would only fail to come."""
    model = dict(distilled(), pseudo_labels=dict(score=0.3))
    runner = make_run(model, epochs=6)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.backbone.conv1.weight))
    assert "The teacher's feature for pseudo-labels (level 0, 1, 2, 3, 4) is not finite in iteration 3" in text


def test_the_students_feature_is_told_apart(distilled, make_run):
    runner = make_run(distilled(fgd=dict(type='FGD')), epochs=3)
    text = message_of(runner, Spoil(lambda runner: runner.model.student.neck.lateral_convs[0].conv.weight))
    assert text.startswith('model.distill.fgd (') and "the student's own loss_cls, loss_bbox is not finite" in text
    assert "and so is the student's feature at 'neck' (level 0)" in text and "teacher" not in text
    assert 'The training diverges' in text


def test_features_of_the_cache(distilled, make_run, tmp_path):
    model = distilled(fgd=dict(type='FGD'))
    model['teacher'].update(cache=dict(dir=str(tmp_path / 'cache')))

    class SpoilCache(Hook):

        def before_train(self, runner):
            store = runner.model.teacher.cache.store
            store.get = lambda key, get=store.get: (lambda entry: entry and {
                name: array * NAN for name, array in entry.items()})(get(key))

    runner = make_run(model, epochs=6, **{'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]})
    runner.train_dataloader  # noqa: B018
    text = message_of(runner, SpoilCache())
    assert "The teacher's feature at 'neck'" in text and f"Empty model.teacher.cache.dir='{tmp_path / 'cache'}'" in text


# ---------------------------------------------------------------- weights


def test_a_gradient_that_is_not_finite_of_a_loss_that_is(distilled, make_run):
    """Where MMEngine logs the gradient's norm in the same step; else in the next, in which nothing is finite."""
    terms = dict(mine=dict(type='Faulty', start=1, way='root'), fgd=dict(type='FGD'))
    text = message_of(make_run(distilled(**terms), **{'optim_wrapper.clip_grad': dict(max_norm=35)}))
    assert text.startswith("The student's weights are not finite after iteration 2 (epoch 1): ")
    assert 'The gradient of a loss was not, though the losses before were.' in text
    last = message_of(make_run(distilled(**terms), name='next'))
    assert "the student's own loss_cls, loss_bbox is not finite in iteration 3 (epoch 1)" in last
    assert "and so is the student's feature at 'neck' (level 0" in last
    assert 'A gradient of the step before was not finite' in last
    for each in (text, last):
        assert 'tensors, first backbone.conv1.weight (' in each and 'numbers are nan)' in each
        assert 'Terms at work: model.distill.mine, model.distill.fgd.' in each


@pytest.mark.parametrize('by_epoch', [True, False])
def test_no_checkpoint_of_such_weights_is_saved(by_epoch, retinanet, make_run):
    """Neither at the end of an epoch nor between, nor of an average."""
    runner = make_run(retinanet(), epochs=1, **{'train_dataloader.batch_size': 4, 'default_hooks.checkpoint': dict(
        type='CheckpointHook', interval=1, by_epoch=by_epoch)})

    class SpoilAfter(Spoil):

        def after_train_iter(self, runner, *others, **named):
            runner.model.backbone.bn1.running_var[0] = NAN

    text = message_of(runner, SpoilAfter(None, iteration=-1))
    assert f"The student's statistics are not finite after iteration {2 if by_epoch else 1} (epoch 1): " in text
    assert 'first backbone.bn1.running_var (1 of 4 numbers is nan)' in text
    assert not list(Path(runner.work_dir).glob('*.pth'))


def test_an_average_of_the_weights(retinanet, make_run):
    runner = make_run(retinanet(), epochs=1, **{'train_dataloader.batch_size': 8}, custom_hooks=[dict(type='EMAHook')])

    class SpoilAverage(Hook):

        def after_train_iter(self, runner, *others, **named):
            average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model
            next(average.module.parameters()).data.fill_(NAN)

    assert "no checkpoint of them is saved: 1 of " in message_of(runner, SpoilAverage())
    assert not list(Path(runner.work_dir).glob('*.pth'))


def test_weights_before_the_first_step(retinanet, make_run, tmp_path):
    """As mmdet's own tools would start from them."""
    state = MODELS.build(retinanet()).state_dict()
    state['neck.fpn_convs.0.conv.bias'][3] = INF
    torch.save(dict(state_dict=state), tmp_path / 'student.pth')
    text = message_of(make_run(retinanet(), load_from=str(tmp_path / 'student.pth')))
    assert 'before the first step: 1 of ' in text
    assert 'neck.fpn_convs.0.conv.bias (1 of 8 numbers is infinite)' in text and 'load_from' in text


def test_what_raises_in_a_step_is_explained_by_its_numbers(distilled, make_run):
    """Matchers and samplers refuse NaN: that is no traceback."""
    runner = make_run(distilled(mine=dict(type='Faulty', start=3, way='error')), epochs=3)
    runner.register_hook(Spoil(lambda runner: runner.model.student.neck.lateral_convs[0].conv.weight, iteration=3))
    with pytest.raises(ConfigurationError) as error, explain_divergence(runner):
        runner.train()
    assert "The student's weights are not finite after iteration 3 (epoch 1)" in str(error.value)
    assert 'RuntimeError: matrix contains invalid numeric entries' in str(error.value)
    runner = make_run(distilled(mine=dict(type='Faulty', start=1, way='error')), name='sound')
    with pytest.raises(RuntimeError, match='matrix contains'), explain_divergence(runner):
        runner.train()


# ---------------------------------------------------------------- schedules


def test_a_schedule(distilled, make_run):
    runner = make_run(distilled(fgd=dict(type='FGD', weight=dict(type='FaultySchedule'))))
    assert message_of(runner) == ('model.distill.fgd.weight: expected a finite number in every step, got nan in '
                                  'iteration 3 (epoch 1). Correct its schedule.')
    runner = make_run(dict(distilled(fgd=dict(type='FGD')), task_weight=dict(type='FaultySchedule', iteration=1)),
                         name='task')
    assert message_of(runner).startswith('model.task_weight: expected a finite number')


def test_a_balance_that_was_spoilt(distilled, make_run):
    runner = make_run(distilled(fgd=dict(type='FGD', weight=dict(type='Balance'))), epochs=4)
    text = message_of(runner, Spoil(lambda runner: runner.model.monitor.balances['fgd'].means.averages, iteration=4))
    assert 'model.distill.fgd (its weight is nan) is not finite in iteration 5' in text


# ---------------------------------------------------------------- mixed precision


@pytest.fixture
def amp(monkeypatch):
    """MMEngine's wrapper with a GradScaler, on the CPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    return {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}


def test_what_a_scaler_skips_and_recovers_from_is_no_fault(amp, distilled, make_run):
    runner = make_run(distilled(mine=dict(type='Faulty', start=1, steps=6)), epochs=1, **amp)
    runner.train()
    assert runner.iter == 8 and runner.optim_wrapper.loss_scaler.get_scale() <= 2.0**(16 - 6)


def test_a_loss_that_stays_so_ends_the_run_under_a_scaler(amp, distilled, make_run):
    runner = make_run(distilled(mine=dict(type='Faulty', start=3)), epochs=30, **amp)
    text = message_of(runner)
    assert text.startswith("model.distill.mine (part 'broken' nan) is not finite in iteration 4 (epoch 1)")
    assert 'The loss has not been finite for 10 steps since, which the GradScaler has skipped.' in text
    assert runner.iter == 12


def test_without_patience_the_first_step_that_is_skipped_ends_the_run(amp, distilled, make_run):
    runner = make_run(distilled(mine=dict(type='Faulty', start=3)), epochs=1, **amp,
                      custom_hooks=[dict(type='FiniteHook', patience=0)], **{'optim_wrapper.loss_scale': 512.0})
    assert 'is not finite in iteration 4 (epoch 1)' in message_of(runner) and runner.iter == 3


def test_a_scale_that_falls_to_nothing_ends_the_run(amp, distilled, make_run):
    """The loss is finite, its gradient never is."""
    runner = make_run(distilled(mine=dict(type='Faulty', start=1, way='root')), epochs=8,
                      **amp, **{'optim_wrapper.loss_scale': dict(init_scale=1.0)})
    text = message_of(runner)
    assert "The GradScaler's scale has fallen to " in text and 'in iteration 10 (epoch 2)' in text


@pytest.mark.parametrize('clip', [None, dict(max_norm=35)])
def test_steps_that_are_never_made_at_a_fixed_scale_end_the_run(clip, amp, distilled, make_run):
    """The loss is finite, its gradient never is, and the scale does not fall."""
    runner = make_run(distilled(mine=dict(type='Faulty', start=2, way='root')), epochs=8, **amp,
                      **{'optim_wrapper.loss_scale': 512.0, 'optim_wrapper.clip_grad': clip})
    text = message_of(runner)
    assert text.startswith('The optimizer has made none of its last 10 steps, in iteration 12 (epoch 2) and before: '
                           'gradients are not finite at the fixed optim_wrapper.loss_scale of 512.')


def test_a_fused_optimizer_is_called_and_leaves_the_step_out_by_itself(amp, distilled, make_run):
    """On the device, which is asked every ten steps."""
    runner = make_run(distilled(mine=dict(type='Faulty', start=2, way='root')), epochs=8, **amp,
                      optimizer=dict(type='SGD', lr=0.01, fused=True), **{'optim_wrapper.loss_scale': 512.0})
    assert 'none of its last 18 steps, in iteration 20 (epoch 3) and before' in message_of(runner)


def test_what_a_fixed_scale_leaves_out_and_recovers_from_is_no_fault(amp, distilled, make_run):
    """Steps of the optimizer are counted, here every second iteration."""
    runner = make_run(distilled(mine=dict(type='Faulty', start=2, steps=18, way='root')), epochs=4, **amp,
                      **{'optim_wrapper.loss_scale': 512.0, 'optim_wrapper.accumulative_counts': 2})
    runner.train()
    assert runner.iter == 32


def test_a_teachers_feature_under_a_scaler(amp, distilled, make_run):
    """For a step it is skipped; for good it ends the run, though no loss may tell."""
    model = dict(distilled(), pseudo_labels=dict(score=0.3))
    runner = make_run(model, epochs=20, **amp)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.backbone.conv1.weight, iteration=0))
    assert "The teacher's feature for pseudo-labels" in text and 'in iteration 1 (epoch 1)' in text
    assert runner.iter == 9


# ---------------------------------------------------------------- two ranks


def _train_rank(rank: int, config, folder: Path) -> None:
    """Trains as one of two ranks in a forked process, and leaves its error."""
    import torch.distributed as dist
    from mmengine.model import MMDistributedDataParallel
    from mmengine.registry import MODEL_WRAPPERS
    from mmengine.runner import Runner

    class CPURank(MMDistributedDataParallel):

        def __init__(self, module, device_ids):
            super().__init__(module)

    MODEL_WRAPPERS.register_module(module=CPURank, force=True)
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group('gloo', init_method=f'file://{folder}/ranks', rank=rank, world_size=2)
    config.update(launcher='pytorch', model_wrapper_cfg=dict(type='CPURank'))
    try:
        Runner.from_cfg(config).train()
    except Exception as error:
        (folder / f'{rank}.txt').write_text(f'{type(error).__name__}: {error}')
    os._exit(0)  # of the forked process, past pytest


def test_both_ranks_end_with_the_same_words(distilled, run_config, tmp_path):
    """What one has seen alone, in the step in which it was."""

    @MODELS.register_module(force=True)
    class OfOneRank(Faulty):

        def forward(self, context):
            parts = super().forward(context)
            return parts if get_rank() else dict(parts, broken=parts['fine'] * 0)

    config = run_config(distilled(mine=dict(type='OfOneRank', start=2)), epochs=4,
                        **{'train_dataloader.batch_size': 1})
    ranks = [multiprocessing.get_context('fork').Process(target=_train_rank, args=(rank, config, tmp_path))
             for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert not any(rank.is_alive() for rank in ranks)
    first, second = ((tmp_path / f'{rank}.txt').read_text() for rank in range(2))
    assert first == second and first.startswith("ConfigurationError: model.distill.mine (part 'broken' nan) is not "
                                                'finite in iteration 3 (epoch 1)')
    assert not list(Path(config.work_dir).glob('*.pth'))


# ---------------------------------------------------------------- who has the hook


def test_a_run_has_one_hook(retinanet, make_run):
    runner = make_run(retinanet(), epochs=1, **{'train_dataloader.batch_size': 8})
    add_finite_hook(runner)
    runner.train()  # DistillHook adds none
    assert sum(isinstance(hook, FiniteHook) for hook in runner.hooks) == 1


@pytest.mark.parametrize('with_hook', [True, False])
def test_a_flexible_runner_has_it_too(with_hook, distilled, run_config):
    """Which kd_det starts, or whose config lists DistillHook."""
    start = 3 if with_hook else 0  # without it terms do not learn which iteration it is
    config = run_config(distilled(mine=dict(type='Faulty', start=start)), runner_type='FlexibleRunner',
                        strategy=dict(type='SingleDeviceStrategy'), env_cfg=dict(cudnn_benchmark=False),
                        **{'train_dataloader.batch_size': 1})
    if not with_hook:
        del config.default_hooks['distill']
    runner = RUNNERS.build(config) if with_hook else build_runner(config)
    assert f"model.distill.mine (part 'broken' nan) is not finite in iteration {start + 1} (epoch 1)" in message_of(
        runner)
    assert sum(isinstance(hook, FiniteHook) for hook in runner.hooks) == 1


@pytest.mark.parametrize('train', [kd_det.train, lambda config: train_job('plain', config, 'identity')])
def test_a_plain_training_by_kd_det(train, retinanet, run_config):
    """Of a benchmark too: no result is left of it, and the message is the reason of the failed run."""
    config = run_config(retinanet(), val=True, optimizer=dict(type='SGD', lr=1e6))
    del config.default_hooks['distill']
    with pytest.raises(ConfigurationError, match="The student's own .* is not finite in iteration"):
        train(config)
    assert not (Path(config.work_dir) / 'result.json').exists()
