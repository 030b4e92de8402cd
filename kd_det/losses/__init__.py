"""The distillation terms."""
from kd_det.losses.base import DistillTerm, FeatureTerm
from kd_det.losses.batch_relations import DIST, RKD
from kd_det.losses.crosskd import CrossKD
from kd_det.losses.cwd import CWD
from kd_det.losses.dense import DenseClassification, DenseRegression
from kd_det.losses.fgd import FGD, GlobalRelation
from kd_det.losses.fkd import FKD
from kd_det.losses.fsp import FSP
from kd_det.losses.imitation import AttentionImitation, DecoupledImitation, FeatureImitation
from kd_det.losses.mgd import MGD
from kd_det.losses.outputs import DenseTerm, RoITerm
from kd_det.losses.pkd import PKD
from kd_det.losses.queries import QueryClassification, QueryRegression, QueryTerm
from kd_det.losses.rank_mimicking import RankMimicking
from kd_det.losses.roi import RoIClassification, RoIRegression, RPNImitation

__all__ = ['AttentionImitation', 'CWD', 'CrossKD', 'DIST', 'DecoupledImitation', 'DenseClassification',
           'DenseRegression', 'DenseTerm', 'DistillTerm', 'FGD', 'FKD', 'FSP', 'FeatureImitation', 'FeatureTerm',
           'GlobalRelation', 'MGD', 'PKD', 'QueryClassification', 'QueryRegression', 'QueryTerm', 'RKD', 'RPNImitation',
           'RankMimicking', 'RoIClassification', 'RoIRegression', 'RoITerm']
