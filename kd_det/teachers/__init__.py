"""The frozen teacher: strict loading, the input bridge, its taps."""
from kd_det.config.detectors import TeacherError, read_model_config
from kd_det.teachers.bridge import InputBridge
from kd_det.teachers.detections import Detections, insert_detections
from kd_det.teachers.loading import explain_model_errors, load_strictly
from kd_det.teachers.probe import probe_config, probe_levels, probe_towers
from kd_det.teachers.teacher import Teacher, check_teacher_arguments

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['Teacher', 'TeacherError']
