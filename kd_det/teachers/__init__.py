"""What terms learn from: the frozen teacher (strict loading, the input bridge, its taps), and other kinds of guides."""
from kd_det.config.detectors import TeacherError, read_model_config
from kd_det.teachers.backbone import Backbone
from kd_det.teachers.bridge import InputBridge
from kd_det.teachers.external import External
from kd_det.teachers.loading import explain_model_errors, load_strictly
from kd_det.teachers.probe import probe_config, probe_levels, probe_towers
from kd_det.teachers.teacher import Teacher, check_teacher_arguments

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['Backbone', 'External', 'Teacher', 'TeacherError']
