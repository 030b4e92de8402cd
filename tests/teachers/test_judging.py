"""A frozen detector's own loss on each image: of every family, without a trace."""
import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from kd_det.teachers import Teacher, TeacherError
from kd_det.teachers.judging import measure_losses


@pytest.fixture
def judged(detector_config, batch):
    """Makes a teacher of a kind, and a batch for it."""

    def make(kind: str):
        config = detector_config(kind, teacher=True)
        preprocessor = MODELS.build(config.data_preprocessor)
        teacher = Teacher(config, random_teacher=True, taps=(), student_preprocessor=preprocessor)
        data = preprocessor(batch(), True)
        for sample in data['data_samples']:
            sample.set_metainfo(dict(batch_input_shape=(64, 64)))
        return teacher, data['inputs'], data['data_samples']

    return make


@pytest.mark.parametrize('kind', ['Faster R-CNN', 'Cascade R-CNN', 'GFL', 'YOLOX', 'SSD', 'DETR', 'DINO'])
def test_detectors_of_all_families_are_judged_and_stay_as_they_are(kind, judged):
    teacher, images, samples = judged(kind)
    modes, state = [each.training for each in teacher.model.modules()], torch.get_rng_state()
    losses = measure_losses(teacher, images, samples)
    before = teacher.fingerprint()
    assert losses.shape == (2, ) and (losses > 0).all() and losses.isfinite().all()
    torch.testing.assert_close(measure_losses(teacher, images, samples), losses)
    assert modes == [each.training for each in teacher.model.modules()] and teacher.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), state) and [len(each.gt_instances) for each in samples] == [1, 2]


def test_what_a_teachers_engine_has_set_stays(judged):
    """Its wrapper of extract_feat, which puts images into its precision and order in memory."""
    teacher, images, samples = judged('GFL')
    teacher.start_engine()
    own = teacher.model.extract_feat
    wrapper = teacher.model.extract_feat = lambda *args, **kwargs: own(*args, **kwargs)
    measure_losses(teacher, images, samples)
    assert vars(teacher.model)['extract_feat'] is wrapper


def test_objects_of_classes_that_it_does_not_know_do_not_count(judged):
    teacher, images, samples = judged('GFL')
    unknown = [torch.tensor([2]), torch.tensor([-1, 1])]
    losses = measure_losses(teacher, images, samples, unknown)
    for sample, labels in zip(samples, unknown):
        sample.gt_instances = sample.gt_instances[labels >= 0]
        sample.gt_instances.labels = labels[labels >= 0]
    torch.testing.assert_close(measure_losses(teacher, images, samples), losses)


def test_a_detector_that_has_no_loss_on_the_data_is_told(judged):
    with pytest.raises(TeacherError, match="A MaskRCNN can not compute its own loss .* by='boxes'"):
        measure_losses(*judged('Mask R-CNN'))


@pytest.mark.parametrize('kind', ['Faster R-CNN', 'GFL'])
def test_a_teacher_of_larger_images_is_judged_on_larger_boxes(kind, judged):
    teacher, images, samples = judged(kind)
    sizes = dict.fromkeys(('img_shape', 'pad_shape', 'batch_input_shape'), (128, 128))
    enlarged = [sample.new(metainfo=dict(sample.metainfo, **sizes)) for sample in samples]
    for sample, other in zip(samples, enlarged):
        other.gt_instances = InstanceData(bboxes=2 * sample.gt_instances.bboxes, labels=sample.gt_instances.labels)
    losses = measure_losses(teacher, F.interpolate(images, (128, 128), mode='bilinear', antialias=True), enlarged)
    before = [sample.gt_instances.bboxes.clone() for sample in samples]
    teacher.scale = teacher.bridge.image_scale = 2.0
    torch.testing.assert_close(measure_losses(teacher, images, samples), losses)
    assert all(torch.equal(*each) for each in zip(before, (sample.gt_instances.bboxes for sample in samples)))
    assert [sample.img_shape for sample in samples] == [(64, 64)] * 2
