"""Trainings whose numbers are no more: they end at once, in one line that says what, where, when and what to do."""
from functools import partial
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.hooks import Hook
from mmengine.optim.optimizer import amp_optimizer_wrapper

import kd_det
from kd_det.config import ConfigurationError
from kd_det.distillers.schedules import Schedule
from kd_det.losses import DistillTerm
from kd_det.training.finiteness import FiniteHook, add_finite_hook, explain_divergence

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
                self.find(runner).view(-1)[0] = self.value


@pytest.fixture
def distilled(retinanet):

    def make(**terms) -> dict:
        return dict(type='DetectionDistiller', student=retinanet(), teacher=dict(config=retinanet(neck=12),
                                                                                 random_teacher=True), distill=terms)

    return make


def message_of(runner, *hooks) -> str:
    for hook in hooks:
        runner.register_hook(hook)
    with pytest.raises(ConfigurationError) as error:
        runner.train()
    text = str(error.value)
    assert '\n' not in text
    return text


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize('value, iteration', [(NAN, 0), (INF, 3)])
def test_a_term_of_ones_own_ends_the_run_in_its_step(value, iteration, distilled, make_runner):
    runner = make_runner(distilled(fgd=dict(type='FGD', weight=1e-3), mine=dict(type='Faulty', start=iteration,
                                                                                value=value)), epochs=3)
    text = message_of(runner)
    assert text.startswith(f"model.distill.mine (part 'broken' {value}) is not finite in iteration {iteration + 1} "
                           f'(epoch {iteration // 2 + 1}), though the features') and 'the term alone' in text
    assert 'kd-det inspect CONFIG' in text and 'fgd' not in text and 'fine' not in text
    assert runner.iter == iteration
    checkpoints = sorted(each.name for each in Path(runner.work_dir).glob('epoch*'))
    assert checkpoints == [f'epoch_{epoch}.pth' for epoch in range(1, iteration // 2 + 1)]


def test_the_students_own_losses(retinanet, make_runner):
    """Too large a learning rate, of a plain detector."""
    runner = make_runner(retinanet(), epochs=20, optimizer=dict(type='SGD', lr=1e4))
    text = message_of(runner)
    assert "The student's own loss_" in text and 'is not finite in iteration' in text
    assert 'lower optim_wrapper.optimizer.lr (now' in text and 'model.distill' not in text


def test_a_box_of_the_data_is_named(retinanet, make_runner):
    runner = make_runner(retinanet())

    class SpoilBoxes(Hook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            for box in data_batch['data_samples'][1].gt_instances.bboxes.tensor:
                box[:] = NAN
            self.path = data_batch['data_samples'][1].img_path

    hook = SpoilBoxes()
    text = message_of(runner, hook)
    assert f"A box of the image '{hook.path}' is not finite" in text


def test_images_that_the_preprocessor_spoils(retinanet, make_runner):
    model = retinanet()
    model.data_preprocessor = dict(model.data_preprocessor, std=[0.0, 57.0, 57.0])
    assert 'look at mean and std of the data_preprocessor' in message_of(make_runner(model))


# ---------------------------------------------------------------- features


def test_a_teachers_feature_ends_the_run_and_names_tap_and_level(distilled, make_runner):
    runner = make_runner(distilled(fgd=dict(type='FGD')), epochs=4)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.neck.lateral_convs[0].conv.weight))
    assert text.startswith("The teacher's feature at 'neck' (level 0) is not finite in iteration 3 (epoch 2), and so is "
                           "model.distill.fgd (part '")
    assert 'kd-det test TEACHER_CONFIG CHECKPOINT' in text


def test_a_teachers_feature_that_reaches_no_loss(distilled, make_runner):
    """Within a few steps, with the step that it was: nobody waits for the device in each."""

    @MODELS.register_module(force=True)
    class Blind(Faulty):

        def forward(self, context):
            return dict(some=context.student['neck'][1].square().mean())

    model = distilled(mine=dict(type='Blind'))
    model['teacher'] = [model['teacher'], dict(model['teacher'])]
    model['distill']['other'] = dict(type='Faulty', teacher=1) if False else dict(type='Blind')
    runner = make_runner(model, epochs=10)
    text = message_of(runner, Spoil(lambda runner: runner.model.teachers[0].model.backbone.conv1.weight))
    assert "The teacher[0]'s feature at 'neck' (level 0, 1, 2" in text and 'in iteration 3 (epoch 2).' in text
    assert runner.iter == 9


def test_the_logits_of_a_teachers_head(distilled, make_runner):
    runner = make_runner(distilled(classes=dict(type='DenseClassification', head='bbox_head')), epochs=3)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.bbox_head.retina_cls.bias))
    assert "The teacher's logits of 'bbox_head' (level 0, 1, 2, 3, 4) is not finite in iteration 3" in text


def test_a_teacher_of_pseudo_labels(distilled, make_runner):
    """Its boxes would only fail to come."""
    model = dict(distilled(), pseudo_labels=dict(score=0.3))
    runner = make_runner(model, epochs=6)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.backbone.conv1.weight))
    assert "The teacher's feature for pseudo-labels (level 0, 1, 2, 3, 4) is not finite in iteration 3" in text


def test_the_students_feature_is_told_apart(distilled, make_runner):
    runner = make_runner(distilled(fgd=dict(type='FGD')), epochs=3)
    text = message_of(runner, Spoil(lambda runner: runner.model.student.neck.lateral_convs[0].conv.weight))
    assert text.startswith('model.distill.fgd (') and "the student's own loss_cls, loss_bbox is not finite" in text
    assert "and so is the student's feature at 'neck' (level 0)" in text and "teacher" not in text
    assert 'The training diverges' in text


def test_features_of_the_cache(distilled, make_runner, tmp_path):
    model = distilled(fgd=dict(type='FGD'))
    model['teacher'].update(cache=dict(dir=str(tmp_path / 'cache')))

    class SpoilCache(Hook):

        def before_train(self, runner):
            store = runner.model.teacher.cache.store
            store.get = lambda key, get=store.get: (lambda entry: entry and {
                name: array * NAN for name, array in entry.items()})(get(key))

    runner = make_runner(model, epochs=6, **{'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]})
    runner.train_dataloader  # noqa: B018
    text = message_of(runner, SpoilCache())
    assert "The teacher's feature at 'neck'" in text and f"Empty model.teacher.cache.dir='{tmp_path / 'cache'}'" in text


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize('clip', [None, dict(max_norm=35)])
def test_a_gradient_that_is_not_finite_of_a_loss_that_is(clip, distilled, make_runner):
    runner = make_runner(distilled(mine=dict(type='Faulty', start=1, way='root'), fgd=dict(type='FGD')), epochs=3,
                         **({'optim_wrapper.clip_grad': clip} if clip else {}))
    text = message_of(runner)
    assert text.startswith("The student's weights are not finite after iteration 2 (epoch 1): ")
    assert 'tensors, first backbone.conv1.weight (' in text and 'numbers are nan)' in text
    assert 'Terms at work: model.distill.mine, model.distill.fgd.' in text
    assert not list(Path(runner.work_dir).glob('*.pth'))


@pytest.mark.parametrize('by_epoch', [True, False])
def test_no_checkpoint_of_such_weights_is_saved(by_epoch, retinanet, make_runner):
    """Neither at the end of an epoch nor between, nor of an average."""
    runner = make_runner(retinanet(), epochs=1, **{'default_hooks.checkpoint': dict(
        type='CheckpointHook', interval=1, by_epoch=by_epoch)})

    class SpoilAfter(Spoil):

        def after_train_iter(self, runner, *others, **named):
            runner.model.backbone.bn1.running_var[0] = NAN

    text = message_of(runner, SpoilAfter(None, iteration=-1))
    assert f"The student's statistics are not finite after iteration {2 if by_epoch else 1} (epoch 1): " in text
    assert 'first backbone.bn1.running_var (1 of 4 numbers is nan)' in text
    assert not list(Path(runner.work_dir).glob('*.pth'))


def test_an_average_of_the_weights(retinanet, make_runner):
    runner = make_runner(retinanet(), epochs=1, custom_hooks=[dict(type='EMAHook')])

    class SpoilAverage(Hook):

        def after_train_iter(self, runner, *others, **named):
            average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model
            next(average.module.parameters()).data.fill_(NAN)

    assert "no checkpoint of them is saved: 1 of " in message_of(runner, SpoilAverage())
    assert not list(Path(runner.work_dir).glob('*.pth'))


def test_weights_before_the_first_step(retinanet, make_runner, tmp_path):
    """As mmdet's own tools would start from them."""
    state = MODELS.build(retinanet()).state_dict()
    state['neck.fpn_convs.0.conv.bias'][3] = INF
    torch.save(dict(state_dict=state), tmp_path / 'student.pth')
    text = message_of(make_runner(retinanet(), load_from=str(tmp_path / 'student.pth')))
    assert 'before the first step: 1 of ' in text
    assert 'neck.fpn_convs.0.conv.bias (1 of 8 numbers is infinite)' in text and 'load_from' in text


def test_what_raises_in_a_step_is_explained_by_its_numbers(distilled, make_runner):
    """Matchers and samplers refuse NaN: that is no traceback."""
    runner = make_runner(distilled(mine=dict(type='Faulty', start=3, way='error')), epochs=3)
    runner.register_hook(Spoil(lambda runner: runner.model.student.neck.lateral_convs[0].conv.weight, iteration=3))
    with pytest.raises(ConfigurationError) as error, explain_divergence(runner):
        runner.train()
    assert "The student's weights are not finite after iteration 3 (epoch 2)" in str(error.value)
    assert 'RuntimeError: matrix contains invalid numeric entries' in str(error.value)
    runner = make_runner(distilled(mine=dict(type='Faulty', start=1, way='error')), name='sound')
    with pytest.raises(RuntimeError, match='matrix contains'), explain_divergence(runner):
        runner.train()


# ---------------------------------------------------------------- schedules


def test_a_schedule(distilled, make_runner):
    runner = make_runner(distilled(fgd=dict(type='FGD', weight=dict(type='FaultySchedule'))))
    assert message_of(runner) == ('model.distill.fgd.weight: expected a finite number in every step, got nan in '
                                  'iteration 3 (epoch 2). Correct its schedule.')
    runner = make_runner(dict(distilled(fgd=dict(type='FGD')), task_weight=dict(type='FaultySchedule', iteration=1)),
                         name='task')
    assert message_of(runner).startswith('model.task_weight: expected a finite number')


def test_a_balance_that_was_spoilt(distilled, make_runner):
    runner = make_runner(distilled(fgd=dict(type='FGD', weight=dict(type='Balance'))), epochs=4)
    text = message_of(runner, Spoil(lambda runner: runner.model.monitor.balances['fgd'].means.averages, iteration=4))
    assert 'model.distill.fgd (its weight is nan) is not finite in iteration 5' in text


# ---------------------------------------------------------------- mixed precision


@pytest.fixture
def amp(monkeypatch):
    """MMEngine's wrapper with a GradScaler, on the CPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    return {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}


def test_what_a_scaler_skips_and_recovers_from_is_no_fault(amp, distilled, make_runner):
    runner = make_runner(distilled(mine=dict(type='Faulty', start=1, steps=8)), epochs=8, **amp)
    runner.train()
    assert runner.iter == 16 and runner.optim_wrapper.loss_scaler.get_scale() == 2.0**(16 - 8)


def test_a_loss_that_stays_so_ends_the_run_under_a_scaler(amp, distilled, make_runner):
    runner = make_runner(distilled(mine=dict(type='Faulty', start=3)), epochs=30, **amp)
    text = message_of(runner)
    assert text.startswith("model.distill.mine (part 'broken' nan) is not finite in iteration 4 (epoch 2)")
    assert 'The loss has not been finite for 10 steps since, which the GradScaler has skipped.' in text
    assert runner.iter == 12


def test_a_scale_that_falls_to_nothing_ends_the_run(amp, distilled, make_runner):
    """The loss is finite, its gradient never is."""
    runner = make_runner(distilled(mine=dict(type='Faulty', start=1, way='root')), epochs=50, **amp)
    text = message_of(runner)
    assert "The GradScaler's scale has fallen to " in text and 'in iteration 30 (epoch 15)' in text


def test_a_teachers_feature_under_a_scaler(amp, distilled, make_runner):
    """For a step it is skipped; for good it ends the run, though no loss may tell."""
    model = dict(distilled(), pseudo_labels=dict(score=0.3))
    runner = make_runner(model, epochs=20, **amp)
    text = message_of(runner, Spoil(lambda runner: runner.model.teacher.model.backbone.conv1.weight, iteration=5))
    assert "The teacher's feature for pseudo-labels" in text and 'in iteration 11' in text and runner.iter == 19


# ---------------------------------------------------------------- who has the hook


def test_every_run_has_one_hook(retinanet, distilled, make_runner):
    for model in (retinanet(), distilled(fgd=dict(type='FGD'))):
        runner = make_runner(model, epochs=1, name=model['type'])
        add_finite_hook(runner)
        add_finite_hook(runner)
        runner.train()
        assert sum(isinstance(hook, FiniteHook) for hook in runner.hooks) == 1


def test_a_plain_training_by_kd_det(retinanet, run_config):
    config = run_config(retinanet(), val=True, optimizer=dict(type='SGD', lr=1e6))
    del config.default_hooks['distill']
    with pytest.raises(ConfigurationError, match="The student's own .* is not finite in iteration"):
        kd_det.train(config)
