"""The distillation terms."""
from kd_det.losses.attention_imitation import AttentionImitation
from kd_det.losses.base import DistillTerm, FeatureTerm
from kd_det.losses.feature_imitation import FeatureImitation
from kd_det.losses.fgd import FGD
from kd_det.losses.global_relation import GlobalRelation

__all__ = ['AttentionImitation', 'DistillTerm', 'FGD', 'FeatureImitation', 'FeatureTerm', 'GlobalRelation']
