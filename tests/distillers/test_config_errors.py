"""Typing errors in a distillation's config."""
import re

import pytest

from kd_det.config.files import ConfigurationError


@pytest.mark.parametrize('changes, message', [
    (dict(distill=dict(x=dict(type='FDG'))), "model.distill.x: there is no 'FDG'. Nearest names: FKD, FGD"),
    (dict(distill=dict(x=dict(type='FGD', alfa=1))), "there is no argument 'alfa'. Nearest names: alpha"),
    (dict(distill=dict(x=dict(type='PKD', weight=dict(type='Balance', interva=3)))),
     "model.distill.x: there is no argument 'interva'. Nearest names: interval"),
    (dict(distill=dict(x=dict(type='FeatureImitation', mask='BoxForegrond'))),
     "model.distill.x: there is no 'BoxForegrond'. Nearest names: BoxForeground"),
    (dict(distill=dict(x=dict(type='FeatureImitation', mask=dict(type='MaskSum', masks=[
        dict(type='SpatialAttention', temprature=1)])))),
     "there is no argument 'temprature'. Nearest names: temperature"),
    (dict(distill=dict(x=dict(type='PKD', qqqq=1))), "model.distill.x: there is no argument 'qqqq'."),
    (dict(task_weight=dict(type='Warmup', epoch=1)),
     "model.task_weight: there is no argument 'epoch'. Nearest names: epochs"),
    (dict(pseudo_labels=dict(scor=0.5)), "model.pseudo_labels: there is no argument 'scor'. Nearest names: score")])
def test_the_right_name_is_told(retinanet, distiller, changes, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        distiller(retinanet(), retinanet(), **changes)


def test_a_wrong_name_is_not_its_own_correction(retinanet, distiller):
    weight = dict(type='Balance', value=1.0)  # the name of an argument of its base class
    with pytest.raises(ConfigurationError, match=r"there is no argument 'value'\.(?! Nearest names: .*value)"):
        distiller(retinanet(), retinanet(), distill=dict(x=dict(type='PKD', weight=weight)))
