"""Born-Again: each generation once, whatever happens; what they find alone and together."""
import json
import shutil
from functools import partial
from typing import get_args

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

from kd_det.checks.environment import DiagnosisError
from kd_det.cli.main import main
from kd_det.compat.writing import WritingError
from kd_det.config import ConfigurationError
from kd_det.config.choices import TREATMENTS
from kd_det.study import generations as module
from kd_det.study.generations import Generations, generations, measure_boxes, unite

WITHOUT_PREFLIGHT = {'default_hooks.distill.preflight': None}


@pytest.fixture
def student(run_config, retinanet, tmp_path):
    """A student's config file."""
    config = run_config(retinanet(), val=True, epochs=1)
    del config.default_hooks['distill']
    for key in ('work_dir', 'experiment_name', 'visualizer'):
        config.pop(key)
    config.dump(tmp_path / 'student.py')
    return tmp_path / 'student.py'


@pytest.fixture
def born_again(student, tmp_path):
    """Calls the function in a folder of its own; all that was done is logged."""
    log: list[str] = []
    made = partial(generations, student, work_dir=tmp_path / 'out', epochs=1, log=log.append,
                   options={**WITHOUT_PREFLIGHT, 'optim_wrapper.optimizer.lr': 0.02}, treatment='cwtm', seed=5)
    made.log = log
    return made


def test_each_generation_learns_from_the_one_before_and_is_made_once(born_again, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        trainings = []

        def stop(*args, **kwargs):
            trainings.append(kwargs)
            raise RuntimeError('stopped')

        patched.setattr(module, 'distill', stop)
        with pytest.raises(RuntimeError, match='stopped'):
            born_again(generations=2)
    assert born_again.log == ['generation_0 …', 'generation_0: evaluation …', 'generation_1 …']
    born_again.log.clear()
    result = born_again(generations=2)
    assert born_again.log == ['generation_1 …', 'generation_1: evaluation …', 'generation_2 …',
                              'generation_2: evaluation …']
    assert isinstance(result, Generations) and len(result.members) == 3
    out, weights = tmp_path / 'out', []
    for number, member in enumerate(result.members):
        config = Config.fromfile(next((out / f'generation_{number}').glob('*.py')))
        assert config.randomness.seed == 5 + number and config.optim_wrapper.optimizer.lr == 0.02
        weights.append(torch.load(member.checkpoint, weights_only=False)['state_dict'])
        assert not any('teacher' in key or 'terms' in key for key in weights[-1])
        assert set(member.metrics) == set(member.ensemble) >= {'coco/bbox_mAP', 'coco/bbox_mAP_50'}
        if number:
            before = result.members[number - 1]
            assert config.model.teacher == dict(config=str(out / 'generation.py'), checkpoint=str(before.checkpoint))
            assert config.model.distill.kd.treatment == 'cwtm'
            assert config.model.inherit == () and config.model.task_weight == 1.0
    assert all(key not in weights[0] or not torch.equal(weights[0][key], weights[1][key])
               for key in ('bbox_head.retina_cls.weight', 'backbone.conv1.weight'))
    json.dumps(result.to_dict())
    rows = result.tabulate().rows
    assert [row[0] for row in rows] == ['0', '1', '2'] and rows[0][3:] == ('', ) * 4 and rows[2][4] == '0 to 2'
    assert '<table>' in result._repr_html_()
    born_again.log.clear()
    assert born_again(generations=1).members == result.members[:2] and not born_again.log
    assert born_again(generations=2) == result and not born_again.log
    for other in (dict(treatment='none'), dict(seed=6), dict(task_weight=0.5),
                  dict(checkpoint=result.members[1].checkpoint), dict(options=WITHOUT_PREFLIGHT)):
        with pytest.raises(WritingError, match='holds generations of other settings'):
            born_again(**other)
    # What was evaluated and is lost, is evaluated again, to the same numbers.
    shutil.rmtree(out / 'generation_1')
    (out / 'generation_2' / 'found.npz').unlink()
    with monkeypatch.context() as patched:
        patched.setattr(module, 'distill', lambda *args, **kwargs: pytest.fail('it is trained again'))
        (out / 'generation_1').mkdir()
        torch.save(dict(state_dict=weights[1]), result.members[1].checkpoint)
        shutil.copy(out / 'generation.py', out / 'generation_1' / 'student_kd.py')
        assert born_again(generations=2) == result


def test_a_training_that_was_ended_goes_on(born_again, tmp_path, monkeypatch):
    given = []

    def train(config, **arguments):
        given.append(arguments['resume'])
        arguments['work_dir'].mkdir(exist_ok=True)
        (arguments['work_dir'] / 'last_checkpoint').write_text('epoch_1.pth')
        raise RuntimeError('killed')

    monkeypatch.setattr(module, 'train', train)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='killed'):
            born_again()
    assert given == [False, True]
    with pytest.raises(WritingError, match='other settings'):  # it does not go on with what was begun otherwise
        born_again(seed=6)


def test_what_can_not_serve_is_refused_before_anything_trains(born_again, retinanet, run_config, tmp_path, monkeypatch):
    for kind in ('train', 'distill'):
        monkeypatch.setattr(module, kind, lambda *args, **kwargs: pytest.fail('it trains'))
    with pytest.raises(ConfigurationError, match="treatment: 'cwtm' is .* the method 'pkd' has no term that compares"):
        born_again(method='pkd')
    with pytest.raises(ConfigurationError, match="There is no method 'kdd'"):
        born_again(method='kdd')
    with pytest.raises(ConfigurationError, match="The method 'dkd' has no weights for one_stage detectors"):
        born_again(method='dkd')
    with pytest.raises(DiagnosisError, match=r"model\.distill\.kd\.beta: expected .*, got 0\.5"):
        born_again(options={'model.distill.kd.beta': 0.5})
    two = run_config(retinanet(classes=2), val=True)  # what was refused above keeps no other settings out
    for loader in (two.train_dataloader, two.val_dataloader):
        loader.dataset.metainfo = dict(classes=('blue', 'green'))
    with pytest.raises(ConfigurationError, match="treatment='dkpp' lets .* of which 2 have too few"):
        generations(two, work_dir=tmp_path / 'out', treatment='dkpp')
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        two.pop(key)
    with pytest.raises(ConfigurationError, match='has no val_dataloader: generations are measured on'):
        generations(two, work_dir=tmp_path / 'two')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'generation.py').write_text('mine = 1')
    for _ in range(2):
        with pytest.raises(WritingError, match=r"generation.py' exists, and is not the config of these generations"):
            born_again(work_dir=tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'generation.py').read_text() == 'mine = 1'


def test_dkpp_is_refused_for_what_looks_at_one_class(faster_rcnn, run_config, tmp_path):
    config = run_config(faster_rcnn(), val=True)
    with pytest.raises(ConfigurationError, match=r"^model\.distill\.dkd\.treatment: 'dkpp' goes with form='plain'"):
        generations(config, method='dkd', treatment='dkpp', work_dir=tmp_path / 'out')


# ---------------------------------------------------------------- boxes of several


def boxes(*rows) -> InstanceData:
    """Of rows x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return InstanceData(bboxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def loop_fusion(members: list[InstanceData]) -> list[tuple]:
    """Weighted boxes fusion as its paper writes it: boxes by score join the cluster whose box overlaps most."""

    def overlap(a, b):
        sides = [min(a[2 + axis], b[2 + axis]) - max(a[axis], b[axis]) for axis in (0, 1)]
        common = max(sides[0], 0) * max(sides[1], 0)
        return common / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common)

    def mean(cluster):
        total = sum(score for _, score in cluster)
        return [sum(score * box[side] for box, score in cluster) / total for side in range(4)]

    rows = [(box, score, label) for each in members
            for box, score, label in zip(each.bboxes.tolist(), each.scores.tolist(), each.labels.tolist())]
    clusters: list[tuple[int, list]] = []
    for box, score, label in sorted(rows, key=lambda row: -row[1]):
        near = [(overlap(mean(cluster), box), cluster) for of, cluster in clusters if of == label]
        best = max(near, key=lambda each: each[0], default=(0, None))
        if best[0] > 0.55:
            best[1].append((box, score))
        else:
            clusters.append((label, [(box, score)]))
    fused = [(mean(cluster), sum(score for _, score in cluster) / len(cluster) * min(len(cluster), len(members))
              / len(members), label) for label, cluster in clusters]
    return sorted(fused, key=lambda row: -row[1])


def test_united_boxes_equal_the_loop():
    random = torch.Generator().manual_seed(0)
    members = []
    for _ in range(3):
        corners = 40 * torch.rand(30, 2, generator=random)
        sides = 10 + 20 * torch.rand(30, 2, generator=random)
        members.append(InstanceData(bboxes=torch.cat([corners, corners + sides], 1),
                                    scores=torch.rand(30, generator=random),
                                    labels=torch.randint(3, (30, ), generator=random)))
    found, expected = unite(members), loop_fusion(members)
    assert len(found) == len(expected) < 80
    torch.testing.assert_close(found.bboxes, torch.tensor([box for box, *_ in expected]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score, _ in expected]))
    assert found.labels.tolist() == [label for *_, label in expected]


def test_boxes_that_fusion_can_not_read_are_left_out(recwarn):
    flat, fine = (4, 4, 4, 9, 0.9, 0), (0, 0, 9, 9, 0.5, 1)
    assert unite([boxes(flat), boxes(fine, (0, 0, 9, 9, 0.0, 1))]).scores.tolist() == [0.25]
    nothing = unite([boxes(), boxes(flat)])
    assert nothing.bboxes.shape == (0, 4) and len(nothing.labels) == 0 and not recwarn


def test_boxes_are_measured_against_the_ground_truth_of_the_data():
    class Data:
        metainfo = dict(classes=('blue', 'green'))

        def get_data_info(self, index):
            return dict(height=64, width=64, instances=[
                dict(bbox=[4, 4, 24, 24], bbox_label=0, ignore_flag=0),
                dict(bbox=[30, 30, 60, 60], bbox_label=1, ignore_flag=1)])

        def __len__(self):
            return 2

    right, wrong = (4, 4, 24, 24, 0.9, 0), (30, 4, 50, 24, 0.5, 0)
    assert measure_boxes([boxes(right), boxes(right)], Data())['coco/bbox_mAP'] == 1
    assert measure_boxes([boxes(right), boxes(wrong)], Data())['coco/bbox_mAP'] == pytest.approx(51 / 101, abs=1e-3)
    assert measure_boxes([boxes(), boxes()], Data())['coco/bbox_mAP'] == 0


def test_the_command(monkeypatch, capsys, tmp_path):
    """It calls the function with what its options say, prints its table and writes it."""
    given = {}
    assert get_args(module.Treatment) == TREATMENTS
    metrics = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.75}
    member = module.Generation('generation_0', tmp_path / 'a.pth', metrics, metrics)

    def remember(student, **arguments):
        given.update(arguments, student=student)
        return Generations(tmp_path, tmp_path / 'generation.py', 'kd', 'dkpp', (member, ))

    monkeypatch.setattr(module, 'generations', remember)
    file = tmp_path / 'folder' / 'result.json'
    command = ['generations', 'student.py', '--generations', '2', '--method', 'bckd', '--treatment', 'dkpp',
               '--task-weight', '0.1', '--work-dir', 'out', '--json', str(file)]
    assert main(command) == 0
    keys = ('student', 'generations', 'method', 'treatment', 'task_weight', 'inherit', 'seed')
    assert [given[key] for key in keys] == ['student.py', 2, 'bckd', 'dkpp', 0.1, (), 0]
    assert 'Generations' in capsys.readouterr().out
    assert json.loads(file.read_text())['members'][0]['metrics']['coco/bbox_mAP'] == 0.5
    assert main(command) == 0  # its own file is replaced, another is not
    file.write_text('mine')
    assert main(command) == 2
    assert "is not the result of generations that kd_det wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['generations', 'student.py', '--treatment', 'none', '--generations', '0'])
