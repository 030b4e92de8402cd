"""One config of each family of MMDetection, shrunk: loss, gradients and predictions without compiled mmcv."""
import copy
import re
from pathlib import Path
from types import SimpleNamespace

import mmdet
import numpy as np
import pytest
import torch
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample, TrackDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData, PixelData
from torch import nn

from kd_det.teachers.loading import remove_pretrained

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'

# Of each family the config that shows best what is its own, above all the operators; and how it is shrunk: by which
# numbers the channels of the backbone and those of the rest are divided (8 unless said).
RUN = dict(
    albu_example='mask-rcnn_r50_fpn_albu-1x_coco',
    atss='atss_r50_fpn_1x_coco',
    autoassign='autoassign_r50-caffe_fpn_1x_coco',
    boxinst='boxinst_r50_fpn_ms-90k_coco',
    bytetrack='bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval',
    carafe='mask-rcnn_r50_fpn-carafe_1x_coco',
    cascade_rcnn='cascade-mask-rcnn_r50_fpn_1x_coco',
    cascade_rpn='cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco',
    centernet='centernet_r18-dcnv2_8xb16-crop512-140e_coco',
    centripetalnet='centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco',
    cityscapes='mask-rcnn_r50_fpn_1x_cityscapes',
    condinst='condinst_r50_fpn_ms-poly-90k_coco_instance',
    conditional_detr='conditional-detr_r50_8xb2-50e_coco',
    cornernet='cornernet_hourglass104_8xb6-210e-mstest_coco',
    crowddet='crowddet-rcnn_refine_r50_fpn_8xb2-30e_crowdhuman',
    dab_detr='dab-detr_r50_8xb2-50e_coco',
    dcn='faster-rcnn_r50_fpn_dpool_1x_coco',
    dcnv2='faster-rcnn_r50_fpn_mdpool_1x_coco',
    ddod='ddod_r50_fpn_1x_coco',
    ddq='ddq-detr-4scale_r50_8xb2-12e_coco',
    deepfashion='mask-rcnn_r50_fpn_15e_deepfashion',
    deformable_detr='deformable-detr-refine-twostage_r50_16xb2-50e_coco',
    detectors='detectors_htc-r50_1x_coco',
    detr='detr_r50_8xb2-150e_coco',
    dino='dino-4scale_r50_8xb2-12e_coco',
    double_heads='dh-faster-rcnn_r50_fpn_1x_coco',
    dsdl='coco',
    dyhead='atss_r50_fpn_dyhead_1x_coco',
    dynamic_rcnn='dynamic-rcnn_r50_fpn_1x_coco',
    efficientnet='retinanet_effb3_fpn_8xb4-crop896-1x_coco',
    empirical_attention='faster-rcnn_r50-attn1111-dcn_fpn_1x_coco',
    fast_rcnn='fast-rcnn_r50_fpn_1x_coco',
    faster_rcnn='faster-rcnn_r50_fpn_soft-nms_1x_coco',
    fcos='fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco',
    foveabox='fovea_r50_fpn_gn-head-align_4xb4-2x_coco',
    fpg='mask-rcnn_r50_fpg_crop640-50e_coco',
    free_anchor='freeanchor_r50_fpn_1x_coco',
    fsaf='fsaf_r50_fpn_1x_coco',
    gcnet='mask-rcnn_r50-syncbn-gcb-r16-c3-c5_fpn_1x_coco',
    gfl='gfl_r101-dconv-c3-c5_fpn_ms-2x_coco',
    ghm='retinanet_r50_fpn_ghm-1x_coco',
    gn='mask-rcnn_r50_fpn_gn-all_2x_coco',
    grid_rcnn='grid-rcnn_r50_fpn_gn-head_1x_coco',
    grounding_dino='grounding_dino_r50_scratch_8xb2_1x_coco',
    groie='grid-rcnn_r50_fpn_gn-head-groie_1x_coco',
    guided_anchoring='ga-faster-rcnn_r50_fpn_1x_coco',
    hrnet='htc_hrnetv2p-w32_20e_coco',
    htc='htc_r50_fpn_1x_coco',
    instaboost='mask-rcnn_r50_fpn_instaboost-4x_coco',
    lad='lad_r50-paa-r101_fpn_2xb8_coco_1x',
    ld='ld_r18-gflv1-r101_fpn_1x_coco',
    libra_rcnn='libra-faster-rcnn_r50_fpn_1x_coco',
    lvis='mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1',
    mask2former='mask2former_r50_8xb2-lsj-50e_coco-panoptic',
    mask2former_vis='mask2former_r50_8xb2-8e_youtubevis2019',
    mask_rcnn='mask-rcnn_r50_fpn_1x_coco',
    maskformer='maskformer_r50_ms-16xb1-75e_coco',
    masktrack_rcnn='masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019',
    mm_grounding_dino='grounding_dino_swin-t_pretrain_obj365',
    ms_rcnn='ms-rcnn_r50_fpn_1x_coco',
    nas_fcos='nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco',
    nas_fpn='retinanet_r50_nasfpn_crop640-50e_coco',
    objects365='faster-rcnn_r50_fpn_16xb4-1x_objects365v2',
    ocsort='ocsort_yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval',
    openimages='faster-rcnn_r50_fpn_32xb2-1x_openimages',
    paa='paa_r50_fpn_1x_coco',
    pafpn='faster-rcnn_r50_pafpn_1x_coco',
    panoptic_fpn='panoptic-fpn_r50_fpn_1x_coco',
    pascal_voc='retinanet_r50_fpn_1x_voc0712',
    pisa='mask-rcnn_r50_fpn_pisa_1x_coco',
    point_rend='point-rend_r50-caffe_fpn_ms-1x_coco',
    pvt='retinanet_pvtv2-b0_fpn_1x_coco',
    qdtrack='qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval',
    queryinst='queryinst_r50_fpn_1x_coco',
    regnet='mask-rcnn_regnetx-400MF_fpn_ms-poly-3x_coco',
    reppoints='reppoints-moment_r101-dconv-c3-c5_fpn-gn_head-gn_2x_coco',
    res2net='faster-rcnn_res2net-101_fpn_2x_coco',
    resnest='faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco',
    resnet_strikes_back='retinanet_r50-rsb-pre_fpn_1x_coco',
    retinanet='retinanet_r50_fpn_1x_coco',
    rpn='rpn_r50_fpn_1x_coco',
    rtmdet='rtmdet-ins_s_8xb32-300e_coco',
    sabl='sabl-faster-rcnn_r50_fpn_1x_coco',
    scnet='scnet_r50_fpn_1x_coco',
    scratch='faster-rcnn_r50-scratch_fpn_gn-all_6x_coco',
    seesaw_loss='mask-rcnn_r50_fpn_seesaw-loss-normed-mask_random-ms-2x_lvis-v1',
    selfsup_pretrain='mask-rcnn_r50-mocov2-pre_fpn_1x_coco',
    simple_copy_paste='mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-270k_coco',
    soft_teacher='soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco',
    solo='decoupled-solo_r50_fpn_1x_coco',
    solov2='solov2-light_r50-dcn_fpn_ms-3x_coco',
    sort='faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval',
    sparse_rcnn='sparse-rcnn_r50_fpn_1x_coco',
    ssd='ssdlite_mobilenetv2-scratch_8xb24-600e_coco',
    strong_baselines='mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-100e_coco',
    swin='mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
    tood='tood_r101-dconv-c3-c5_fpn_ms-2x_coco',
    tridentnet='tridentnet_r50-caffe_1x_coco',
    v3det='cascade_rcnn_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x',
    vfnet='vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco',
    wider_face='retinanet_r50_fpn_1x_widerface',
    yolact='yolact_r50_1xb8-55e_coco',
    yolo='yolov3_mobilenetv2_8xb24-320-300e_coco',
    yolof='yolof_r50-c5_8xb8-1x_coco',
    yolox='yolox_s_8xb8-300e_coco',
    **{'gn+ws': 'mask-rcnn_r50_fpn_gn-ws-all_2x_coco', 'legacy_1.x': 'mask-rcnn_r50_fpn_1x_coco_v1'})

# Packages that MMDetection wants for one family only; without them it is skipped.
NEEDS = dict(boxinst='skimage', bytetrack='lap', lad='sklearn', ocsort='lap', paa='sklearn')

# What can not run, and why: docs/coco.md says the same.
NOT_RUN = dict(
    common='data and schedules, no model',
    convnext='its backbone is of MMPreTrain',
    deepsort='has no loss of its own; its parts train apart (faster_rcnn, reid)',
    glip='the fusion of its head is built of Transformers and downloads the settings of BERT',
    misc='its detectors are those of Detectron2',
    reid='recognises, and does not detect',
    strongsort='has no loss of its own; its parts train apart (yolox, reid)',
    timm_example='its backbone is of MMPreTrain')


def test_every_family_is_run_or_has_its_reason():
    families = {folder.name for folder in CONFIGS.iterdir() if any(folder.rglob('*.py'))} - {'_base_'}
    assert set(RUN).isdisjoint(NOT_RUN)
    assert set(RUN) | set(NOT_RUN) == families
    for family, config in RUN.items():
        assert (CONFIGS / family / f'{config}.py').exists(), family
    documented = (Path(__file__).parents[2] / 'docs' / 'coco.md').read_text(encoding='utf-8')
    assert [family for family in (*NEEDS, *NOT_RUN) if f'`{family}`' not in documented] == []


# Shrinking a config: which numbers are channels, which are lowered, and to what.
CHANNELS = re.compile(r'(channels?|dims?|filters|planes)$|^num_feats$')
RESNETS = ('ResNet', 'DetectoRS_ResNet', 'TridentResNet', 'Res2Net', 'ResNeSt')
FEWER = dict(num_queries=10, num_proposals=5, nms_pre=50, max_per_img=5, max_per_image=5, score_thr=-1.0, num_classes=3,
             num_things_classes=3, num_stuff_classes=2, num_layers=2, num_blocks=2, num_modules=1, stack_times=2,
             deepen_factor=0.33, feedforward_channels=64, num=32)

# By how much the channels of the backbone and those of the rest are divided, where it is not by 8: some know theirs
# themselves, and group normalisation wants more than one channel a group on a map of one cell.
NORMALISED, OWN_REST, OWN_BACKBONE = (8, 4), (8, 1), (1, 8)
DIVISORS = dict(
    **dict.fromkeys(('atss', 'autoassign', 'boxinst', 'condinst', 'ddod', 'fcos', 'gfl', 'lad', 'ld', 'nas_fcos', 'paa',
                     'tood', 'vfnet'), NORMALISED),
    **dict.fromkeys(('conditional_detr', 'ddq', 'deformable_detr', 'dino', 'grounding_dino', 'mm_grounding_dino'),
                    OWN_REST),
    **dict.fromkeys(('efficientnet', 'pvt', 'regnet'), OWN_BACKBONE),
    **dict.fromkeys(('ssd', 'tridentnet', 'yolo'), (1, 1)))
HOURGLASS = {'backbone.feat_channel': 32, 'backbone.stage_blocks': [1] * 6}
CHANGES = dict(
    boxinst={'mask_head.num_layers': 3},
    centripetalnet=HOURGLASS,
    condinst={'mask_head.num_layers': 3},
    cornernet=HOURGLASS,
    efficientnet={'backbone.arch': 'b0', 'neck.in_channels': [40, 112, 320]},
    fpg={'neck.stack_times': 4, 'neck.paths': ['bu'] * 4},
    grounding_dino={'encoder.num_cp': 0},
    lad=dict(teacher_ckpt=None),
    mm_grounding_dino={'encoder.num_cp': 0},
    pvt={'backbone.init_cfg': None},
    qdtrack={'track_head.embed_head.in_channels': 32, 'track_head.embed_head.conv_out_channels': 32},
    solo={'mask_head.num_grids': [10, 8, 6, 4, 3]},
    solov2={'mask_head.num_grids': [10, 8, 6, 4, 3]},
    tridentnet={'train_cfg.rcnn.sampler.num': 4})
SIZES = dict(detectors=128)


def load_model(family: str) -> ConfigDict:
    """The model of a family's config, without pretrained weights, and with few channels, classes, layers and boxes."""
    divisors = DIVISORS.get(family, (8, 8))
    model = shrink(remove_pretrained(Config.fromfile(CONFIGS / family / f'{RUN[family]}.py').model), *divisors)
    if family == 'ld':
        teacher = Config.fromfile(CONFIGS.parent / model.teacher_config).model
        model.update(teacher_config=dict(model=shrink(remove_pretrained(teacher), *divisors)), teacher_ckpt=None)
    if 'language_model' in model:
        model.language_model = dict(type=Characters)
    config = Config(dict(model=model))
    config.merge_from_dict({f'model.{key}': value for key, value in CHANGES.get(family, {}).items()})
    return config.model


def shrink(part, backbone: int, rest: int, divisor=None):
    """A copy whose channels are divided: those of the backbone, and with it of the neck's inputs, and the rest."""
    divisor = rest if divisor is None else divisor
    if isinstance(part, (list, tuple)):
        return type(part)(shrink(each, backbone, rest, divisor) for each in part)
    if not isinstance(part, dict):
        return part
    small = ConfigDict()
    for key, value in part.items():
        if key == 'batch_augments':
            continue  # they pad to the sizes of the real data
        if key in FEWER and isinstance(value, (int, float)):
            small[key] = min(value, FEWER[key])
        elif CHANNELS.search(key):
            small[key] = divide(value, divisor)
        elif key == 'widen_factor':
            small[key] = value / divisor
        elif key == 'num_groups':
            small[key] = 4
        elif key == 'clip_border':
            small[key] = True  # an untrained head's boxes lie beyond the image, where no mask can be pasted
        else:
            small[key] = shrink(value, backbone, rest, backbone if key.endswith('backbone') else divisor)
    for key in ('neck', 'teacher_neck'):
        if part.get(key):
            before, after = (each[0] if isinstance(each, (list, tuple)) else each for each in (part[key], small[key]))
            if 'in_channels' in before:
                after.in_channels = divide(before.in_channels, backbone)
    if small.get('type') in RESNETS:
        small.base_channels, small.depth = 64 // divisor, min(small.depth, 50)
    if small.get('type') == 'SyncBN':
        small.type = 'BN'  # PyTorch's own trains on GPUs only
    weights = small.get('loss_cls', {}).get('class_weight')
    if isinstance(weights, (list, tuple)):  # one for each class and one for none
        classes = small.get('num_things_classes', small.get('num_classes')) + small.get('num_stuff_classes', 0)
        small.loss_cls.class_weight = [*weights[:classes], weights[-1]]
    return small


class Characters(nn.Module):
    """Stands for BERT, whose weights are a download: a character is a token, and has a vector of its own."""
    max_tokens, pad_to_max = 256, False

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.language_backbone = SimpleNamespace(body=SimpleNamespace(language_dim=16))

    def tokenizer(self, captions, **options) -> SimpleNamespace:
        tokens = torch.tensor([[ord(character) for character in caption] for caption in captions])
        return SimpleNamespace(input_ids=tokens, char_to_token=lambda index: index)

    def forward(self, captions, **options) -> dict:
        tokens = self.tokenizer(captions).input_ids
        count, length = tokens.shape
        return dict(embedded=self.embedding(tokens), masks=torch.ones(count, length, length, dtype=torch.bool),
                    position_ids=torch.arange(length).expand(count, -1), text_token_mask=torch.ones_like(tokens).bool())


def divide(value, divisor: int):
    if isinstance(value, (list, tuple)):
        return type(value)(divide(each, divisor) for each in value)
    return value // divisor if isinstance(value, int) and value >= 32 else value


def make_sample(index: int, size: int, map_size: int = 0, proposals: bool = False) -> DetDataSample:
    """An image's annotation: boxes, masks, identities, a map of classes, and proposals where nothing proposes."""
    shape = (size, size)
    sample = DetDataSample(metainfo=dict(
        img_id=index, img_path=f'{index}.jpg', img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), flip=False,
        flip_direction=None, border=[0, size, 0, size], homography_matrix=np.eye(3, dtype=np.float32), frame_id=index,
        ori_video_length=2, text='blue. green. red', custom_entities=True))
    boxes = torch.tensor([[4., 6., 30., 40.], [20., 16., 60., 56.]])
    masks = np.zeros((2, *shape), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(2, dtype=torch.long),
                                       instances_ids=torch.arange(2), masks=BitmapMasks(masks, *shape))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    columns = torch.arange(map_size or size)
    sample.gt_sem_seg = PixelData(sem_seg=(columns * 3 // len(columns)).expand(1, len(columns), -1))
    if proposals:
        sample.proposals = InstanceData(bboxes=torch.cat([boxes + 2, boxes - 2]))
    return sample


def make_batch(model: ConfigDict, size: int, images: int) -> dict:
    """A batch as the data loader of the model's config gives it."""
    map_size = size // 8 if 'semantic_head' in model.get('roi_head', {}) else size
    samples = [make_sample(index, size, map_size, model.type == 'FastRCNN') for index in range(images)]
    inputs = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in samples]
    preprocessor = model.data_preprocessor
    if preprocessor.type == 'TrackDataPreprocessor' and not (images > 1 and preprocessor.get('use_det_processor')):
        frames = [TrackDataSample(video_data_samples=[sample, copy.deepcopy(sample)] if images > 1 else [sample],
                                  metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1])) for sample in samples]
        return dict(inputs=[torch.stack([image] * len(each)) for image, each in zip(inputs, frames)],
                    data_samples=frames)
    if preprocessor.type == 'MultiBranchDataPreprocessor' and images > 1:
        branches = ('sup', 'unsup_teacher', 'unsup_student')
        return dict(inputs=dict.fromkeys(branches, inputs),
                    data_samples={branch: copy.deepcopy(samples) for branch in branches})
    return dict(inputs=inputs, data_samples=samples)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One block a stage of a ResNet, no line about each weight that is drawn, and one rank."""
    for kind in map(MODELS.get, RESNETS):
        block = kind.arch_settings[50][0]
        monkeypatch.setattr(kind, 'arch_settings', {18: kind.arch_settings.get(18), 50: (block, (1, 1, 1, 1))})
    monkeypatch.setattr('mmengine.model.base_module.update_init_info', lambda *args, **kwargs: None)
    monkeypatch.setattr('mmengine.model.BaseModule._dump_init_info', lambda *args, **kwargs: None)
    monkeypatch.setattr('torch.distributed.get_world_size', lambda group=None: 1)  # MMSyncBN asks


@pytest.fixture(autouse=True)
def first_iteration():
    """What some heads ask mmengine for during a run."""
    hub = MessageHub.get_current_instance()
    for name in ('epoch', 'iter'):
        hub.update_info(name, 0)
    yield
    for name in ('epoch', 'iter'):
        del hub.runtime_info[name]


@pytest.mark.parametrize('family', RUN)
def test_family(family):
    if family in NEEDS:
        pytest.importorskip(NEEDS[family])
    config, size = load_model(family), SIZES.get(family, 64)
    model = MODELS.build(config)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, TridentConv):  # mmdet leaves its weight as the memory was
            nn.init.kaiming_normal_(module.weight)
    model.train()
    losses = model(**model.data_preprocessor(make_batch(config, size, 2), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)

    model.eval()
    with torch.no_grad():
        sample, = model.test_step(make_batch(config, size, 1))
    frame = sample[0] if isinstance(sample, TrackDataSample) else sample
    found = [name for name in frame.keys() if name.startswith('pred_')]
    assert found
    if 'pred_instances' in frame:
        instances = frame.pred_instances
        # The masks of these, untrained, are nowhere above their threshold.
        assert len(instances) > 0 or family in ('mask2former', 'solo', 'solov2')
        assert instances.bboxes.isfinite().all() and instances.scores.isfinite().all()
