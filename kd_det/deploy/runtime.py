"""Exported files: what is written into them, and how they are run, by onnxruntime or OpenVINO."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_det.config import ConfigurationError
from kd_det.config.choices import RUNTIMES

ONNX, OPENVINO = '.onnx', '.xml'
SECTION = 'kd_det'  # of an OpenVINO file's information; in an ONNX file the keys begin with it


@dataclass(frozen=True)
class ModelInfo:
    """What a file says of itself, and whoever runs it has to know.

    Attributes:
        detector: Its type, such as ``RetinaNet``.
        classes: The name of each label.
        size: Height and width of the image that it takes; None where any will do.
        batch: How many images it takes; None where any number will do.
        channels: The order of the image's, ``'rgb'`` or ``'bgr'``.
        dtype: Of the image, ``'uint8'`` or ``'float32'``; 0 to 255 either way.
        padding: The colour, in that order, of what an image that is smaller is filled up with, on the right and below.
        mean: What the file itself subtracts, in the order of the detector's own channels.
        std: By what it divides.
        suppressed: Whether the boxes are those after non-maximum suppression.
        precision: ``'float32'``, ``'float16'`` or ``'int8'``.
        version: Of the kd_det that wrote the file.
    """
    detector: str
    classes: tuple[str, ...]
    size: tuple[int, int] | None
    batch: int | None
    channels: str
    dtype: str
    padding: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    suppressed: bool
    precision: str
    version: str

    def to_texts(self) -> dict[str, str]:
        """Returns each as JSON, as files keep them."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_texts(cls, texts: dict[str, str], file: str | Path) -> ModelInfo:
        """Reads what :meth:`to_texts` made.

        Raises:
            ConfigurationError: It is not all there: the file was not exported by kd_det.
        """
        lacking = [field.name for field in fields(cls) if field.name not in texts]
        if lacking:
            raise ConfigurationError(f"'{file}' was not exported by kd-det: it does not say its {', '.join(lacking)}.")
        values = {field.name: json.loads(texts[field.name]) for field in fields(cls)}
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
    """A file that runs. Called with images, (N, channels, H, W) in the order of :attr:`info`, it gives detections.

    Attributes:
        file: The file.
        info: What it says of itself.
        runtime: By what it runs, of :data:`~kd_det.config.choices.RUNTIMES`.
    """

    def __init__(self, file: Path, info: ModelInfo, runtime: str, run: Any) -> None:
        self.file, self.info, self.runtime, self._run = file, info, runtime, run

    def __call__(self, images: np.ndarray) -> Detections:
        return Detections(*self._run(np.ascontiguousarray(images, dtype=self.info.dtype)))

    def fit(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """Makes of one image what the file takes: smaller if need be, in its ratio, and filled up.

        Args:
            image: (height, width, channels), in the file's order of channels.

        Returns:
            (1, channels, H, W), and by what the image's sides were multiplied.
        """
        if self.info.size is None:
            return image.transpose(2, 0, 1)[None], 1.0
        import cv2
        height, width = self.info.size
        scale = min(height / image.shape[0], width / image.shape[1], 1)
        if scale < 1:
            size = (min(width, round(image.shape[1] * scale)), min(height, round(image.shape[0] * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).reshape(*size[::-1], -1)
        canvas = np.empty((height, width, image.shape[2]), image.dtype)
        canvas[:] = np.round(self.info.padding) if image.dtype == np.uint8 else self.info.padding
        canvas[:image.shape[0], :image.shape[1]] = image
        return canvas.transpose(2, 0, 1)[None], scale


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
    if file.suffix not in (ONNX, OPENVINO):
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
    core = openvino.Core()
    with explained(file):
        model = core.read_model(file)
        settings = {'INFERENCE_PRECISION_HINT': 'f32'}
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        compiled = core.compile_model(model, 'CPU', settings)
    texts = _openvino_texts(model, file)
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        results = request.infer([images])
        return [results[output].copy() for output in compiled.outputs]

    return ExportedDetector(file, ModelInfo.from_texts(texts, file), 'openvino', run)


def _openvino_texts(model: Any, file: Path) -> dict[str, str]:
    """What an OpenVINO model says of itself; of an ONNX file that it reads, what that says."""
    if file.suffix == OPENVINO:
        names = [field.name for field in fields(ModelInfo) if model.has_rt_info([SECTION, field.name])]
        return {name: model.get_rt_info([SECTION, name]).astype(str) for name in names}
    import onnx
    entries = onnx.load(file, load_external_data=False).metadata_props
    return {entry.key.removeprefix(f'{SECTION}.'): entry.value for entry in entries}


@contextmanager
def explained(file: str | Path) -> Iterator[None]:
    """Says of what a runtime can not read which file it is, in one line."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigurationError(f"'{file}' can not be run: {lines[0]}") from error
    except Exception as error:  # onnxruntime's own errors have no ancestor in common
        if type(error).__module__.split('.')[0] != 'onnxruntime':
            raise
        raise ConfigurationError(f"'{file}' can not be run: {(str(error).splitlines() or ['?'])[0]}") from error
