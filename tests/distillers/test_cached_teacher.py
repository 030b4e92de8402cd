"""A cached teacher teaches what it would teach uncached: gradients, resumed runs, ranks."""
import importlib.util
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError

RANK = Path(__file__).with_name('ddp_rank.py')


@pytest.fixture
def distilled(retinanet, tmp_path):
    """Makes the model dict of a RetinaNet that learns features and outputs from a teacher with a cache, or without."""
    torch.manual_seed(3)
    torch.save(dict(state_dict=MODELS.build(retinanet(neck=12)).state_dict()), tmp_path / 'teacher.pth')

    def make(dtype='float32', **changes) -> dict:
        cache = dict(dir=str(tmp_path / 'cache'), dtype=dtype, max_gb=1) if dtype else None
        return dict(type='DetectionDistiller', student=retinanet(),
                    teacher=dict(config=retinanet(neck=12), checkpoint=str(tmp_path / 'teacher.pth'), cache=cache),
                    distill=dict(fgd=dict(type='FGD', alpha=1e-2), classes=dict(type='DenseClassification'),
                                 boxes=dict(type='DenseRegression', weighting='confidence', normalizer='confidence')),
                    **changes)

    return make


@pytest.fixture
def gradients(batch):
    def compute(config) -> dict:
        torch.manual_seed(0)
        model = MODELS.build(config)
        model.train()
        data = model.data_preprocessor(batch(shapes=((64, 64), (48, 64))), True)
        losses = model.loss(**data)
        model.parse_losses(losses)[0].backward()
        computed = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return computed, model.teacher

    return compute


def test_gradients_are_equal_with_float32(distilled, gradients):
    expected, _ = gradients(distilled(None))
    for hits in (0, 2):
        found, teacher = gradients(distilled('float32'))
        assert teacher.cache.counts.hits == hits
        assert found.keys() == expected.keys() and any(name.startswith('distill_terms') for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_with_float16_are_equal_within_its_rounding(distilled, gradients):
    expected, _ = gradients(distilled(None))
    cold, _ = gradients(distilled('float16'))
    warm, teacher = gradients(distilled('float16'))
    assert teacher.cache.counts.hits == 2 and teacher.cache.counts.misses == 0
    for name, gradient in expected.items():
        assert torch.equal(cold[name], warm[name])
        assert (warm[name] - gradient).norm() <= 1e-3 * gradient.norm(), name  # float16: 2⁻¹¹ on each value
    assert not all(torch.equal(warm[name], expected[name]) for name in expected)


def test_what_depends_on_the_students_regions_is_refused(faster_rcnn, distiller):
    teacher = dict(config=faster_rcnn(), random_teacher=True, cache=dict(dir='nowhere'))
    with pytest.raises(ConfigurationError, match='model.distill.regions: .*roi_head, which depend on the regions'):
        distiller(faster_rcnn(), None, teacher=teacher,
                  distill=dict(fgd=dict(type='FGD'), regions=dict(type='RoIClassification')))
    assert not Path('nowhere').exists()


def test_a_resumed_run_equals_the_uninterrupted_one_and_reads_what_recurs(distilled, run_config, train_apart,
                                                                              tmp_path):
    def job(name, model, stops_before=None, **changes):
        config = run_config(model, epochs=4, name=name, log_level='INFO', **changes)
        pipeline = config.train_dataloader.dataset.pipeline
        pipeline[2] = dict(type='ReplayedRandomness', period=2, transforms=[pipeline[2]])
        config.train_dataloader.update(num_workers=2, persistent_workers=True)
        return config, stops_before

    def log(name) -> list:
        text = ''.join(file.read_text() for file in sorted((tmp_path / name).glob('*/*.log')))
        return [line.split('Teacher cache: ')[1] for line in text.splitlines() if 'Teacher cache: ' in line]

    def saved(name):
        return torch.load(tmp_path / name / 'epoch_4.pth', weights_only=True)

    train_apart(job('uncached', distilled(None)), job('straight', distilled()), job('resumed', distilled(), 2),
                job('resumed', distilled(), resume=True))
    assert not log('uncached')
    assert [line.split(';')[0].split(' images')[0] for line in log('straight')] == ['0', '0', '8', '8']
    assert log('resumed')[-1].startswith('8 images read') and ', 0 computed' in log('resumed')[-1]
    for name in ('straight', 'resumed'):
        for part in ('state_dict', 'distill'):
            expected, found = (saved(each)[part] for each in ('uncached', name))
            expected, found = (each.get('terms', each) for each in (expected, found))
            assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_two_ranks_share_a_cache(distilled, batch, run_ranks, tmp_path):
    """Twice: the first time both compute and store, the second time both read, what the other had stored too."""
    config = distilled()
    config['student'].backbone.norm_eval = True  # BatchNorm's own batch statistics would differ between the two
    shapes, boxes = ((64, 64), ) * 4, (((8, 8, 40, 40), ), (), ((20, 4, 60, 30), (2, 10, 30, 38)), ((4, 4, 20, 60), ))
    data = MODELS.build(config['student'].data_preprocessor)(batch(shapes, boxes), True)
    spec = importlib.util.spec_from_file_location('ddp_rank', RANK)
    rank = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rank)
    expected, *_ = rank.distilled_gradients(distilled(None) | dict(student=config['student']), data['inputs'],
                                           data['data_samples'])
    stored = []
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        torch.save((config, data['inputs'][order], [data['data_samples'][index] for index in order]),
                   tmp_path / 'input.pth')
        run_ranks(RANK, tmp_path / 'input.pth', tmp_path / 'output.pth')
        gradients, _ = torch.load(tmp_path / 'output.pth', weights_only=True)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6,
                                       msg=lambda text: f'{name}: {text}')
        stored.append({file: file.stat().st_mtime_ns for file in (tmp_path / 'cache').glob('??/*.entry')})
    assert len(stored[0]) == 4 and stored[1] == stored[0]
