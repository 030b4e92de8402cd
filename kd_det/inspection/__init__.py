"""A look into one step of a distillation: what is read, what each term says, how it pulls, and where it looks."""
from kd_det.inspection.batch import first_training_batch, image_batch
from kd_det.inspection.pictures import draw_step, mask_looks
from kd_det.inspection.step import InspectedStep, compared_levels, inspect_step
from kd_det.inspection.tables import tap_table, term_table

__all__ = ['InspectedStep', 'compared_levels', 'draw_step', 'first_training_batch', 'image_batch', 'inspect_step',
           'mask_looks', 'tap_table', 'term_table']
