"""What exported files find: on the data of a config, in the place of a detector, and on photographs."""
from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import mmcv
import numpy as np
import torch
from mmdet.models.utils import samplelist_boxtype2tensor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from PIL import Image
from torch import nn

from kd_det.checks.image_reader import find_damage
from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Name, Place, Share, declared
from kd_det.config.classes import Names, find_label_names, get_metainfo, match_classes
from kd_det.deploy.runtime import Detections, ExportedDetector, open_model

MADE_BY = 'kd-det predict'  # by which its files are known, which another prediction may replace
PREDICTIONS, IMAGES = 'predictions.json', 'images.json'
IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')  # in folders
Runtime = Literal['onnxruntime', 'openvino']


@MODELS.register_module()
class FileDetector(nn.Module):
    """A file that ``kd-det export`` wrote, in the place of the detector that MMEngine's Runner tests.

    Args:
        file: The file, ``.onnx`` or ``.xml``.
        runtime: By what it is run; by default what its name says.
        threads: How many it may use; by default as many as the runtime likes.

    Raises:
        ConfigurationError: There is no such file, it is none of kd_det's, it ends before suppression, or the runtime
            can not run it.
    """

    @declared
    def __init__(self, file: Name, runtime: Runtime | None = None, threads: Count | None = None) -> None:
        super().__init__()
        self.model = open_model(file, runtime, threads)
        require_suppression(self.model)
        self.labels = np.arange(len(self.model.info.classes))
        self._shrinks = False  # whether it was told

    def __deepcopy__(self, memory: Any) -> FileDetector:
        return self  # hooks that average weights begin with a copy, and a file that is open has none

    def adapt(self, dataset: Any, metrics: Sequence[Any]) -> None:
        """Adapts to the classes of the data that it is tested on, and metrics to boxes alone.

        Args:
            dataset: Built.
            metrics: Of its evaluator; those of masks are left out.

        Raises:
            ConfigurationError: The data has other classes, or nothing is left to measure.
        """
        declared_names = tuple(map(str, get_metainfo(dataset).get('classes') or ()))
        names = max(find_label_names(dataset) or (), declared_names, key=len)
        self.labels = match_labels(self.model, names)
        for metric in metrics:
            kinds = getattr(metric, 'metrics', None)
            if isinstance(kinds, list) and 'segm' in kinds:
                kinds.remove('segm')
                if not kinds:
                    raise ConfigurationError(f"'{self.model.file}' finds boxes, and the config's evaluator measures "
                                             'masks alone.')
                MMLogger.get_current_instance().warning(f"'{self.model.file}' finds boxes: masks are not measured.")

    def test_step(self, data: Mapping[str, Any]) -> list[DetDataSample]:
        """Finds the objects of a batch as the data's pipeline made it.

        Args:
            data: ``inputs``, (channels, height, width) each, as OpenCV orders channels; ``data_samples``.

        Returns:
            The samples with ``pred_instances``, in pixels of the photographs.
        """
        for image, sample in zip(data['inputs'], data['data_samples']):
            self._tell_size(image)
            found = self.model.detect(order_channels(image.permute(1, 2, 0).numpy(), self.model))
            scale = np.array(tuple(sample.metainfo.get('scale_factor', (1.0, 1.0))) * 2, np.float32)
            limits = np.array(tuple(sample.ori_shape[1::-1]) * 2, np.float32)
            sample.pred_instances = to_instances(Detections((found.boxes / scale).clip(0, limits), found.scores,
                                                            self.labels[found.labels]))
        samplelist_boxtype2tensor(data['data_samples'])  # which painters expect of the ground truth, too
        return list(data['data_samples'])

    def _tell_size(self, image: torch.Tensor) -> None:
        size = self.model.info.size
        if size and not self._shrinks and (image.shape[1] > size[0] or image.shape[2] > size[1]):
            self._shrinks = True
            MMLogger.get_current_instance().warning(
                f"The pipeline's images, such as one of {image.shape[1]} × {image.shape[2]}, are larger than the "
                f"{size[0]} × {size[1]} that '{self.model.file}' takes: they are made smaller.")


def require_suppression(model: ExportedDetector) -> None:
    """Checks that a file's boxes are those after non-maximum suppression.

    Raises:
        ConfigurationError: They are not.
    """
    if not model.info.suppressed:
        raise ConfigurationError(f"'{model.file}' ends before non-maximum suppression: export it without --no-nms.")


def match_labels(model: ExportedDetector, names: Names) -> np.ndarray:
    """Finds for each label of a file the data's label of the same name.

    Args:
        model: The file.
        names: Of the data's classes, by label; none where nothing tells them.

    Raises:
        ConfigurationError: One of the two has a class that the other has not.
    """
    classes = model.info.classes
    if not names or classes == tuple(map(str, range(len(names)))):  # of a file that does not know its names, either
        return np.arange(len(classes))
    try:
        match = match_classes(names, classes)
    except ConfigurationError:  # no name in common
        match = None
    of_data, of_file = (match.of_student, match.of_teacher) if match else ((), ())
    lacking, others = ([name for label, name in enumerate(every) if label not in shared]
                       for every, shared in ((names, of_data), (classes, of_file)))
    if lacking or others:
        told = [f'{whose} {_join(each)}' for whose, each in (('the data alone has', lacking),
                                                            ('the file alone has', others)) if each]
        raise ConfigurationError(f"'{model.file}' tells other classes apart than the data has: {', '.join(told)}. Give "
                                 'the config of the run that it was exported from.')
    if of_data != of_file:
        MMLogger.get_current_instance().info(f"The classes of '{model.file}' are the data's, in another order: its "
                                             'labels follow the names.')
    labels = np.empty(len(classes), int)
    labels[list(of_file)] = of_data
    return labels


def order_channels(image: np.ndarray, model: ExportedDetector) -> np.ndarray:
    """Brings an image whose channels are in OpenCV's order into a file's; both are (height, width, channels)."""
    return image[..., ::-1] if model.info.channels == 'rgb' and image.shape[2] == 3 else image


def to_instances(found: Detections) -> InstanceData:
    """What was found on one image, as MMDetection's metrics and painters read it."""
    return InstanceData(bboxes=torch.from_numpy(np.ascontiguousarray(found.boxes)),
                        scores=torch.from_numpy(found.scores), labels=torch.from_numpy(found.labels))


@dataclass(frozen=True)
class Predictions:
    """What a file found on photographs.

    Attributes:
        model: The file.
        out: Folder of the painted photographs, of ``predictions.json`` and of ``images.json``, which names the images
            and classes that the former numbers.
        images: Names of the photographs, as in ``images.json``.
        results: As COCO has them, of any score: dicts of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height
            in pixels of the photograph) and ``score``.
        threshold: The lowest score that was painted.
        unreadable: Photographs that can not be read, and why, by name.
        left_out: Classes of the file that the annotations have not, and whose boxes are left out.
    """
    model: Path
    out: Path
    images: tuple[str, ...]
    results: tuple[dict[str, Any], ...]
    threshold: float
    unreadable: dict[str, str]
    left_out: tuple[str, ...] = ()

    def tabulate(self) -> TextTable:
        """Makes a table of what was found and where it is."""
        painted = sum(result['score'] >= self.threshold for result in self.results)
        rows = [('model', str(self.model)), ('images', f'{len(self.images):,}'),
                ('boxes', f'{len(self.results):,}, {painted:,} of a score of at least {self.threshold:g}'),
                ('pictures', str(self.out)), ('COCO results', str(self.out / PREDICTIONS))]
        if self.left_out:
            rows.append(('left out', f'{_join(self.left_out)}: the annotations have no such class'))
        rows += [('unreadable', f'{name}: {reason}') for name, reason in self.unreadable.items()]
        return TextTable('Predictions', ('', ''), rows, words=(0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(asdict(self), model=str(self.model), out=str(self.out))

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def predict(model: Place, images: Place | Sequence[Place], *, out: Place | None = None, threshold: Share = 0.3,
            runtime: Runtime | None = None, threads: Count | None = None, annotations: Place | None = None,
            force: bool = False) -> Predictions:
    """Runs an exported file on photographs: paints what it finds, and writes it as COCO results.

    Photographs are read as MMDetection reads them, turned by their EXIF orientation, and resized as the test pipeline
    of the detector would. One that can not be read is passed over, and named.

    Args:
        model: A file that :func:`~kd_det.deploy.export.export` wrote, ``.onnx`` or ``.xml``.
        images: Photographs, and folders of them.
        out: Folder for what is written, ``work_dirs/MODEL/predictions`` by default.
        threshold: The lowest score that is painted; the results have all.
        runtime: By what the file is run; by default what its name says.
        threads: How many it may use; by default as many as the runtime likes.
        annotations: A COCO file whose numbers of images, by file name, and of categories, by name, the results have;
            by default both are counted from 1.
        force: Replace files of these names that no prediction wrote.

    Raises:
        ConfigurationError: The file can not be run, there are no images, none can be read, or the annotations do not
            know them.
        WritingError: A file of one of these names exists, and no prediction wrote it.
    """
    detector = open_model(model, runtime, threads)
    require_suppression(detector)
    channels = len(detector.info.mean)
    if channels not in (1, 3):
        raise ConfigurationError(f"'{model}' takes images of {channels} channels, which no photograph has.")
    out = Path(out) if out else Path('work_dirs') / detector.file.stem / 'predictions'
    files = find_images([images] if isinstance(images, (str, Path)) else images, out)
    numbers, categories, by_label = _number(detector.info.classes, files, annotations)
    pictures = name_pictures(files, out)
    _refuse_to_replace(out, pictures, files, force)
    paint = _make_painter(detector.info.classes, threshold)
    results: list[dict[str, Any]] = []
    entries, unreadable = [], {}
    for name, file in files.items():
        image = read_photograph(file, channels)
        if isinstance(image, str):
            unreadable[name] = image
            continue
        found = detector.detect(order_channels(image, detector), photograph=True)
        pictures[name].parent.mkdir(parents=True, exist_ok=True)
        write_whole(pictures[name], paint(image, found))
        entries.append(dict(id=numbers[name], file_name=name, height=image.shape[0], width=image.shape[1]))
        results += [dict(image_id=numbers[name], category_id=by_label[label], score=round(score, 5),
                         bbox=[round(side, 3) for side in (x1, y1, x2 - x1, y2 - y1)])
                    for (x1, y1, x2, y2), score, label in zip(*(each.tolist() for each in found)) if label in by_label]
    if not entries:
        raise ConfigurationError('None of the images can be read: '
                                 + '; '.join(f"'{files[name]}' ({reason})" for name, reason in unreadable.items()))
    write_whole(out / IMAGES, json.dumps(dict(info=dict(description=f'{MADE_BY} {model}'), images=entries,
                                              categories=categories), indent=1, ensure_ascii=False))
    write_whole(out / PREDICTIONS, json.dumps(results))
    left_out = tuple(name for label, name in enumerate(detector.info.classes) if label not in by_label)
    return Predictions(detector.file, out, tuple(entry['file_name'] for entry in entries), tuple(results), threshold,
                       unreadable, left_out)


def find_images(places: Iterable[str | Path], out: Path) -> dict[str, Path]:
    """Finds photographs: each file that is named, and in folders whatever ends as images do.

    Args:
        places: Files and folders.
        out: What is in this folder within one of those is left out.

    Returns:
        Files by name, each once: the path within the folder, or the file's own; where two would have the same, all
        have the path from the nearest folder that holds all of them.

    Raises:
        ConfigurationError: There is no such file or folder, or a folder holds no images.
    """
    found: dict[Path, str] = {}
    for place in map(Path, places):
        if place.is_file():
            found.setdefault(place.resolve(), place.name)
            continue
        if not place.is_dir():
            raise ConfigurationError(f"'{place}': there is no such image or folder.")
        within = {file: file.relative_to(place).as_posix() for file in sorted(place.rglob('*'))
                  if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
                  and not (place.resolve() in out.resolve().parents and out.resolve() in file.resolve().parents)}
        if not within:
            raise ConfigurationError(f"'{place}' holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        for file, name in within.items():
            found.setdefault(file.resolve(), name)
    if not found:
        raise ConfigurationError('There are no images: give files or folders.')
    if len(set(found.values())) < len(found):
        root = os.path.commonpath([file.parent for file in found])
        found = {file: file.relative_to(root).as_posix() for file in found}
    return {name: file for file, name in found.items()}


def name_pictures(names: Iterable[str], out: Path) -> dict[str, Path]:
    """Names the painted photographs: as those, with ``.jpg`` at the end, once more where another has that name."""
    pictures = {name: name for name in names if name.lower().endswith('.jpg')}
    taken = {name.lower() for name in pictures}  # not every file system tells capitals apart
    for name in (each for each in names if each not in pictures):
        pictures[name] = f'{name}.jpg'
        while pictures[name].lower() in taken:
            pictures[name] += '.jpg'
        taken.add(pictures[name].lower())
    return {name: out / pictures[name] for name in names}


def read_photograph(file: Path, channels: int = 3) -> np.ndarray | str:
    """Reads an image as MMDetection does, turned by its EXIF orientation.

    Returns:
        (height, width, channels) uint8, blue first; or why it can not be read.
    """
    damage = find_damage(str(file))
    if damage:
        return damage
    image = mmcv.imfrombytes(file.read_bytes(), flag='color' if channels == 3 else 'grayscale', backend='cv2')
    return 'it is no image that OpenCV reads' if image is None else image.reshape(*image.shape[:2], channels)


def _number(classes: Names, files: Mapping[str, Path], annotations: str | Path | None
            ) -> tuple[dict[str, int], list[dict[str, Any]], dict[int, int]]:
    """The number of each image by name, the categories as COCO has them, and the category's number of each label."""
    if annotations is None:
        categories = [dict(id=label + 1, name=name) for label, name in enumerate(classes)]
        return {name: number for number, name in enumerate(files, 1)}, categories, {
            label: label + 1 for label in range(len(classes))}
    try:
        content = json.loads(Path(annotations).read_text(encoding='utf-8'))
        named = {str(image['file_name']): image['id'] for image in content['images']}
        known = {name.replace('\\', '/'): number for name, number in named.items()} | named  # written on Windows
        categories = [dict(id=each['id'], name=str(each['name'])) for each in content['categories']]
    except FileNotFoundError:
        raise ConfigurationError(f"'{annotations}': there is no such file.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"'{annotations}' can not be read as COCO annotations: {type(error).__name__}: "
                                 f'{error}.') from error
    numbers: dict[str, int] = {}
    for name, file in files.items():  # whose path ends in what the annotations say; the longest counts
        ends = ('/'.join(file.parts[start:]) for start in range(1, len(file.parts)))
        number = next((known[end] for end in ends if end in known), None)
        if number is None:
            raise ConfigurationError(f"'{annotations}' has no image '{name}', nor one whose name '{file}' ends in.")
        if number in numbers.values():
            other = next(each for each in numbers if numbers[each] == number)
            raise ConfigurationError(f"'{annotations}' has one image for both '{other}' and '{name}'.")
        numbers[name] = number
    try:
        match = match_classes(classes, [category['name'] for category in categories])
    except ConfigurationError:
        raise ConfigurationError(f"'{annotations}' has none of the file's classes: {_join(classes)}.") from None
    return numbers, categories, {label: categories[other]['id']
                                 for label, other in zip(match.of_student, match.of_teacher)}


def _refuse_to_replace(out: Path, pictures: Mapping[str, Path], files: Mapping[str, Path], force: bool) -> None:
    """Refuses to replace what no prediction wrote, and the photographs themselves in any case."""
    for name, picture in pictures.items():
        if picture.resolve() == files[name]:
            raise ConfigurationError(f"'{out}' holds the photographs themselves: give another folder with --out.")
        refuse_to_replace(picture, lambda content: MADE_BY.encode() in content, 'a picture', force)
    own = MADE_BY.encode() in ((out / IMAGES).read_bytes() if (out / IMAGES).is_file() else b'')
    for name in (IMAGES, PREDICTIONS):
        refuse_to_replace(out / name, lambda content: own, 'predictions', force)


def _make_painter(classes: Names, threshold: float) -> Any:
    """Makes a function of a (height, width, channels) image, blue first, and what was found on it: a painted JPEG."""
    from mmdet.visualization import DetLocalVisualizer

    from kd_det.training.pictures import names_to_draw
    visualizer = DetLocalVisualizer(text_color=(255, 255, 255))
    visualizer.dataset_meta = dict(classes=names_to_draw(classes))

    def paint(image: np.ndarray, found: Detections) -> bytes:
        image = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))[..., ::-1])
        kept = found.scores >= threshold
        sample = DetDataSample(pred_instances=to_instances(Detections(*(each[kept] for each in found))))
        visualizer.line_width = max(2, round(max(image.shape) / 400))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a box that ends where the image does
            visualizer.add_datasample('prediction', image, sample, draw_gt=False, pred_score_thr=0)
        with BytesIO() as content:
            Image.fromarray(visualizer.get_image()).save(content, 'JPEG', quality=90, comment=MADE_BY)
            return content.getvalue()

    return paint


def _join(names: Sequence[str], most: int = 6) -> str:
    return ', '.join(names[:most]) + (f', … and {len(names) - most} more' if len(names) > most else '')
