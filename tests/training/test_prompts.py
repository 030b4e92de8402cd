"""FreeKD's first phase: prompts learn on the frozen teacher, are kept, and are the same on all ranks and after all."""
import copy
import shutil
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.config.detectors import TeacherError
from kd_det.config.files import ConfigurationError
from kd_det.training import prompts
from kd_det.training.prompts import _Lessons

RANK = Path(__file__).with_name('prompts_rank.py')


@pytest.fixture
def distilled(one_stage):
    """Makes the model dict of a GFL with FreeKD."""

    def make(iterations: int = 3, **teacher) -> dict:
        return dict(type='DetectionDistiller', student=one_stage('gfl', classes=3),
                    teacher=dict(config=one_stage('gfl', classes=3), random_teacher=True, **teacher),
                    distill=dict(freekd=dict(type='FreeKD', prompts=2, iterations=iterations, rate=0.1)))

    return make


def load(runner, epoch: int) -> dict:
    return torch.load(Path(runner.work_dir) / f'epoch_{epoch}.pth', weights_only=True)


def test_prompts_learn_before_training_and_are_kept(distilled, make_runner, stop_after, monkeypatch):
    runner = make_runner(distilled(), epochs=2, name='straight', log_level='INFO')
    drawn = copy.deepcopy(runner.model.terms.state_dict())
    runner.train()  # at its end the teacher's weights are what they were
    term, file = runner.model.terms['freekd'], Path(runner.work_dir) / 'freekd_prompts.pt'
    kept = torch.load(file, weights_only=True)['prompts']
    assert term.prompted and all(torch.equal(*pair) for pair in zip(kept, term.prompts))
    assert not any(torch.equal(each, drawn[f'freekd.prompts_{index}']) for index, each in enumerate(kept))
    assert not any(each.requires_grad for each in term.prompts) and all(each.isfinite().all() for each in kept)
    straight = load(runner, 2)
    assert torch.equal(straight['distill']['terms']['freekd.prompts_0'], kept[0])
    assert not any('prompt' in key for key in straight['state_dict'])
    assert runner.message_hub.log_scalars['train/loss_freekd'].current() > 0

    def refuse(self):
        raise AssertionError('they are kept')

    monkeypatch.setattr(_Lessons, 'learn', refuse)
    # A run that is killed before its first checkpoint has them from the file, and one that goes on from that.
    first = make_runner(distilled(), epochs=2, name='resumed')
    other = Path(first.work_dir) / file.name
    shutil.copy(file, other)
    first.register_hook(stop_after(epochs=1), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        first.train()
    checkpoint = load(first, 1)['distill']
    assert list(checkpoint['prompted_by'].values()) == [first.model.teacher.fingerprint()]
    with pytest.raises(TeacherError, match='^model.distill.freekd: the prompts .* were learnt on another teacher'):
        make_runner(distilled(), epochs=2, name='resumed', resume=True, seed=1).train()  # draws another
    other.unlink()
    again = make_runner(distilled(), epochs=2, name='resumed', resume=True)
    again.train()
    resumed = load(again, 2)
    assert not other.exists()
    for one, same in zip(*([each['state_dict'], each['distill']['terms']] for each in (straight, resumed))):
        assert one.keys() == same.keys() and all(torch.equal(value, same[key]) for key, value in one.items())
    for changed in (dict(model=distilled(), seed=1), dict(model=distilled(iterations=4))):  # of another random teacher
        with pytest.raises(AssertionError, match='they are kept'):
            make_runner(**changed, epochs=1, name='straight').train()


def start(runner):
    """A run at the moment at which prompts are learnt."""
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner._init_model_weights()
    return runner.model


@pytest.mark.parametrize('kind', ['FCOS', 'Faster R-CNN', 'DINO'])
def test_prompts_bring_the_teachers_loss_down(kind, detector_config, make_runner):
    model = dict(type='DetectionDistiller', student=detector_config(kind),
                 teacher=dict(config=detector_config(kind), random_teacher=True),
                 distill=dict(freekd=dict(type='FreeKD', prompts=2, iterations=3, rate=0.3)))
    runner = make_runner(model)
    distiller = start(runner)
    teacher, term = distiller.teachers[0], distiller.terms['freekd']
    lessons, batch = _Lessons(runner, distiller, 'freekd', teacher), next(iter(runner.train_dataloader))
    before, modes = teacher.fingerprint(), [module.training for module in teacher.model.modules()]

    def measure() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            features = teacher.model.extract_feat(distiller.data_preprocessor(copy.deepcopy(batch), True)['inputs'])
        own = [each.clone().requires_grad_() for each in term.prompts]
        loss, alike = lessons._compute_loss(copy.deepcopy(batch), own)
        left, similarity = term.prompt(features, own)
        torch.testing.assert_close(alike, similarity)  # it is the features that are prompted
        assert len(left) == len(features) and loss.isfinite()
        return (loss + alike).item()

    first = measure()
    lessons._iterate_batches = lambda: map(copy.deepcopy, [batch] * 3)
    for own, learnt in zip(term.prompts, lessons.learn()):
        own.copy_(learnt)
    assert measure() < first
    assert teacher.fingerprint() == before and not any(each.requires_grad for each in teacher.model.parameters())
    assert [module.training for module in teacher.model.modules()] == modes


def test_the_teachers_loss_is_of_its_own_classes_and_of_labelled_images(distilled, make_runner):
    runner = make_runner(distilled())
    distiller = start(runner)
    seen = []
    distiller.teachers[0].model.loss = lambda images, samples: seen.append((len(images), samples)) or dict(
        loss=distiller.teachers[0].model.neck(distiller.teachers[0].model.backbone(images))[0].sum())
    distiller.class_sets.find_own_labels = lambda labels, index: [torch.full_like(each, -1) for each in labels]
    batch = next(iter(runner.train_dataloader))
    batch['data_samples'][1].set_metainfo(dict(unlabelled=True))
    _Lessons(runner, distiller, 'freekd', distiller.teachers[0])._compute_loss(batch, [
        each.clone().requires_grad_() for each in distiller.terms['freekd'].prompts])
    (count, samples), = seen
    assert count == len(samples) == 3 and all(len(sample.gt_instances) == 0 for sample in samples)


def test_the_ranks_learn_the_same_as_one_process(distilled, make_runner, run_config, run_ranks, tmp_path):
    unflipped = {'train_dataloader.dataset.pipeline.2.prob': 0.0}  # or each rank would flip other images
    config = run_config(distilled(iterations=2), custom_imports=dict(imports=['kd_det']), **unflipped)
    config.train_dataloader.batch_size = 2
    config.dump(tmp_path / 'config.py')
    run_ranks(RANK, tmp_path / 'config.py', tmp_path / 'found.pth')
    found = torch.load(tmp_path / 'found.pth', weights_only=True)
    alone = make_runner(distilled(iterations=2), name='alone', **unflipped)
    distiller = start(alone)
    prompts.learn_prompts(alone, distiller)
    for one, other, expected in zip(*found, distiller.terms['freekd'].prompts, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=0, atol=5e-3)  # two steps of Adam, of 0.1 each


def test_a_guide_without_a_loss_is_told(one_stage, make_runner):
    model = dict(type='DetectionDistiller', student=one_stage('gfl'),
                 teacher=dict(type='Backbone', name='test_vit', random_teacher=True),
                 distill=dict(freekd=dict(type='FreeKD')))
    runner = make_runner(model)
    with pytest.raises(ConfigurationError, match='^model.distill.freekd: .* frozen detector, which a Backbone is not'):
        prompts.learn_prompts(runner, start(runner))


def test_the_teachers_classes_must_be_known(one_stage, distilled, make_runner):
    model = distilled()
    model['teacher']['config'] = one_stage('gfl', classes=5)
    runner = make_runner(model)
    distiller = start(runner)
    with pytest.raises(ConfigurationError, match='^model.distill.freekd: .* tells 5 classes apart, the student 3, and'):
        prompts.learn_prompts(runner, distiller)
    distiller.teachers[0].classes = ('a', 'b', 'c', 'd', 'e')  # no one of them is in the data
    with pytest.raises(ConfigurationError, match='have no name in common'):
        distiller.match_classes(('blue', 'green', 'red'))


def test_an_encoder_has_no_maps_to_prompt():
    with pytest.raises(ValueError, match="^tap: expected a module whose maps .* got 'encoder'"):
        MODELS.build(dict(type='FreeKD', tap='encoder'))


def test_the_students_own_average_can_teach_no_prompts(distilled, make_runner):
    config = distilled()
    config['teacher'] = dict(type='Average')
    with pytest.raises(ConfigurationError, match='learnt by the own loss of a frozen detector, which .* is not'):
        make_runner(config, name='average').train()
