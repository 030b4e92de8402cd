"""Integers after training: onnxruntime's quantiser, in each way that it has, and the way that costs least."""
from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from mmengine.config import Config
from torch import nn

from kd_det.compat.console import TextTable
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Size, declared
from kd_det.config.choices import RANGES
from kd_det.config.files import find_quantization, list_leaf_datasets
from kd_det.config.options import resolve_config
from kd_det.deploy.checking import Comparison, Example, build_dataset, compare, draw_images, predict_with, quiet
from kd_det.deploy.checkpoint import load_student
from kd_det.deploy.export import describe, find_size, move_model, refuse_to_replace_model, write_onnx
from kd_det.deploy.graph import DetectorGraph
from kd_det.deploy.integers import copy_metadata
from kd_det.deploy.runtime import ONNX, ModelInfo, open_model
from kd_det.distillers.quantization_plan import find_predictors

if TYPE_CHECKING:
    import onnx

Ranges = Literal['minmax', 'entropy', 'percentile']
FREE = 0.1  # points of mAP, or of a mean score, that are nothing
# What puts out values of its first input alone, whatever says where they are.
PLACED_BY_OTHERS = ('RoiAlign', 'Gather', 'GatherND', 'GatherElements', 'ScatterND', 'ScatterElements', 'Reshape',
                    'Slice', 'Expand', 'Resize', 'Pad', 'TopK', 'Squeeze', 'Unsqueeze', 'Tile')


@dataclass(frozen=True)
class Trial:
    """One way to quantise, and what it costs on the calibration images.

    Attributes:
        ranges: How the ranges of activations were found.
        float_predictors: Whether the heads' last layers stay float.
        bytes: The size of the file.
        comparison: How it agrees with the float detector.
    """
    ranges: str
    float_predictors: bool
    bytes: int
    comparison: Comparison

    @property
    def quality(self) -> float:
        """MAP in points; of images without objects, minus the mean difference of scores, in hundredths."""
        return self.comparison.map if self.comparison.map is not None else -100 * self.comparison.score_error


@dataclass(frozen=True)
class QuantizedModel:
    """A file that computes in integers of 8 bits.

    Attributes:
        file: The file.
        info: What it says of itself.
        bytes: Its size.
        float_bytes: That of the same detector as float.
        trials: Each way that was tried.
        chosen: That of the file.
    """
    file: Path
    info: ModelInfo
    bytes: int
    float_bytes: int
    trials: tuple[Trial, ...]
    chosen: Trial

    def tabulate(self) -> TextTable:
        """Makes a table of what was tried."""
        rows = []
        for trial in self.trials:
            found = trial.comparison
            points = '–' if found.map is None else f'{found.map:.2f}'
            rows.append((f'{"→ " if trial is self.chosen else ""}{trial.ranges}',
                         'float' if trial.float_predictors else 'integers', points, f'{found.score_error:.3f}',
                         f'{trial.bytes / self.float_bytes:.2f}'))
        first = self.chosen.comparison
        title = (f'{self.file}: {self.info.detector} in integers, '
                 f'{"" if first.expected_map is None else f"float mAP {first.expected_map:.2f}, "}'
                 f'on {first.images} calibration images')
        return TextTable(title, ('ranges', 'predictors', 'mAP', 'score error', 'size'), rows, words=(0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(asdict(self), file=str(self.file))

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def quantize(config: str | Path | Config, checkpoint: str | Path, out: str | Path, *, calibrate: Count = 64,
             size: Size | None = None, dtype: Literal['uint8', 'float32'] = 'uint8',
             channels: Literal['rgb', 'bgr'] = 'rgb', ranges: Sequence[Ranges] = RANGES, symmetric: bool = False,
             data_root: str | None = None, options: dict[str, Any] | None = None, force: bool = False
             ) -> QuantizedModel:
    """Writes a student as a file that computes in integers, without training it.

    The network's weights become integers per channel, its activations per tensor, whose ranges calibration images
    tell; what decodes boxes stays float. Each way to find the ranges is tried with the heads' last layers as float and
    as integers, and measured on the calibration images: the best is written, with integers in the last layers where
    they cost nothing.

    Args:
        config: Of the run that wrote the checkpoint: a file, ``'package::folder/file.py'``, or a config.
        checkpoint: A file.
        out: The file to write, ``.onnx``.
        calibrate: On so many images of the training data, or without any of the validation data, as the config's own
            test pipeline makes them.
        size: Height and width of the image; by default such that every image of the test pipeline fits.
        dtype: Of the image.
        channels: The order of the image's channels.
        ranges: The ways to try: the smallest and largest value, by entropy, by percentile.
        symmetric: Ranges of activations are symmetric, as TensorRT wants them; onnxruntime is faster, and closer to
            float, with ranges that begin where the values do.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key.
        force: Replace a file of this name that no export wrote.

    Raises:
        ConfigurationError: The checkpoint is not of the student in the config, or was trained for integers; there are
            no calibration images; or the detector can not be exported.
        WritingError: A file of that name exists, and is no export; or it can not be written.
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    out, resolved = Path(out), resolve_config(config, data_root, options)
    if out.suffix != ONNX:
        raise ConfigurationError(f"'{out}': expected the name of a file that ends in {ONNX}. kd-det export converts no "
                                 'integers; OpenVINO reads the ONNX file itself.')
    if find_quantization(resolved) is not None:
        raise ConfigurationError('The student was trained for integers (model.quantize): kd-det export writes those. '
                                 'To quantise its float weights anew: --cfg-options model.quantize=None.')
    if not ranges:
        raise ConfigurationError(f"ranges: expected at least one of {', '.join(RANGES)}.")
    refuse_to_replace_model(out, force)
    plain, detector, meta = load_student(resolved, checkpoint)
    graph = DetectorGraph(detector, channels)
    validation = None if size else build_dataset(plain)
    size = size or find_size(plain, graph.divisor, validation)
    info = describe(plain, detector, meta, graph, size, 1, dtype, 'float32')
    examples = draw_calibration_images(plain, info, calibrate, validation)
    with tempfile.TemporaryDirectory() as folder:
        float_file = write_onnx(graph, info, Path(folder) / f'float{ONNX}')
        trials, files = [], {}
        for name in ranges:
            try:
                for kept, file in quantize_file(float_file, detector, examples, name, Path(folder), symmetric):
                    comparison = compare(open_model(file), predict_with(detector, channels), examples)
                    trials.append(Trial(name, kept, file.stat().st_size, comparison))
                    files[trials[-1]] = file
            except ValueError as error:  # of a histogram: an activation that is the same everywhere has no range
                if name == ranges[-1] and not trials:
                    raise ConfigurationError(f'The ranges of a {info.detector} can not be found: {error}') from error
        chosen = choose(trials)
        info = open_model(files[chosen]).info
        return QuantizedModel(out, info, move_model(files[chosen], out), float_file.stat().st_size, tuple(trials),
                              chosen)


def choose(trials: Sequence[Trial]) -> Trial:
    """The best way; of those with integers in the last layers one that costs nothing beside it, where there is one."""
    best = max(trials, key=lambda trial: trial.quality)
    free = [trial for trial in trials if not trial.float_predictors and trial.quality >= best.quality - FREE]
    return max(free, key=lambda trial: trial.quality, default=best)


def draw_calibration_images(config: Config, info: ModelInfo, count: int, validation: Any | None) -> list[Example]:
    """Takes images of the training data, else of the validation data, through the config's own test pipeline.

    Args:
        config: The plain student's.
        info: Of the file.
        count: At most so many.
        validation: The validation data, where it is built already.

    Raises:
        ConfigurationError: There are none.
    """
    loader = config.get('val_dataloader') or config.get('test_dataloader')
    if loader and config.get('train_dataloader'):
        trained = copy.deepcopy(list_leaf_datasets(config.train_dataloader.dataset)[0])
        trained['pipeline'] = list_leaf_datasets(loader['dataset'])[0].get('pipeline', [])
        shown = copy.deepcopy(config)
        shown.val_dataloader = dict(dataset=trained)
        examples = draw_images(build_dataset(shown), info, count)
        if examples[0].objects is not None:
            return examples
    examples = draw_images(validation or build_dataset(config), info, count)
    if examples[0].objects is None:
        raise ConfigurationError('There are no images to calibrate on: neither the training nor the validation data of '
                                 'the config is here. Give its folder with --data-root.')
    return examples


def quantize_file(float_file: Path, detector: nn.Module, examples: Sequence[Example], ranges: str, folder: Path,
                  symmetric: bool = False) -> Iterator[tuple[bool, Path]]:
    """Quantises a file twice, with one calibration: with the heads' last layers as float, and as integers.

    Args:
        float_file: The file.
        detector: The detector that it is of.
        examples: To calibrate on.
        ranges: How.
        folder: For what is made.
        symmetric: See :func:`quantize`.

    Yields:
        Whether the last layers are float, and the file.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    method = dict(minmax=CalibrationMethod.MinMax, entropy=CalibrationMethod.Entropy,
                  percentile=CalibrationMethod.Percentile)[ranges]
    prepared, cache = folder / 'prepared.onnx', folder / f'{ranges}.json'
    with quiet():
        if not prepared.is_file():
            quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        predictors = find_predictor_nodes(model, detector)
        outside = [node.name for node in model.graph.node if node.name not in find_network(model, predictors)]
        for kept in (False, True):  # the calibration of the first knows of all tensors
            file = folder / f'{ranges}_{kept}{ONNX}'
            quantize_static(str(prepared), str(file), make_reader(float_file, examples), per_channel=True,
                            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                            weight_type=QuantType.QInt8, calibrate_method=method,
                            nodes_to_exclude=[*outside, *(predictors if kept else ())],
                            calibration_cache_path=str(cache),
                            extra_options=dict(CalibStridedMinMax=1, ActivationSymmetric=symmetric))
            copy_metadata(float_file, file, precision='int8')
            yield kept, file


def make_reader(file: Path, examples: Sequence[Example]) -> Any:
    """What onnxruntime's calibration reads: the images as the file takes them, one at a time."""
    from onnxruntime.quantization import CalibrationDataReader
    model = open_model(file)

    class Reader(CalibrationDataReader):

        def __init__(self) -> None:
            self.set_range(0, len(examples))

        def __len__(self) -> int:
            return len(examples)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(examples[start_index:end_index])

        def get_next(self) -> dict[str, np.ndarray] | None:
            example = next(self.left, None)
            return None if example is None else dict(image=model.fit(example.image)[0].astype(model.info.dtype))

    return Reader()


def find_predictor_nodes(model: onnx.ModelProto, detector: nn.Module) -> list[str]:
    """The nodes of a detector's last layers, by their weights: names are the exporter's own."""
    from onnx import numpy_helper
    predictors = map(detector.get_submodule, find_predictors(detector))
    weights = {layer.weight.detach().cpu().numpy().tobytes() for layer in predictors}
    names = {each.name for each in model.graph.initializer
             if {numpy_helper.to_array(each).tobytes(), numpy_helper.to_array(each).T.tobytes()} & weights}
    return [node.name for node in model.graph.node
            if node.op_type in ('Conv', 'Gemm', 'MatMul') and len(node.input) > 1 and node.input[1] in names]


def find_network(model: onnx.ModelProto, predictors: Sequence[str]) -> set[str]:
    """The nodes that make the features and the outputs of the heads, from the first convolution on.

    Args:
        model: The graph.
        predictors: Its last layers; without any, as of a transformer, all up to the last convolution.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    ends = [node for node in model.graph.node
            if (node.name in predictors if predictors else node.op_type == 'Conv')]
    found: dict[str, Any] = {}
    while ends:
        node = ends.pop()
        if node.name not in found:
            found[node.name] = node
            read = node.input[:1] if node.op_type in PLACED_BY_OTHERS else node.input
            ends += [makers[name] for name in read if name in makers]
    behind: set[str] = set()
    for node in model.graph.node:  # which are in order
        if node.op_type == 'Conv' or any(name in makers and makers[name].name in behind for name in node.input):
            behind.add(node.name)
    return found.keys() & behind
