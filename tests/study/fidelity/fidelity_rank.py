"""One rank of test_fidelity_ranks.py: compares its share of a batch.

Usage: torchrun fidelity_rank.py FOLDER
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import kd_det  # noqa: F401  isort:skip
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict

from kd_det.compat.process import end_rank
from kd_det.study.fidelity import FidelityMetric

register_all_modules()
dist.init_process_group('gloo')
folder, rank = Path(sys.argv[1]), dist.get_rank()
spec = torch.load(folder / 'spec.pth', weights_only=False)
model = ConfigDict(spec['model'])
detector = MODELS.build(model).eval()
detector.load_state_dict(spec['student'])
metric = FidelityMetric(dict(config=model, checkpoint=str(folder / 'teacher.pth')), confidence=0.2)
metric.attach(detector)
data = {key: values[rank::dist.get_world_size()] for key, values in spec['data'].items()}
with torch.no_grad():
    outputs = detector.val_step(data)
metric.process(data, [output.to_dict() for output in outputs])
metrics = metric.evaluate(len(spec['data']['inputs']))
(folder / f'{rank}.json').write_text(json.dumps(metrics))
end_rank(0)
