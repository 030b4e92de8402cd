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
    (dict(pseudo_labels=dict(scor=0.5)), 'model.pseudo_labels.scor: there is no such key. Nearest: score.')])
def test_the_right_name_is_told(retinanet, distiller, changes, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        distiller(retinanet(), retinanet(), **changes)


def test_a_wrong_name_is_not_its_own_correction(retinanet, distiller):
    weight = dict(type='Balance', value=1.0)  # the name of an argument of its base class
    with pytest.raises(ConfigurationError, match=r'weight\.value: there is no such key\. (?!Nearest: .*value)'):
        distiller(retinanet(), retinanet(), distill=dict(x=dict(type='PKD', weight=weight)))
