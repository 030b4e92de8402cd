"""The mathematics of detector distillation: pure functions on tensors, which need torch only."""
from kd_det.functional import boxes, features, focal_global, logits, masks, relations

__all__ = ['boxes', 'features', 'focal_global', 'logits', 'masks', 'relations']
