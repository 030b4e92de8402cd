"""What integers buy on a device at full width: float and INT8 files side by side, in each runtime.

Usage: python -m benchmarks.latency --data-root DIR [--configs mmdet::… …] [--size 640 640] [--json FILE]

All weights are random, so detectors find nothing and suppression costs nothing; DIR has COCO's layout with
annotations/val.json and val/, whose images calibrate. Nothing else should run meanwhile.
"""
from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from kd_det import export, measure_latency, quantize
from kd_det.compat.writing import write_whole
from kd_det.config.files import load_config
from kd_det.registry import build_detector, prepare_without_runner
from kd_det.teachers.loading import remove_pretrained

CONFIGS = ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'mmdet::yolox/yolox_s_8xb8-300e_coco.py')


def make_files(name: str, folder: Path, data_root: str, size: tuple[int, int], images: int) -> list[Path]:
    """A random detector of a config, as a float and as an INT8 file."""
    config = load_config(name)
    prepare_without_runner(config)
    config.model = remove_pretrained(config.model)
    data = dict(data_root=data_root, ann_file='annotations/val.json', data_prefix=dict(img='val/'))
    for loader in ('train_dataloader', 'val_dataloader'):
        config[loader].dataset = dict(config.val_dataloader.dataset, **data)
    detector = build_detector(config.model)
    detector.init_weights()
    checkpoint = folder / 'random.pth'
    torch.save(dict(state_dict=detector.state_dict()), checkpoint)
    export(config, checkpoint, folder / 'float.onnx', size=size, images=2)
    quantize(config, checkpoint, folder / 'int8.onnx', size=size, calibrate=images, ranges=('minmax', ))
    return [folder / 'float.onnx', folder / 'int8.onnx']


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--configs', nargs='+', default=CONFIGS)
    parser.add_argument('--data-root', required=True)
    parser.add_argument('--size', nargs=2, type=int, default=(640, 640))
    parser.add_argument('--threads', nargs='+', type=int, default=(1, 2))
    parser.add_argument('--runs', type=int, default=40)
    parser.add_argument('--images', type=int, default=8, help='that calibrate (8)')
    parser.add_argument('--json', type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.configs:
        with TemporaryDirectory() as folder:
            files = make_files(name, Path(folder), options.data_root, tuple(options.size), options.images)
            for threads in options.threads:
                for runtime in ('onnxruntime', 'openvino'):
                    found = measure_latency(files, runtimes=(runtime, ), threads=threads, runs=options.runs)
                    first, second = found.files
                    rows.append(dict(
                        config=name, runtime=runtime, threads=threads, processor=found.processor, macs=first.macs,
                        milliseconds=[median(each.times) for each in found.files], speedup=[1 / each for each in
                                                                                            found.ratios[1][::-1]],
                        bytes=[first.bytes, second.bytes], memory=[each.memory for each in found.files]))
                    print(f"{name} {runtime} {threads} threads: {rows[-1]['milliseconds'][0]:.1f} ms, INT8 "
                          f"{rows[-1]['milliseconds'][1]:.1f} ms, {rows[-1]['speedup'][1]:.2f} times as fast, "
                          f'{second.bytes / first.bytes:.3f} of the size', flush=True)
    if options.json:
        settings = dict(size=list(options.size), runs=options.runs, torch=torch.__version__)
        write_whole(options.json, json.dumps(dict(settings=settings, rows=rows), indent=1))


if __name__ == '__main__':
    main()
