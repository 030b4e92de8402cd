"""The mathematics of detector distillation: pure functions on tensors, torch only."""
