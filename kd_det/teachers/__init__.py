"""What students learn from: frozen teachers, strictly loaded and run through the input bridge, and other guides."""
from kd_det.config.detectors import TeacherError, read_model_config
from kd_det.teachers import backbone, ensemble, external, peers  # they register their kinds
from kd_det.teachers.bridge import InputBridge
from kd_det.teachers.detections import Detections, insert_detections
from kd_det.teachers.guide import Guide
from kd_det.teachers.loading import explain_model_errors, load_strictly
from kd_det.teachers.probe import probe_config, probe_heads, probe_levels
from kd_det.teachers.teacher import Teacher

# ruff: noqa: F401  what is imported beside these is for other rooms, not public
__all__ = ['Guide', 'Teacher', 'TeacherError']
