"""CWD between RTMDets as MMYOLO trains them: what the neck's last convolutions put out, before their normalisation.

Channels that a normalisation and an activation still follow have any scale and offset, so both sides are normalised
first. Each level weighs 1, beside the task's whole schedule of 300 epochs; for the last 20, with plain augmentation, the
student is on its own. Any RTMDet serves, as does another detector whose neck has such convolutions.
"""
cwd_rtmdet = dict(
    cwd_8=dict(
        type='mmdet.CWD', tap='neck.out_convs.0.conv', normalize=True, temperature=1.0,
        weight=dict(type='mmdet.Stop', value=1.0, epochs=280)),
    cwd_16=dict(
        type='mmdet.CWD', tap='neck.out_convs.1.conv', normalize=True, temperature=1.0,
        weight=dict(type='mmdet.Stop', value=1.0, epochs=280)),
    cwd_32=dict(
        type='mmdet.CWD', tap='neck.out_convs.2.conv', normalize=True, temperature=1.0,
        weight=dict(type='mmdet.Stop', value=1.0, epochs=280)))
