"""The demo's data and schedule for DETRs: batches half as large, their gradients clipped as DINO's, fewer epochs."""
_base_ = ['./shapes_detection.py', './schedule.py']
max_epochs = 5
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=1e-4), clip_grad=dict(max_norm=0.1))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, T_max=max_epochs, convert_to_iter_based=True),
]
