"""Several teachers: of one config, and of several."""
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from kd_det.config.composition import make_ensemble
from kd_det.config.files import ConfigurationError, load_config
from kd_det.functional.logits import soft_target_kl

DOCUMENTATION = Path(__file__).parents[2] / 'docs' / 'methods.md'
TEMPERATURE, WEIGHT = 2.0, 3.0
KD = dict(type='RoIClassification', temperature=TEMPERATURE, weight=WEIGHT)


def test_each_term_is_repeated_for_every_teacher_with_its_part_of_the_weight(distillation):
    one = distillation(
        dict(type='RetinaNet'), dict(config='teacher.py', checkpoint='x.pth', classes=['cat']),
        plain=dict(type='PKD', weight=6.0), unsaid=dict(type='MGD', tap='neck'),
        late=dict(type='FGD', weight=dict(type='Warmup', epochs=1, value=dict(type='Balance', ratio=0.9, interval=5))),
        fading=dict(type='FGD', weight=dict(type='Balance', ratio=dict(type='Decay', value=0.3, epochs=2))),
        balanced=dict(type='FGD', weight=dict(type='Balance')))
    before = one.to_dict()
    made = make_ensemble(one, ['a.pth', 'b.pth', 'c.pth']).model
    assert one.to_dict() == before
    assert made.teacher == [dict(config='teacher.py', checkpoint=f'{name}.pth', classes=['cat']) for name in 'abc']
    assert list(made.distill)[:4] == ['plain_1', 'plain_2', 'plain_3', 'unsaid_1'] and len(made.distill) == 15
    assert made.distill.plain_3 == dict(type='PKD', weight=2.0, teacher=2)
    assert made.distill.unsaid_1 == dict(type='MGD', tap='neck', weight=pytest.approx(1 / 3), teacher=0)
    assert made.distill.late_2.weight == dict(
        type='Warmup', epochs=1, value=dict(type='Balance', ratio=pytest.approx(0.3), interval=5))
    assert made.distill.fading_1.weight.ratio == dict(type='Decay', value=pytest.approx(0.1), epochs=2)
    assert made.distill.balanced_1.weight.ratio == pytest.approx(0.5 / 3)  # of the default


@pytest.mark.parametrize('weight, message', [
    (dict(type='Warmup', epochs=1), r'model\.distill\.pkd_1\.weight\.value: expected a number'),
    (dict(type='Warmup', epochs=1, value='much'),
     r"model\.distill\.pkd_1\.weight\.value: expected a number .*, got 'much'")])
def test_a_weight_that_is_none_is_told_by_the_distiller(retinanet, weight, message, distillation):
    one = distillation(retinanet(), dict(config=retinanet(), random_teacher=True), pkd=dict(type='PKD', weight=weight))
    with pytest.raises(ConfigurationError, match=message):
        MODELS.build(make_ensemble(one, ['a.pth', 'b.pth']).model)


def test_what_no_ensemble_can_be_made_of_is_told(distillation):
    one = distillation(dict(), dict(config='teacher.py'))
    with pytest.raises(ConfigurationError, match='two teachers at least, not 1'):
        make_ensemble(one, ['a.pth'])
    several = distillation(dict(), [dict(config='teacher.py')])
    for config in (several, Config(dict(model=dict(type='RetinaNet')))):
        with pytest.raises(ConfigurationError, match='made of a distillation with one teacher'):
            make_ensemble(config, ['a.pth', 'b.pth'])


@pytest.fixture
def checkpoints(faster_rcnn, tmp_path):
    """The weights of three teachers who disagree."""
    files = []
    for seed in range(3):
        torch.manual_seed(seed)
        teacher = MODELS.build(faster_rcnn(depth=50))
        torch.nn.init.normal_(teacher.roi_head.bbox_head.fc_cls.weight)
        files.append(str(tmp_path / f'{seed}.pth'))
        torch.save(dict(state_dict=teacher.state_dict()), files[-1])
    return files


def step(config: Config, data: dict):
    """One training step from the same student and the same random numbers: the distiller, its batch and its losses."""
    torch.manual_seed(0)
    distiller = MODELS.build(config.model).train()
    batch = distiller.data_preprocessor(data, True)
    torch.manual_seed(1)  # of the regions that the student samples
    return distiller, batch, distiller.loss(**batch)


def gradient(value, distiller) -> torch.Tensor:
    found = torch.autograd.grad(value, list(distiller.neck.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


def test_equal_teachers_pull_as_hard_as_one(faster_rcnn, batch, checkpoints, distillation):
    one = distillation(faster_rcnn(), dict(config=faster_rcnn(depth=50), checkpoint=checkpoints[0]), kd=KD,
                       pkd=dict(type='PKD', weight=dict(type='Balance', ratio=0.5)))
    single, _, alone = step(one, batch())
    several, _, together = step(make_ensemble(one, checkpoints[:1] * 3), batch())
    for name in ('kd', 'pkd'):
        assert alone[f'loss_{name}'] > 0
        shares = [together[f'loss_{name}_{number}'] for number in (1, 2, 3)]
        torch.testing.assert_close(shares[0], alone[f'loss_{name}'] / 3)
        torch.testing.assert_close(gradient(sum(shares), several), gradient(alone[f'loss_{name}'], single))


def test_soft_targets_of_several_teachers_have_the_gradient_of_their_mean_prediction(faster_rcnn, batch, checkpoints,
                                                                                     distillation):
    one = distillation(faster_rcnn(), dict(config=faster_rcnn(depth=50), checkpoint=checkpoints[0]), kd=KD)
    distiller, data, losses = step(make_ensemble(one, checkpoints), batch())
    found = gradient(sum(losses[f'loss_kd_{number}'] for number in (1, 2, 3)), distiller)

    torch.manual_seed(1)  # the same regions
    context = distiller.observe(data['inputs'], data['data_samples'], distiller.terms).context
    outputs = [term.read_outputs(context) for term in distiller.terms.values()]
    student, predictions = outputs[0][0].logits, [(teacher.logits / TEMPERATURE).softmax(-1) for _, teacher in outputs]
    assert not torch.allclose(predictions[0], predictions[1], atol=0.01)
    mean = TEMPERATURE * (sum(predictions) / 3).log()
    torch.testing.assert_close(found, gradient(WEIGHT * soft_target_kl(student, mean, TEMPERATURE), distiller))


def test_the_documented_config_of_two_teachers_weighs_them_as_it_says(retinanet, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = DOCUMENTATION.read_text(encoding='utf-8').partition('## Several teachers')[2]
    Path('two_teachers.py').write_text(re.search('```python\n(.*?)```', section, re.DOTALL)[1])
    Config(dict(model=retinanet())).dump('my_student.py')
    for seed, (name, depth) in enumerate(dict(strong=50, other=34).items()):
        Config(dict(model=retinanet(depth=depth))).dump(f'{name}.py')
        torch.manual_seed(seed)
        torch.save(dict(state_dict=MODELS.build(retinanet(depth=depth)).state_dict()), f'{name}.pth')
    config = load_config('two_teachers.py')
    assert config.model.student == load_config('my_student.py').model
    _, _, losses = step(config, batch())
    for index, (name, weight) in enumerate(dict(strong=0.7, other=0.3).items()):
        alone = load_config('two_teachers.py')
        alone.model.teacher = alone.model.teacher[index]
        alone.model.distill = dict(pkd=dict(type='mmdet.PKD', tap='neck', levels=4, weight=10.0))
        _, _, expected = step(alone, batch())
        assert expected['loss_pkd'] > 0
        torch.testing.assert_close(losses[f'loss_pkd_{name}'], weight * expected['loss_pkd'])
