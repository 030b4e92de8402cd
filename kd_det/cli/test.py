"""``kd-det test``: MMDetection's evaluation of a checkpoint, with its options."""
from __future__ import annotations

import copy
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import add_run_options, apply_run_options

if TYPE_CHECKING:
    from mmengine.config import Config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config',
                        help="config file, or 'package::folder/file.py'; of a distillation, its student is tested")
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=_pickle_file, metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save painted images in this folder within the work dir')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS', help='how long --show shows each (2)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    add_run_options(parser)


def run(options: Namespace) -> int:
    from mmdet.engine.hooks.utils import trigger_visualization_hook
    from mmdet.evaluation import DumpDetResults

    from kd_det.checks.data import check_labels
    from kd_det.checks.doctor import check_config, explain
    from kd_det.config.files import load_config, rename_config, student_config
    from kd_det.study.pictures import names_to_draw
    from kd_det.training.runner import build_runner, check_start, use_one_metainfo
    config, name = student_config(load_config(options.config)), Path(options.config).stem
    apply_run_options(config, options, name)
    config = rename_config(config, f'{name}_test.py')  # the work dir keeps the config of its training
    config.load_from = options.checkpoint
    if options.show or options.show_dir:
        config = trigger_visualization_hook(config, options)
    if options.tta:
        augment(config)
    check_config(config, splits=('test', ))
    with explain(config):
        runner = build_runner(config)
        use_one_metainfo(runner.test_loop)
        metrics = runner.test_loop.evaluator.metrics
        check_labels(dict(test=runner.test_loop.dataloader.dataset), dict(test=metrics))
        if options.out:
            metrics.append(DumpDetResults(out_file_path=options.out))
    check_start(runner)
    if options.show or options.show_dir:
        meta = runner.test_loop.dataloader.dataset.metainfo
        runner.visualizer.dataset_meta = dict(meta, classes=names_to_draw(meta.get('classes') or ()))
    runner.test()
    return 0


def augment(config: Config) -> None:
    """Turns on test-time augmentation: the config's own ``tta_model`` and ``tta_pipeline``, or horizontal flips."""
    from mmengine.config import ConfigDict

    from kd_det.config.files import list_leaf_datasets
    from kd_det.registry import HOME
    dataset = list_leaf_datasets(config.test_dataloader.dataset)[0]
    pipeline = config.get('tta_pipeline')
    if pipeline is None:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        flips = [dict(type=f'{HOME}.RandomFlip', prob=probability) for probability in (1.0, 0.0)]
        pipeline = copy.deepcopy(dataset['pipeline'])
        packing = [dict(type=f'{HOME}.PackDetInputs', meta_keys=keys)]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, packing])
    dataset['pipeline'] = pipeline
    wrapper = ConfigDict(config.get('tta_model') or dict(  # its types may be classes, which ** would write as such
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    wrapper.module = config.model
    config.model = wrapper


def _pickle_file(path: str) -> str:
    if not path.endswith(('.pkl', '.pickle')):
        raise ArgumentTypeError(f"'{path}' does not end in .pkl or .pickle")
    return path
