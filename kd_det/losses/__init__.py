"""The distillation terms."""
from kd_det.losses.attention_imitation import AttentionImitation
from kd_det.losses.base import DistillTerm, FeatureTerm
from kd_det.losses.crosskd import CrossKD
from kd_det.losses.cwd import CWD
from kd_det.losses.decoupled_imitation import DecoupledImitation
from kd_det.losses.dense_classification import DenseClassification
from kd_det.losses.dense_regression import DenseRegression
from kd_det.losses.dist import DIST
from kd_det.losses.feature_imitation import FeatureImitation
from kd_det.losses.fgd import FGD
from kd_det.losses.fkd import FKD
from kd_det.losses.fsp import FSP
from kd_det.losses.global_relation import GlobalRelation
from kd_det.losses.mgd import MGD
from kd_det.losses.outputs import DenseTerm, RoITerm
from kd_det.losses.pkd import PKD
from kd_det.losses.queries import QueryTerm
from kd_det.losses.query_classification import QueryClassification
from kd_det.losses.query_regression import QueryRegression
from kd_det.losses.rank_mimicking import RankMimicking
from kd_det.losses.rkd import RKD
from kd_det.losses.roi_classification import RoIClassification
from kd_det.losses.roi_regression import RoIRegression
from kd_det.losses.rpn_imitation import RPNImitation

__all__ = ['AttentionImitation', 'CWD', 'CrossKD', 'DIST', 'DecoupledImitation', 'DenseClassification',
           'DenseRegression', 'DenseTerm', 'DistillTerm', 'FGD', 'FKD', 'FSP', 'FeatureImitation', 'FeatureTerm',
           'GlobalRelation', 'MGD', 'PKD', 'QueryClassification', 'QueryRegression', 'QueryTerm', 'RKD', 'RPNImitation',
           'RankMimicking', 'RoIClassification', 'RoIRegression', 'RoITerm']
