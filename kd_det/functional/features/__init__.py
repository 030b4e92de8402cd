"""What to compare in features: losses between the (N, C, H, W) maps of student and teacher.

The teacher and every mask are taken as constants: no gradient flows into them. Results are finite for images without
boxes, maps of one cell, and images that are all padding, and exactly 0 when the student equals the teacher.
"""
from kd_det.functional.features.attention_guided import fkd_loss
from kd_det.functional.features.channels import channel_wise_kl, pearson_distance
from kd_det.functional.features.focal_global import attention_distance, context_pool, fgd_loss, relation_distance
from kd_det.functional.features.imitation import decoupled_imitation, generation_distance, masked_imitation, unit

__all__ = [
    'attention_distance', 'channel_wise_kl', 'context_pool', 'decoupled_imitation', 'fgd_loss', 'fkd_loss',
    'generation_distance', 'masked_imitation', 'pearson_distance', 'relation_distance', 'unit'
]
