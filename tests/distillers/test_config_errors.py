"""Typing errors in a distillation's config."""
import re

import pytest

from kd_det.config.files import ConfigurationError


@pytest.mark.parametrize('changes, message', [
    (dict(distill=dict(x=dict(type='FDG'))), "model.distill.x.type: there is no 'FDG'. Nearest: FKD, FGD"),
    (dict(distill=dict(x=dict(type='FGD', alfa=1))), 'model.distill.x.alfa: there is no such key. Nearest: alpha.'),
    (dict(distill=dict(x=dict(type='PKD', weight=dict(type='Balance', interva=3)))),
     'model.distill.x.weight.interva: there is no such key. Nearest: interval.'),
    (dict(distill=dict(x=dict(type='FeatureImitation', mask='BoxForegrond'))),
     "model.distill.x.mask.type: there is no 'BoxForegrond'. Nearest: BoxForeground"),
    (dict(distill=dict(x=dict(type='FeatureImitation', mask=dict(type='MaskSum', masks=[
        dict(type='SpatialAttention', temprature=1)])))),
     'model.distill.x.mask.masks[0].temprature: there is no such key. Nearest: temperature.'),
    (dict(distill=dict(x=dict(type='PKD', qqqq=1))),
     'model.distill.x.qqqq: there is no such key. Expected one of adapter, levels, normalize, pad_aware, resize, '
     'tap, teacher.'),
    (dict(task_weight=dict(type='Warmup', epoch=1)),
     'model.task_weight.epoch: there is no such key. Nearest: epochs.'),
    (dict(pseudo_labels=dict(scor=0.5)), 'model.pseudo_labels.scor: there is no such key. Nearest: score.'),
    (dict(distill={'a.b': dict(type='PKD')}), 'model.distill.a.b: a term is a module of this name, which PyTorch does'),
    (dict(distill=dict(keys=dict(type='PKD'))), 'model.distill.keys: a term is a module of this name')])
def test_the_right_name_is_told(retinanet, distiller, changes, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        distiller(retinanet(), retinanet(), **changes)


def test_a_wrong_name_is_not_its_own_correction(retinanet, distiller):
    weight = dict(type='Balance', value=1.0)  # the name of an argument of its base class
    with pytest.raises(ConfigurationError, match=r'weight\.value: there is no such key\. (?!Nearest: .*value)'):
        distiller(retinanet(), retinanet(), distill=dict(x=dict(type='PKD', weight=weight)))


@pytest.mark.parametrize('name', ['cls', 'bbox'])
def test_a_term_may_not_have_the_name_of_a_loss_of_the_student(name, retinanet, distiller, batch):
    """It would take the place of that loss, and the student learn no classes or no boxes."""
    model = distiller(retinanet(), retinanet(), distill={name: dict(type='PKD')})
    data = model.data_preprocessor(batch(), True)
    with pytest.raises(ConfigurationError, match=f"model.distill.{name}: the student has a loss .* 'loss_{name}'"):
        model.loss(data['inputs'], data['data_samples'])
