"""Folds batch normalisation into the convolution before it, which changes nothing but the last bits of a result."""
from __future__ import annotations

from mmcv.cnn import ConvModule
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

PLAIN_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)  # MMEngine derives from them


def fold_batch_norms(model: nn.Module) -> None:
    """Folds each batch normalisation whose convolution stands just before it in the same module.

    Left as they are: modules with hooks, for a tap reads what they put out; kinds of convolution and normalisation that
    compute something else; convolutions after their normalisation. A convolution that several modules share, as
    those of RTMDet's head, is folded for each of them apart.

    Args:
        model: A model in evaluation mode; changed.
    """
    for module in list(model.modules()):
        children = list(module._modules.items())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:]):
            if _folds(module, conv, norm):
                fused = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
                module._modules.update({conv_name: fused, norm_name: nn.Identity().eval()})
                module.efficient_conv_bn_eval_forward = None  # by which a ConvModule folds in each forward anew


def _folds(parent: nn.Module, conv: nn.Module, norm: nn.Module) -> bool:
    if type(conv) is not nn.Conv2d or type(norm).forward not in PLAIN_NORMS:
        return False
    if norm.running_mean is None or norm.num_features != conv.out_channels:
        return False
    if isinstance(parent, ConvModule) and parent.order.index('norm') != parent.order.index('conv') + 1:
        return False
    return not any((module._forward_hooks or module._forward_pre_hooks) for module in (conv, norm))
