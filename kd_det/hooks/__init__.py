"""Hooks of mmengine's Runner."""
from kd_det.hooks.distill_hook import DistillHook

__all__ = ['DistillHook']
