"""Exported files: what is written into them, and how they are run, by onnxruntime or OpenVINO."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_det.config import ConfigurationError
from kd_det.config.choices import EXPORTED, RUNTIMES

ONNX, OPENVINO = EXPORTED
SECTION = 'kd_det'  # of an OpenVINO file's information; in an ONNX file the keys begin with it


@dataclass(frozen=True)
class ModelInfo:
    """What a file says of itself, and whoever runs it has to know.

    Attributes:
        detector: Its type, such as ``RetinaNet``.
        classes: The name of each label.
        size: Height and width of the image that it takes; None where any will do.
        resize: Height and width of what the detector's test pipeline makes of a photograph; None where it leaves that
            as it is.
        keep_ratio: Whether it keeps the ratio of the sides: the longer then becomes the longer of the two at most, and
            the shorter the shorter.
        batch: How many images it takes; None where any number will do.
        channels: The order of the image's, ``'rgb'`` or ``'bgr'``.
        dtype: Of the image, ``'uint8'`` or ``'float32'``; 0 to 255 either way.
        padding: The colour, in that order, of what an image that is smaller is filled up with, on the right and below.
        mean: What the file itself subtracts, in the order of the detector's own channels.
        std: By what it divides.
        suppressed: Whether the boxes are those after non-maximum suppression.
        precision: ``'float32'``, ``'float16'`` or ``'int8'``.
        version: Of the kd_det that wrote the file.
        factor: By what the test pipeline multiplies height and width, after ``resize``; 1 in files that do not say it.
    """
    detector: str
    classes: tuple[str, ...]
    size: tuple[int, int] | None
    resize: tuple[int, int] | None
    keep_ratio: bool
    batch: int | None
    channels: str
    dtype: str
    padding: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    suppressed: bool
    precision: str
    version: str
    factor: tuple[float, float] = (1.0, 1.0)

    def to_texts(self) -> dict[str, str]:
        """Returns each as JSON, as files keep them."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_texts(cls, texts: dict[str, str], file: str | Path) -> ModelInfo:
        """Reads what :meth:`to_texts` made.

        Raises:
            ConfigurationError: It is not all there: the file was not exported by kd_det.
        """
        lacking = [field.name for field in fields(cls) if field.name not in texts and field.default is MISSING]
        if lacking:
            raise ConfigurationError(f"'{file}' was not exported by kd-det: it does not say its {', '.join(lacking)}.")
        values = {field.name: json.loads(texts[field.name]) for field in fields(cls) if field.name in texts}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class Detections(NamedTuple):
    """What a file finds in N images, at most D to an image.

    Attributes:
        boxes: (N, D, 4) float32 of x1, y1, x2, y2 in pixels of the file's input.
        scores: (N, D) float32, falling; 0 where there is no object.
        labels: (N, D) int64.
    """
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class ExportedDetector:
    """A file that runs. Called with images, (N, channels, H, W) in the order of ``info``, it gives detections.

    Attributes:
        file: The file.
        info: What it says of itself.
        runtime: By what it runs, of :data:`~kd_det.config.choices.RUNTIMES`.
    """

    def __init__(self, file: Path, info: ModelInfo, runtime: str, run: Any) -> None:
        self.file, self.info, self.runtime, self._run = file, info, runtime, run

    def __call__(self, images: np.ndarray) -> Detections:
        return Detections(*self._run(np.ascontiguousarray(images, dtype=self.info.dtype)))

    def detect(self, image: np.ndarray, photograph: bool = False) -> Detections:
        """Finds the objects of one image.

        Args:
            image: (height, width, channels), in the file's order of channels.
            photograph: See :meth:`fit`.

        Returns:
            As of one image alone: (n, 4) boxes in pixels of this image and within it, (n,) scores, (n,) labels.
        """
        fitted, scale = self.fit(image, photograph)
        found = self(fitted)
        boxes = (found.boxes[0] / scale).clip(0, np.array([image.shape[1], image.shape[0]] * 2, np.float32))
        real = (found.scores[0] > 0) & (boxes[:, :2] < boxes[:, 2:]).all(1)  # not of what was filled up
        return Detections(boxes[real], found.scores[0][real], found.labels[0][real])

    def fit(self, image: np.ndarray, photograph: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Makes of one image what the file takes: smaller if need be, in its ratio, and filled up.

        Args:
            image: (height, width, channels), in the file's order of channels.
            photograph: It is to be resized as the detector's test pipeline would; else that was done.

        Returns:
            (1, channels, H, W), and (4,) by what the sides of boxes were multiplied.

        Raises:
            ConfigurationError: It has other channels, or values that the file's type does not have.
        """
        if image.shape[2] != len(self.info.mean):
            raise ConfigurationError(f"'{self.file}' takes images of {len(self.info.mean)} channels, got one of "
                                     f'{image.shape[2]}.')
        if self.info.dtype == 'uint8' and image.dtype != np.uint8:
            if image.size and not 0 <= image.min() <= image.max() <= 255:
                raise ConfigurationError(f"'{self.file}' takes uint8 images, got {image.dtype} from {image.min():g} to "
                                         f'{image.max():g}: export it with --dtype float32.')
            image = np.rint(image).astype(np.uint8)
        height, width = image.shape[:2]
        rows, columns = self._find_size(height, width, photograph)
        if (rows, columns) != (height, width):
            import cv2
            image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR).reshape(rows, columns, -1)
        scale = np.array([columns / width, rows / height] * 2, np.float32)
        if self.info.size is not None:
            canvas = np.empty((*self.info.size, image.shape[2]), image.dtype)
            canvas[:] = np.round(self.info.padding) if image.dtype == np.uint8 else self.info.padding
            canvas[:rows, :columns] = image
            image = canvas
        return image.transpose(2, 0, 1)[None], scale

    def _find_size(self, height: int, width: int, photograph: bool) -> tuple[int, int]:
        """The height and width that an image gets before it is filled up."""
        rows, columns = float(height), float(width)
        if photograph:
            if self.info.resize is not None:
                rows, columns = self.info.resize
                if self.info.keep_ratio:
                    scale = min(max(rows, columns) / max(height, width), min(rows, columns) / min(height, width))
                    rows, columns = height * scale, width * scale
            rows, columns = rows * self.info.factor[0], columns * self.info.factor[1]
        if self.info.size is not None:
            scale = min(self.info.size[0] / rows, self.info.size[1] / columns, 1)
            rows, columns = rows * scale, columns * scale
        return max(1, int(rows + 0.5)), max(1, int(columns + 0.5))  # as MMDetection rounds


def read_info(file: str | Path) -> ModelInfo:
    """Reads what an exported file says of itself.

    Raises:
        ConfigurationError: There is no such file, or it is none of kd_det's.
    """
    return open_model(file).info


def open_model(file: str | Path, runtime: str | None = None, threads: int | None = None) -> ExportedDetector:
    """Opens an exported file.

    Args:
        file: ``.onnx`` or, of OpenVINO, ``.xml``.
        runtime: ``'onnxruntime'`` or ``'openvino'``; by default what the file's name says.
        threads: How many it may use; by default as many as it likes.

    Raises:
        ConfigurationError: There is no such file, it is none of kd_det's, or the runtime can not run it.
        ModuleNotFoundError: The runtime is not installed.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigurationError(f"'{file}': there is no such file.")
    if file.suffix not in EXPORTED:
        raise ConfigurationError(f"'{file}': expected a file that kd-det export wrote, .onnx or .xml.")
    runtime = runtime or ('onnxruntime' if file.suffix == ONNX else 'openvino')
    if runtime not in RUNTIMES or file.suffix == OPENVINO and runtime != 'openvino':
        raise ConfigurationError(f"'{file}' can not be run by {runtime}: expected "
                                 f"{'openvino' if file.suffix == OPENVINO else ' or '.join(RUNTIMES)}.")
    return (_open_onnx if runtime == 'onnxruntime' else _open_openvino)(file, threads)


def _open_onnx(file: Path, threads: int | None) -> ExportedDetector:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.add_session_config_entry('session.force_spinning_stop', '1')  # between runs its threads leave others alone
    if threads:
        options.intra_op_num_threads = threads
    with explained(file):
        session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    texts = {key.removeprefix(f'{SECTION}.'): value
             for key, value in session.get_modelmeta().custom_metadata_map.items()}
    name = session.get_inputs()[0].name
    return ExportedDetector(file, ModelInfo.from_texts(texts, file), 'onnxruntime',
                            lambda images: session.run(None, {name: images}))


def _open_openvino(file: Path, threads: int | None) -> ExportedDetector:
    import openvino
    if file.suffix == OPENVINO:
        with file.open('rb') as opened:
            if opened.read(1) != b'<':  # what is no XML OpenVINO tries as TensorFlow's
                raise ConfigurationError(f"'{file}' can not be run: it is no XML file.")
        if not file.with_suffix('.bin').is_file():
            raise ConfigurationError(f"'{file}' can not be run: its weights are missing, there is no "
                                     f"'{file.with_suffix('.bin').name}' beside it.")
    core = openvino.Core()
    with explained(file):
        texts = {} if file.suffix == OPENVINO else _onnx_texts(file)
        model = core.read_model(file)
        settings = {'INFERENCE_PRECISION_HINT': 'f32'}
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        compiled = core.compile_model(model, 'CPU', settings)
    if file.suffix == OPENVINO:
        names = [field.name for field in fields(ModelInfo) if model.has_rt_info([SECTION, field.name])]
        texts = {name: model.get_rt_info([SECTION, name]).astype(str) for name in names}
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        results = request.infer([images])
        return [results[output].copy() for output in compiled.outputs]

    return ExportedDetector(file, ModelInfo.from_texts(texts, file), 'openvino', run)


def _onnx_texts(file: Path) -> dict[str, str]:
    """What an ONNX file says of itself, without onnxruntime."""
    import onnx
    entries = onnx.load(file, load_external_data=False).metadata_props
    return {entry.key.removeprefix(f'{SECTION}.'): entry.value for entry in entries}


@contextmanager
def explained(file: str | Path) -> Iterator[None]:
    """Says of what a runtime can not read which file it is, in one line."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        package = type(error).__module__.split('.')[0]  # whose errors have no ancestor in common with others
        if not isinstance(error, (RuntimeError, ValueError, TypeError)) and package not in ('onnxruntime', 'google'):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = lines[-1 if lines[0].startswith('Exception from') else 0]  # OpenVINO begins with places in its code
        raise ConfigurationError(f"'{file}' can not be run: {line.strip()}") from error
