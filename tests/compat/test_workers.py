"""``mmcv.ops`` in child processes of a script that, like mmdet's tools/train.py, does not import kd_det at its top."""
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kd_det.compat

REPOSITORY = Path(kd_det.compat.__file__).parents[2]

# Unpickling the data set imports this module, and with it mmcv.ops.
DATA = '''
import torch
from mmcv.ops import nms
from torch.utils.data import DataLoader

class Boxes(torch.utils.data.Dataset):

    def __len__(self):
        return 2

    def __getitem__(self, index):
        boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.], [20., 20., 30., 30.]])
        return nms(boxes, torch.tensor([.9, .8, .7]), 0.5)[1]

def load(method):
    loader = DataLoader(Boxes(), batch_size=2, num_workers=1, multiprocessing_context=method)
    print(method, next(iter(loader)).tolist(), flush=True)
'''

SCRIPT = '''
import multiprocessing
import sys

def main():
    import kd_det.compat
    kd_det.compat.install()
    from boxes_data import load
    for method in sys.argv[1:]:
        load(method)
    child = multiprocessing.get_context('spawn').Process(target=load, args=('spawn', ))
    child.start()
    child.join()

if __name__ == '__main__':
    main()
'''


@pytest.mark.skipif(kd_det.compat.operator_backend() != 'torchvision', reason='compiled mmcv is installed')
def test_workers_and_their_children_have_the_operators(tmp_path):
    (tmp_path / 'boxes_data.py').write_text(DATA)
    (tmp_path / 'train.py').write_text(SCRIPT)
    methods = [method for method in ('forkserver', 'fork') if method in multiprocessing.get_all_start_methods()]
    process = subprocess.run([sys.executable, str(tmp_path / 'train.py'), *methods], capture_output=True, text=True,
                             env=dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS='1'))
    assert process.returncode == 0, process.stderr
    # The last one is the spawned worker of a spawned child.
    assert process.stdout.splitlines() == [f'{method} [[0, 2], [0, 2]]' for method in [*methods, 'spawn']]
