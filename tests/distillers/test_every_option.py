"""Correctness never pays for speed: with every option that saves time at once, a run still resumes, repeats, and is the
same on two ranks."""
import importlib.util
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

RANK = Path(__file__).with_name('ddp_rank.py')
COMPILED = dict(backend='aot_eager')  # without a C++ compiler


@pytest.fixture
def model(retinanet, tmp_path):
    """Makes the model dict of a student with two teachers in one cache: one for features, whose outermost levels are
    not read, and one for features and outputs. Weights are balanced, and change with time."""
    for index in range(2):
        torch.manual_seed(index)
        torch.save(dict(state_dict=MODELS.build(retinanet(neck=12)).state_dict()), tmp_path / f'teacher{index}.pth')

    def teacher(index, precision) -> dict:
        return dict(config=retinanet(neck=12), checkpoint=str(tmp_path / f'teacher{index}.pth'), precision=precision,
                    compile=COMPILED, cache=dict(dir=str(tmp_path / 'cache'), dtype='float16', max_gb=1))

    def make() -> dict:
        return dict(
            type='DetectionDistiller', student=retinanet(), teacher=[teacher(0, 'bfloat16'), teacher(1, 'float32')],
            inherit=('bbox_head', ), inherit_by='selection', task_weight=dict(type='Warmup', epochs=3, value=1.0),
            distill=dict(
                fgd=dict(type='FGD', levels=(1, 2), weight=dict(type='Balance', interval=2)),
                mimic=dict(type='FeatureImitation', teacher=1, levels=(0, 1),
                           weight=dict(type='Stop', epochs=3, value=0.1)),
                classes=dict(type='DenseClassification', teacher=1, normalizer='positives',
                             weight=dict(type='Warmup', epochs=2, value=dict(type='Balance', ratio=0.3)))))

    return make


def test_a_run_that_is_resumed_or_repeated_ends_in_the_same_weights(model, run_config, train_apart, tmp_path):

    def job(name, stops_after=None, **changes):
        config = run_config(model(), epochs=4, name=name, log_level='INFO', **changes)
        pipeline = config.train_dataloader.dataset.pipeline
        pipeline[2] = dict(type='ReplayedRandomness', period=2, transforms=[pipeline[2]])
        config.train_dataloader.update(num_workers=2, persistent_workers=True)
        return config, stops_after

    def saved(name) -> dict:
        checkpoint = torch.load(tmp_path / name / 'epoch_4.pth', weights_only=True)
        tensors = dict(checkpoint['state_dict'], **checkpoint['distill']['terms'])
        measured = checkpoint['distill']['weights']  # by balances and by checks
        averages = {name: each['averages'] for name, each in measured.items() if 'averages' in each}
        checked = {f'{name}.{key}': each[key] for name, each in measured.items() if name not in averages
                   for key in ('sums', 'remaining')}
        assert averages and checked
        return {**tensors, **averages, **checked}

    # what the last asks the teachers is all in the cache
    train_apart(job('resumed', 2), job('resumed', resume=True), job('repeated'))
    log = ''.join(file.read_text() for file in (tmp_path / 'repeated').glob('*/*.log'))
    assert log.count('8 images read') == 8 and log.count(', 0 computed') == 8
    expected, found = saved('resumed'), saved('repeated')
    assert {'fgd', 'classes'} < found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_ranks_give_the_gradients_of_one_process(model, batch, run_ranks, tmp_path):
    config = model()
    config['student'].backbone.norm_eval = True  # BatchNorm's own batch statistics would differ between the two
    for name in ('fgd', 'classes'):  # and so would the task's gradient: a RetinaNet counts its positives rank by rank
        config['distill'][name]['weight'] = 1.0
    shapes, boxes = ((64, 64), ) * 4, (((8, 8, 40, 40), ), (), ((20, 4, 60, 30), (2, 10, 30, 38)), ((4, 4, 20, 60), ))
    data = MODELS.build(config['student'].data_preprocessor)(batch(shapes, boxes), True)
    torch.save((config, data['inputs'], data['data_samples']), tmp_path / 'input.pth')
    run_ranks(RANK, tmp_path / 'input.pth', tmp_path / 'output.pth')
    gradients, _ = torch.load(tmp_path / 'output.pth', weights_only=True)
    spec = importlib.util.spec_from_file_location('ddp_rank', RANK)
    rank = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rank)
    expected, *_ = rank.distilled_gradients(config, data['inputs'], data['data_samples'])
    assert gradients.keys() == expected.keys() and any(name.startswith('distill_terms') for name in gradients)
    for name, gradient in gradients.items():  # bfloat16 may round otherwise where kernels differ with the batch
        assert (gradient - expected[name]).norm() <= 1e-2 * expected[name].norm(), name
