"""A student as a file that leaves kd_det: plain weights, or a graph for onnxruntime, OpenVINO and their like."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from mmcv.image import rescale_size
from mmengine.config import Config
from torch import Tensor, nn

import kd_det
from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Index, Size, declared
from kd_det.config.choices import CHECKPOINTS
from kd_det.config.classes import count_classes
from kd_det.config.files import get_type_name, list_pipelines
from kd_det.config.options import resolve_config
from kd_det.deploy.checking import (
    Comparison,
    build_dataset,
    compare,
    draw_images,
    predict_with,
    predict_with_graph,
    quiet,
)
from kd_det.deploy.checkpoint import ExportedStudent, export_checkpoint, load_student
from kd_det.deploy.graph import DetectorGraph
from kd_det.deploy.integers import quantize_as_trained, store_integers
from kd_det.deploy.joined import ENSEMBLE, extract_learner
from kd_det.deploy.runtime import ONNX, OPENVINO, SECTION, ModelInfo, explained, open_model
from kd_det.heads.queries import predicts_queries
from kd_det.teachers.loading import find_class_names

SUFFIXES = dict(onnx=ONNX, openvino=OPENVINO, pth='.pth')
OPSET = 17  # RoIAlign and GridSample need 16, layer normalisation 17; TensorRT and OpenVINO read it


@dataclass(frozen=True)
class ExportedModel:
    """A file that runs without PyTorch, checked against it.

    Attributes:
        file: The file; of OpenVINO the weights lie beside it.
        info: What it says of itself.
        bytes: Its size, of OpenVINO with the weights.
        comparison: How it agrees with MMDetection's own predictions.
    """
    file: Path
    info: ModelInfo
    bytes: int
    comparison: Comparison

    def tabulate(self) -> TextTable:
        """Makes a table of what it is and how it agrees."""
        size, batch = self.info.size, self.info.batch
        rows = [('detector', self.info.detector), ('file', f'{self.file}, {self.bytes / 2**20:.1f} MiB'),
                ('image', f'{self.info.dtype} {self.info.channels.upper()}, '
                 f"{batch or 'any number'} × {f'{size[0]} × {size[1]}' if size else 'any size'}"),
                *self.comparison.rows()]
        return TextTable('Exported model', ('', ''), rows, words=(0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(asdict(self), file=str(self.file))

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def export(config: str | Path | Config, checkpoint: str | Path, out: str | Path, *,
           format: Literal['onnx', 'openvino', 'pth'] | None = None, size: Size | None = None,
           dynamic: Sequence[Literal['batch', 'size']] = (), dtype: Literal['uint8', 'float32'] = 'uint8',
           channels: Literal['rgb', 'bgr'] = 'rgb', half: bool = False, suppress: bool = True, images: Count = 32,
           data_root: str | None = None, options: dict[str, Any] | None = None, force: bool = False,
           learner: Index | Literal['ensemble'] = 0) -> ExportedStudent | ExportedModel:
    """Writes a student as a file of its own.

    ``.pth`` or ``.pt``: its weights alone, and beside them a config that stock MMDetection reads. ``.onnx`` or ``.xml``
    (OpenVINO): one graph from the image to its boxes, which is run and compared with MMDetection's own predictions
    before the file gets its name.

    Args:
        config: Of the run that wrote the checkpoint: a file, ``'package::folder/file.py'``, or a config.
        checkpoint: A file.
        out: The file to write.
        format: What it is; by default what its name says. Otherwise the name gets the ending of the format, in the
            place of that of another.
        size: Height and width of the image; by default such that every validation image fits as the config's test
            pipeline makes it.
        dynamic: What the graph leaves open: ``'batch'``, ``'size'``.
        dtype: Of the image.
        channels: The order of the image's channels.
        half: Keep weights, and compute, in half precision; what decodes boxes stays in single precision.
        suppress: End with non-maximum suppression.
        images: At most so many validation images are compared; of a config whose data is not here, images of noise.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key.
        force: Replace files of these names that no export wrote.
        learner: Which of the learners of a run with ``model.peers``: 0 is the student, 1 the first peer;
            ``'ensemble'`` for what learners with a common trunk say together, as one detector, ``.pth`` alone.

    Raises:
        ConfigurationError: There is no such learner; or the name of the file ends in none of these; or a setting says
            what a checkpoint has not, or contradicts another; or the checkpoint is not of the student in the config; or
            its detector, or an operator of it, can not be exported; or the file does not agree with the detector.
        NotFiniteError: Its weights are NaN or infinite.
        WritingError: A file of that name exists, and is no export; or it can not be written.
    """
    out, resolved = Path(out), resolve_config(config, data_root, options)
    if format is not None and out.name:  # 'r18_x0.5' has no ending that a format could take the place of
        out = (out.with_suffix('') if out.suffix in (*CHECKPOINTS, ONNX, OPENVINO) else out)
        out = out.with_name(f'{out.name}{SUFFIXES[format]}')
    of_graphs = {'--size': size, '--dynamic': dynamic, '--dtype': dtype != 'uint8', '--channels': channels != 'rgb',
                 '--half': half, '--no-nms': not suppress}
    if any(of_graphs.values()) and out.suffix in CHECKPOINTS:
        given = ', '.join(name for name, value in of_graphs.items() if value)
        raise ConfigurationError(f"'{out}' is a checkpoint, the weights as they are: {given} would change a graph "
                                 f'alone, {ONNX} or {OPENVINO}.')
    if size is not None and 'size' in dynamic:
        raise ConfigurationError('--size: --dynamic size leaves height and width open. Give one of the two.')
    if learner == ENSEMBLE and out.suffix not in CHECKPOINTS:
        raise ConfigurationError(f"--learner {ENSEMBLE}: '{out}': it is written as a checkpoint alone, .pth.")
    if learner:
        with tempfile.TemporaryDirectory() as folder:
            own = extract_learner(resolved, checkpoint, learner, Path(folder))
            return export(*own, out, size=size, dynamic=dynamic, dtype=dtype, channels=channels, half=half,
                          suppress=suppress, images=images, force=force)
    if out.suffix in CHECKPOINTS:
        return export_checkpoint(resolved, checkpoint, out, force)
    if out.suffix not in (ONNX, OPENVINO):
        raise ConfigurationError(f"'{out}': expected a name that ends in .pth (a checkpoint, the config comes beside "
                                 f'it), {ONNX} or {OPENVINO} (OpenVINO).')
    refuse_to_replace_model(out, force)
    plain, detector, meta = load_student(resolved, checkpoint)
    is_quantized = quantize_as_trained(resolved, checkpoint, detector)
    if half and is_quantized:
        raise ConfigurationError('--half: the student was trained for integers, which the file holds.')
    graph = DetectorGraph(detector, channels, suppress, fixed='size' not in dynamic)
    dataset = build_dataset(plain)
    image_size = None if 'size' in dynamic else size or find_size(plain, graph.divisor, dataset)
    info = describe(plain, detector, meta, graph, image_size, None if 'batch' in dynamic else 1, dtype,
                    'float16' if half else 'int8' if is_quantized else 'float32')
    with tempfile.TemporaryDirectory() as folder:
        file = write_onnx(graph, info, Path(folder) / f'{out.stem}{ONNX}')
        if half:
            halve(file)
        if out.suffix == OPENVINO:
            file = convert_to_openvino(file, info)
        expected = predict_with(detector, channels) if suppress else predict_with_graph(graph)
        comparison = compare(open_model(file), expected, draw_images(dataset, info, images))
        comparison.require_agreement(info)
        return ExportedModel(out, info, move_model(file, out), comparison)


def refuse_to_replace_model(out: Path, force: bool = False) -> None:
    """Refuses to replace a file that no export wrote, see :func:`~kd_det.compat.writing.refuse_to_replace`."""
    refuse_to_replace(out, lambda content: SECTION.encode() in content, 'an exported model', force)
    if out.suffix == OPENVINO and not out.is_file():
        refuse_to_replace(out.with_suffix('.bin'), lambda content: False, 'the weights of an exported model', force)


def describe(config: Config, detector: Any, meta: dict[str, Any], graph: DetectorGraph, size: Sequence[int] | None,
             batch: int | None, dtype: str, precision: str) -> ModelInfo:
    """What the file of a graph says of itself."""
    if (size is None or batch is None) and predicts_queries(type(getattr(detector, 'bbox_head', None))):
        raise ConfigurationError(f'--dynamic: a {type(detector).__name__} is exported for one image of one size, to '
                                 'which its positional encodings are made.')
    preprocessor = detector.data_preprocessor
    normalization = (preprocessor.mean, preprocessor.std) if preprocessor._enable_normalize else (
        torch.zeros(1), torch.ones(1))
    mean, std = (each.float().flatten().expand(graph.image_channels).tolist() for each in normalization)
    padding = [graph.padding * deviation + average for average, deviation in zip(mean, std)]
    colours = [step['pad_val'] for step in test_pipeline(config) if get_type_name(step) == 'Pad' and 'pad_val' in step]
    if colours:  # YOLOX' pipeline pads by itself
        colour = colours[-1].get('img', 0) if isinstance(colours[-1], dict) else colours[-1]
        padding = list(colour) if isinstance(colour, (list, tuple)) else [float(colour)] * len(mean)
        padding = padding[::-1] if graph.channels == 'rgb' else padding  # transforms see images as OpenCV reads them
    elif graph.flips:
        padding = padding[::-1]
    count = count_classes(detector)
    names = find_class_names(count, (), meta, config) or [str(label) for label in range(count or 0)]
    shape = None if size is None else (size[0], size[1])
    resize, keep_ratio, factor = find_resize(config)
    return ModelInfo(type(detector).__name__, tuple(names), shape, resize, keep_ratio, batch, graph.channels, dtype,
                     tuple(padding), tuple(mean), tuple(std), graph.suppress, precision, kd_det.__version__, factor)


def test_pipeline(config: Config) -> list[dict]:
    """The transforms of the config's validation or test images, in order; none where it has no such data."""
    loader = config.get('val_dataloader') or config.get('test_dataloader')
    return list_pipelines(loader['dataset'])[0] if loader else []


def find_size(config: Config, divisor: int, dataset: Any | None) -> tuple[int, int]:
    """Height and width of an image that holds whatever the config's test pipeline makes.

    Of the validation images, where they are here and tell their sizes: more padding than the detector was trained with
    costs it up to half a point of mAP. Else of any image.

    Args:
        config: The plain student's.
        divisor: Of height and width.
        dataset: The validation data, see :func:`~kd_det.deploy.checking.build_dataset`.

    Raises:
        ConfigurationError: The pipeline does not say.
    """
    resize, keep_ratio, factor = find_resize(config)
    sizes = _list_image_sizes(dataset) if keep_ratio or resize is None else []
    if resize is not None and keep_ratio:
        sizes = [rescale_size(size, (max(resize), min(resize))) for size in sizes] or [(max(resize), max(resize))]
    elif resize is not None:
        sizes = [resize[::-1]]
    elif list_resizes(config)[0]:
        sizes = []
    if not sizes:
        raise ConfigurationError("The config's test pipeline does not say how large its images are: give --size HEIGHT "
                                 'WIDTH, or --dynamic size.')
    height, width = (int(max(sides) * each + 0.5) for sides, each in zip(list(zip(*sizes))[::-1], factor))
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def _list_image_sizes(dataset: Any | None) -> list[tuple[int, int]]:
    """Width and height of the validation photographs; none where one of them does not tell."""
    infos = [] if dataset is None else [dataset.get_data_info(index) for index in range(len(dataset))]
    sizes = {(info.get('width') or 0, info.get('height') or 0) for info in infos}
    return [] if any(0 in size for size in sizes) else sorted(sizes)


def list_resizes(config: Config) -> tuple[list[dict], tuple[float, float]]:
    """What the config's test pipeline does to the size of images.

    Returns:
        Steps that bring them to a size, or do to them what is not known; and by what the steps after the last of these
        multiply height and width.
    """
    steps, factor = [], (1.0, 1.0)
    for step in (each for each in test_pipeline(config) if 'Resize' in get_type_name(each)):
        given = step.get('scale_factor')
        if get_type_name(step) == 'Resize' and step.get('scale') is None and given is not None:
            width, height = given if isinstance(given, (list, tuple)) else (given, given)
            factor = factor[0] * height, factor[1] * width
        else:
            steps, factor = [*steps, step], (1.0, 1.0)
    return steps, factor


def find_resize(config: Config) -> tuple[tuple[int, int] | None, bool, tuple[float, float]]:
    """What the config's test pipeline does to the size of images.

    Returns:
        Height and width to which it brings them, None where it does not say; whether it keeps their ratio, the longer
        side then becomes at most the longer of the two, and the shorter the shorter; by what it multiplies height and
        width then.
    """
    steps, factor = list_resizes(config)
    step = steps[-1] if steps else {}
    scale: Any = step.get('scale')
    if get_type_name(step) == 'FixShapeResize':
        scale = (step['width'], step['height'])
    elif get_type_name(step) == 'ResizeShortestEdge':
        scale, step = (step.get('max_size'), scale), dict(keep_ratio=True)
    elif isinstance(scale, int):
        scale = (scale, scale)
    if not isinstance(scale, (list, tuple)) or len(scale) != 2 or not all(isinstance(side, int) for side in scale):
        return None, False, factor
    return (scale[1], scale[0]), bool(step.get('keep_ratio', False)), factor


def write_onnx(graph: DetectorGraph, info: ModelInfo, file: Path) -> Path:
    """Traces a graph into a file, which says what it is.

    Raises:
        ConfigurationError: An operator can not be exported; the message names it.
        ModuleNotFoundError: onnx is not installed.
    """
    import onnx
    image = example_image(graph, info)
    if info.precision == 'int8':
        graph.detector.quantizer.freeze()
    names = dict(input_names=['image'], output_names=['boxes', 'scores', 'labels'])
    axes: dict[str, dict[int, str]] = {name: {} for names in names.values() for name in names}
    if info.batch is None:
        axes = {name: {0: 'batch'} for name in axes}
    if info.size is None:
        axes['image'].update({2: 'height', 3: 'width'})
    with quiet(), torch.no_grad(), exportable_linspace():
        try:
            torch.onnx.export(graph, (image, ), str(file), dynamo=False, opset_version=OPSET, **names,
                              dynamic_axes={name: axis for name, axis in axes.items() if axis})
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, NotImplementedError) as error:
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigurationError(f'A {info.detector} can not be exported: {line}') from error
    unknown = sorted({f'{node.domain}::{node.op_type}' for node in onnx.load(file).graph.node if node.domain})
    if unknown:
        raise ConfigurationError(f'A {info.detector} can not be exported: ONNX has no operator for '
                                 f"{', '.join(unknown)}.")
    if info.precision == 'int8':
        store_integers(file)
    fold_constants(file)
    model = onnx.load(file)
    for name, text in info.to_texts().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f'{SECTION}.{name}', text
    model.producer_name, model.producer_version = SECTION, kd_det.__version__
    onnx.checker.check_model(model)
    onnx.save(model, file)
    return file


def fold_constants(file: Path) -> None:
    """Computes in advance what does not depend on the image, by onnxruntime's rewriting within ONNX' own operators."""
    import onnx
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(file), 3
    with explained(file):
        onnxruntime.InferenceSession(file.read_bytes(), options, providers=['CPUExecutionProvider'])
    model = onnx.load(file)
    domains = {node.domain for node in model.graph.node}
    used = [entry for entry in model.opset_import if entry.domain in domains or not entry.domain]
    del model.opset_import[:]
    model.opset_import.extend(used)
    onnx.save(model, file)


def example_image(graph: nn.Module, info: ModelInfo) -> Tensor:
    """An image of noise as the file takes it, to trace with."""
    size = info.size or (256, 320)
    noise = torch.rand(info.batch or 2, len(info.mean), *size, generator=torch.Generator().manual_seed(0)) * 255
    return noise.to(getattr(torch, info.dtype))


def halve(file: Path) -> None:
    """Puts the network of a file into half precision, what decodes boxes excepted."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    with quiet():
        model = onnx.load(file)
        decoding = [node.name for node in model.graph.node if node.name.count('/') < 2]
        model = convert_float_to_float16(model, keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST,
                                         node_block_list=decoding)
        onnx.save(model, file)


def convert_to_openvino(file: Path, info: ModelInfo) -> Path:
    """Makes OpenVINO's pair of files of an ONNX file, beside it.

    Raises:
        ConfigurationError: OpenVINO can not read it.
    """
    import openvino
    converted = file.with_suffix(OPENVINO)
    with explained(file):
        model = openvino.convert_model(file)
        for name, text in info.to_texts().items():
            model.set_rt_info(text, [SECTION, name])
        openvino.save_model(model, converted, compress_to_fp16=info.precision == 'float16')
    return converted


def move_model(file: Path, out: Path) -> int:
    """Gives a checked file its name, of OpenVINO the weights first, and returns the number of bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    suffixes = ('.bin', OPENVINO) if out.suffix == OPENVINO else (ONNX, )
    for suffix in suffixes:
        write_whole(out.with_suffix(suffix), file.with_suffix(suffix).read_bytes())
    return sum(out.with_suffix(suffix).stat().st_size for suffix in suffixes)


@contextmanager
def exportable_linspace() -> Iterator[None]:
    """Within, ``torch.linspace`` of a single step is traced as its start, where exporters divide 0 by 0.

    The reference points of a deformable DETR are such steps, on a level of one row.
    """
    linspace = torch.linspace

    def trace(start: Any, end: Any, steps: Any, **options: Any) -> Tensor:
        places = torch.arange(steps, **options)
        return start + places * ((end - start) / (torch.as_tensor(steps) - 1).clamp(min=1))

    torch.linspace = trace
    try:
        yield
    finally:
        torch.linspace = linspace
