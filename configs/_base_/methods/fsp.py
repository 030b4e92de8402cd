"""FSP: correlation between the channels of consecutive stages.

The paper distils classifiers; for detectors no weight is published. So it is the mean over the entries of the flow
matrices, which depends neither on the channels nor on the image. For the paper's sum: normalizer='batch'.
"""
__about__ = dict(
    paper='Yim et al., CVPR 2017',
    idea='correlation between the channels of consecutive stages',
    reads=['backbone'],
    serves=['RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3', 'Faster R-CNN', 'Cascade R-CNN',
            'Mask R-CNN', 'Deformable DETR', 'DINO'])
fsp = dict(fsp=dict(type='mmdet.FSP', tap='backbone', normalizer='mean', weight=1.0))
