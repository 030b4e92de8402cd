"""Hooks of mmengine's Runner."""
from kd_det.hooks.distill_hook import DistillHook
from kd_det.hooks.fidelity_hook import FidelityHook

__all__ = ['DistillHook', 'FidelityHook']
