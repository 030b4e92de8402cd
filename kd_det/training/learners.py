"""What several learners ask of a run: gradients clipped apart, averages, evaluation, and their place in checkpoints."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner, autocast
from mmengine.runner.checkpoint import weights_to_cpu
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.learners import group_parameters, list_predictors

# In a checkpoint's 'distill'; the second beside averaged ones.
PEERS, TRAINED_PEERS, AVERAGED_GUIDES = 'peers', 'trained_peers', 'averaged_guides'


def clip_by_learner(runner: Runner, distiller: DetectionDistiller) -> None:
    """Lets the optimizer clip the gradients of each learner and its terms by their own norm.

    Together, a large gradient of one would shorten the step of all others. Learners that share a trunk are one network,
    and are clipped as one.

    Args:
        runner: The run; its optimizer's clipping is exchanged.
        distiller: The model.
    """
    owners = {id(parameter): index for index, group in
              enumerate(group_parameters(distiller.learners, distiller.shares_trunk)) for parameter in group}
    wrapper = runner.optim_wrapper
    for each in wrapper.optim_wrappers.values() if isinstance(wrapper, OptimWrapperDict) else (wrapper, ):
        if getattr(each, 'clip_grad_kwargs', None):
            each.clip_func = _make_clipping(each.clip_func, owners)


def _make_clipping(clip: Callable[..., Any], owners: Mapping[int, int]) -> Callable[..., Any]:

    def clip_apart(parameters: Sequence[nn.Parameter], **options: Any) -> Tensor | None:
        """Returns the norm of the student's gradient, for the log."""
        groups: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(owners.get(id(parameter), 0), []).append(parameter)
        norms = {index: clip(group, **options) for index, group in sorted(groups.items())}
        return norms.get(0)

    return clip_apart


def list_averages(runner: Runner) -> list[EMAHook]:
    """Lists the hooks that keep a moving average of the model."""
    return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]


@torch.no_grad()
def average_peers(runner: Runner, distiller: DetectionDistiller) -> None:
    """Averages what learns beside the student as an ``EMAHook`` averages the student; called before it does.

    It reads weights by the model's state dict, which has none of a peer or gate; without that it copies nothing of them
    before it begins.
    """
    for hook in list_averages(runner):
        average, begun = hook.ema_model, hook._ema_started(runner)
        if begun and not average.update_buffers:
            continue  # it goes by parameters, and finds theirs
        if begun and average.steps and average.steps % average.interval:
            continue
        for own, averaged in zip(_list_apart(distiller), _list_apart(average.module)):
            for source, target in zip(own.state_dict().values(), averaged.state_dict().values()):
                if not begun or not average.steps:
                    target.copy_(source)
                elif target.is_floating_point():
                    average.avg_func(target, source, average.steps)


def _list_apart(distiller: DetectionDistiller) -> list[nn.Module]:
    """Lists what learns beside the student and its terms: peers, and gates."""
    return [*distiller.peers, *distiller.learning_guides.values()]


def save_peers(runner: Runner, distiller: DetectionDistiller) -> dict[str, Any]:
    """What a checkpoint holds of peers: of each its state dict, the averaged one where there is an average.

    And of gates the averaged ones; those that are trained are among the guides' states.
    """
    own = [weights_to_cpu(peer.state_dict()) for peer in distiller.peers]
    averages = [hook.ema_model.module for hook in list_averages(runner)][:1]
    found: dict[str, Any] = {PEERS: own} if own else {}
    for average in averages:
        if own:
            found.update({PEERS: [weights_to_cpu(peer.state_dict()) for peer in average.peers], TRAINED_PEERS: own})
        if average.learning_guides:
            found[AVERAGED_GUIDES] = {index: weights_to_cpu(module.state_dict())
                                      for index, module in average.learning_guides.items()}
    return found


def load_peers(runner: Runner, distiller: DetectionDistiller, state: Mapping[str, Any]) -> None:
    """Goes on from what :func:`save_peers` gave."""
    for peer, weights in zip(distiller.peers, state.get(TRAINED_PEERS, state.get(PEERS, ()))):
        peer.load_state_dict(weights)
    for hook in list_averages(runner):
        for peer, weights in zip(hook.ema_model.module.peers, state.get(PEERS, ())):
            peer.load_state_dict(weights)
        for index, weights in state.get(AVERAGED_GUIDES, {}).items():
            hook.ema_model.module.learning_guides[index].load_state_dict(weights)


def follow_student(distiller: DetectionDistiller) -> None:
    """Passes on to the peers what hooks of MMDetection have set in the student: YOLOX's loss of its last epochs."""
    for peer in distiller.peers:
        own, others = (getattr(each, 'bbox_head', None) for each in (distiller.student, peer))
        if hasattr(own, 'use_l1') and hasattr(others, 'use_l1'):
            others.use_l1 = own.use_l1


def evaluate_others(runner: Runner, distiller: DetectionDistiller) -> dict[str, float]:
    """Evaluates the learners beside the student, and the ensembles, on the validation data, as the student was.

    Returns:
        Their metrics, with ``peer1/`` or ``ensemble/`` before the names.
    """
    loop, metrics = runner.val_loop, {}
    for prefix, predict in list_predictors(distiller.learners, distiller.teachers or ()).items():
        runner.logger.info(f"Validation of {prefix.rstrip('/')}:")
        with distiller.predicting_as(predict), torch.no_grad(), autocast(enabled=loop.fp16), \
                preserved_randomness():  # a loader draws, where the student's training goes on
            for batch in loop.dataloader:
                loop.evaluator.process(data_samples=runner.model.val_step(batch), data_batch=batch)
        found = loop.evaluator.evaluate(len(loop.dataloader.dataset))
        metrics.update({f'{prefix}{name}': value for name, value in found.items()})
    for name, value in metrics.items():
        runner.message_hub.update_scalar(f'val/{name}', value)
    return metrics
