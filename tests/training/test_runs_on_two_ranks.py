"""A whole run on two ranks: pre-flight, training, validation and saving."""
from pathlib import Path

import torch
from mmdet.registry import MODELS

RANK, STATES_RANK = (Path(__file__).with_name(name) for name in ('cpu_rank.py', 'states_rank.py'))


def run_on_two_ranks(model, run_config, run_ranks, folder) -> str:
    config = run_config(model, epochs=2, val=True, preflight=dict(images=5, min_map=0.0), log_level='INFO',
                        custom_imports=dict(imports=['kd_det']))
    config.train_dataloader.batch_size = 2
    config.dump(folder / 'config.py')
    return run_ranks(RANK, folder / 'config.py')


def test_a_whole_run_on_two_ranks(retinanet, run_config, run_ranks, tmp_path):
    """Pre-flight, training without find_unused_parameters (the term stops half-way), validation and saving."""
    torch.save(dict(state_dict=MODELS.build(retinanet(neck=12)).state_dict()), tmp_path / 'teacher.pth')
    model = dict(type='DetectionDistiller', student=retinanet(), inherit=('bbox_head', ),
                 teacher=dict(config=retinanet(neck=12), checkpoint=str(tmp_path / 'teacher.pth')),
                 distill=dict(fgd=dict(type='FGD', weight=dict(type='Stop', value=1.0, epochs=1))))
    log = run_on_two_ranks(model, run_config, run_ranks, tmp_path)
    assert log.count('Pre-flight: teacher') == 1 and log.count('Where the weights came from') == 1
    saved = torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=True)
    assert list(saved['state_dict']) == list(MODELS.build(retinanet()).state_dict()) and saved['distill']['terms']


def test_learners_apart_and_their_fusion_in_a_whole_run_on_two_ranks(retinanet, run_config, run_ranks, tmp_path):
    """All parameters of all learners get gradients in one set of buckets; each, the fusion too, is evaluated."""
    model = dict(type='DetectionDistiller', student=retinanet(), peers=[retinanet(neck=12)],
                 teacher=dict(type='Fusion', of=(0, 1)),
                 distill={f'kd_{learner}': dict(type='DenseClassification', learner=learner) for learner in (0, 1)})
    log = run_on_two_ranks(model, run_config, run_ranks, tmp_path)
    for owner in ('', 'peer1/', 'peer2/'):
        assert f' {owner}coco/bbox_mAP: ' in log
    saved = torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=True)
    assert list(saved['state_dict']) == list(MODELS.build(retinanet()).state_dict())
    assert len(saved['distill']['peers']) == 2


def test_what_is_beside_the_student_is_the_same_on_both_ranks(retinanet, run_config, run_ranks, tmp_path):
    """Peers, random teachers and backbones, with a seed of each rank's own; the average, whose student's statistics are
    those of the rank's images."""
    backbone = dict(config=retinanet(width=8).backbone, mean=[0.0] * 3, std=[255.0] * 3)
    guides = [dict(config=retinanet(neck=12), random_teacher=True), dict(type='Peer', learner=0),
              dict(type='Backbone', random_teacher=True, **backbone), dict(type='Average', momentum=0.5)]
    model = dict(type='DetectionDistiller', student=retinanet(), peers=[retinanet(neck=12)], teacher=guides,
                 distill=dict(frozen=dict(type='PKD'), mutual=dict(type='DenseClassification', learner=1, teacher=1),
                              maps=dict(type='PKD', levels=2, teacher=2), own=dict(type='PKD', teacher=3)))
    config = run_config(model, epochs=1, custom_imports=dict(imports=['kd_det']),
                        randomness=dict(seed=0, diff_rank_seed=True))
    config.train_dataloader.batch_size = 2
    config.dump(tmp_path / 'config.py')
    run_ranks(STATES_RANK, tmp_path / 'config.py', tmp_path / 'states.pt')
    first, second = torch.load(tmp_path / 'states.pt', weights_only=True)
    assert len(first['guides']) == 3 and len(first['peers']) == 1
    for kind in ('guides', 'peers'):
        for own, other in zip(first[kind], second[kind]):
            for name, value in own.items():  # a peer's statistics are each rank's own, as a student's
                assert kind == 'peers' and 'running_' in name or torch.equal(value, other[name]), (kind, name)
