"""measure_fidelity on the images of either split."""
import json

import pytest
import torch

from kd_det.study.fidelity import measure_fidelity


@pytest.fixture
def study(run_config, retinanet, coco_folder, tmp_path):
    """Student, its weights and teacher, on five training images and three others for validation; one is empty."""
    from mmdet.registry import MODELS
    everything = json.loads((coco_folder / 'all.json').read_text())
    chosen = dict(train=[0, 1, 2, 3, 4], val=[5, 6, 7], shown=[0, 1, 2, 3])
    for split, ids in chosen.items():
        kept = dict(everything, images=[each for each in everything['images'] if each['id'] in ids],
                    annotations=[each for each in everything['annotations'] if each['image_id'] in set(ids) - {4}])
        (tmp_path / f'{split}.json').write_text(json.dumps(kept))
    model = retinanet()
    model.test_cfg.score_thr = 0.05
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        detector = MODELS.build(model)
        torch.nn.init.uniform_(detector.bbox_head.retina_cls.bias, -1, 1)
        files.append(str(tmp_path / f'{seed}.pth'))
        torch.save(dict(state_dict=detector.state_dict()), files[-1])

    def make(val='val'):
        config = run_config(model, val=True)
        for loader, split in ((config.train_dataloader, 'train'), (config.val_dataloader, val)):
            loader.dataset.ann_file = str(tmp_path / f'{split}.json')
        config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
        return config, files[0], dict(config=model, checkpoint=files[1])

    return make


def test_training_images_are_prepared_as_for_validation(study):
    """As if the images that are trained on, those with objects, were for validation."""
    on_train, on_val = (measure_fidelity(*study(), split=split, confidence=0.2) for split in ('train', 'val'))
    assert on_train == measure_fidelity(*study(val='shown'), confidence=0.2)
    assert on_train['class_kl'] != on_val['class_kl'] and {'found', 'cka_8', 'student_ece'} <= set(on_train)


def test_options_reach_the_metric(study):
    assert not {'found', 'class_kl'} & set(measure_fidelity(*study(), confidence=1.0))  # nothing is that sure
