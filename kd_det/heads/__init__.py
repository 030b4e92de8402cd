"""The outputs of heads, in one form per family of heads."""
from kd_det.heads import families  # registers their readers
from kd_det.heads.capture import StudentHeads, StudentOutputs, TeacherForward, TeacherOutputs, find_head, run_heads
from kd_det.heads.decoders import QueryDecoder
from kd_det.heads.dense import DenseOutputs
from kd_det.heads.queries import QueryOutputs, read_queries
from kd_det.heads.readers import DenseReader, check_head, check_sampling, read_dense, reads, reads_like
from kd_det.heads.request import ROI_HEAD, HeadError, HeadRequest
from kd_det.heads.roi import Regions, RoIOutputs
from kd_det.heads.towers import TeacherTowers, TowerFeatures

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['DenseOutputs', 'HeadError', 'HeadRequest', 'QueryOutputs', 'RoIOutputs', 'reads_like']
