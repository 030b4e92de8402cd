"""Token relations: how the cells of an image resemble each other.

The temperature is that of lightly-train, which compares a backbone's last map with that of a frozen DINOv3:
model.teacher=dict(type='Backbone', ...). The ratio is not theirs, who train nothing else.
"""
__about__ = dict(
    paper='after lightly-train',
    idea='how the cells of an image resemble each other',
    reads=['backbone'],
    serves='all')
token_relations = dict(
    token_relations=dict(
        type='mmdet.TokenRelations', tap='backbone', levels=(-1, ), temperature=0.07, tokens=2048,
        weight=dict(type='mmdet.Balance', ratio=0.5)))
