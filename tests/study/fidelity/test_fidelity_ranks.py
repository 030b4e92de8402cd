import json
from pathlib import Path

import pytest
import torch

from kd_det.study.fidelity import FidelityMetric

RANK = Path(__file__).with_name('fidelity_rank.py')


def test_two_ranks_find_what_one_finds(retinanet, batch, run_ranks, tmp_path):
    from mmdet.registry import MODELS
    model = retinanet()
    model.test_cfg.score_thr = 0.05
    detectors = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        detectors.append(MODELS.build(model).eval())
        torch.nn.init.uniform_(detectors[-1].bbox_head.retina_cls.bias, -1, 1)
    student, teacher = detectors
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / 'teacher.pth')
    box = ((8, 8, 40, 40), )
    data = batch(shapes=((64, 64), ) * 4, boxes=(box, ) * 4)
    torch.save(dict(model=model.to_dict(), student=student.state_dict(), data=data), tmp_path / 'spec.pth')

    metric = FidelityMetric(dict(config=model, checkpoint=str(tmp_path / 'teacher.pth')), confidence=0.2)
    metric.attach(student)
    with torch.no_grad():
        metric.process(data, [output.to_dict() for output in student.val_step(data)])
    alone = metric.evaluate(4)

    run_ranks(RANK, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f'{rank}.json').read_text()) == pytest.approx(alone, abs=1e-5)
    assert {'fidelity/found', 'fidelity/class_kl', 'fidelity/cka_8'} <= set(alone)
