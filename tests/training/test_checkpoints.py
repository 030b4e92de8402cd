"""What lies in a checkpoint of a distillation, to the last key, as docs/methods.md says."""
import torch
from mmdet.registry import MODELS

TERMS = dict(fgd=dict(type='FGD', alpha=1e-2, weight=dict(type='Balance', ratio=0.5)),
             mgd=dict(type='MGD', weight=1e-3),
             logits=dict(type='DenseClassification'))  # without parameters
MEASURED = {'averages', 'spread', 'boxes', 'empty', 'counts', 'steps', 'spacing'}


def test_a_checkpoint_holds_the_plain_student_and_beside_it_what_a_resumed_run_needs(retinanet, make_runner):
    model = dict(type='DetectionDistiller', student=retinanet(), distill=TERMS,
                 teacher=dict(config=retinanet(neck=12), random_teacher=True))
    runner = make_runner(model, epochs=1)
    runner.train()
    checkpoint = torch.load(f'{runner.work_dir}/epoch_1.pth', weights_only=True)
    assert set(checkpoint) == {'meta', 'state_dict', 'message_hub', 'optimizer', 'param_schedulers', 'distill'}

    plain = MODELS.build(retinanet())
    assert list(checkpoint['state_dict']) == list(plain.state_dict())
    plain.load_state_dict(checkpoint['state_dict'], strict=True)

    assert set(checkpoint['distill']) == {'terms', 'weights'}
    terms = checkpoint['distill']['terms']
    assert {key.split('.')[0] for key in terms} == {'fgd', 'mgd'}
    assert terms.keys() == runner.model.terms.state_dict().keys()
    assert all(torch.equal(value, runner.model.terms.state_dict()[key]) for key, value in terms.items())
    checked = {'remaining', 'sums'}  # of terms that are not balanced
    assert {name: set(state) for name, state in checkpoint['distill']['weights'].items()} == dict(
        fgd=MEASURED, logits=checked, mgd=checked)

    learning = [*plain.parameters(), *runner.model.terms.parameters()]
    assert sum(len(group['params']) for group in checkpoint['optimizer']['param_groups']) == len(learning)
    assert set(checkpoint['message_hub']) == {'log_scalars', 'runtime_info', 'resumed_keys'}
    assert checkpoint['meta'].keys() >= {'cfg', 'dataset_meta', 'epoch', 'iter', 'seed'}
    assert checkpoint['meta']['dataset_meta']['classes'] == ('blue', 'green', 'red')


def test_of_an_averaged_student_the_average_is_its_state_dict_and_the_trained_one_lies_beside_it(
        retinanet, make_runner):
    model = dict(type='DetectionDistiller', student=retinanet(), distill=TERMS,
                 teacher=dict(config=retinanet(neck=12), random_teacher=True))
    runner = make_runner(model, epochs=1, custom_hooks=[dict(type='EMAHook', momentum=0.3)])
    runner.train()
    checkpoint = torch.load(f'{runner.work_dir}/epoch_1.pth', weights_only=True)
    trained = runner.model.state_dict()
    assert set(checkpoint['state_dict']) == set(trained)
    assert set(checkpoint['ema_state_dict']) == {'steps', *(f'module.{key}' for key in trained)}
    assert all(torch.equal(checkpoint['ema_state_dict'][f'module.{key}'], value) for key, value in trained.items())
    key = 'bbox_head.retina_cls.weight'
    assert not torch.equal(checkpoint['state_dict'][key], trained[key])
