"""Boxes that any tool wrote as COCO results, as a guide: matched with the images, and moved as these are augmented.

The boxes are in pixels of the original images, and training images are flipped, resized, cropped and put together. So
they travel with the ground truth, through every transform, as boxes whose label is their row in the file
(:func:`insert_detections`), and are told apart when the batch has arrived (:meth:`Detections.detect`).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.transforms import Compose
from mmcv.transforms import LoadAnnotations as LoadAnnotationsOfMMCV
from mmdet.datasets.api_wrappers import COCO, COCOeval
from mmdet.datasets.transforms import LoadEmptyAnnotations, PackDetInputs
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.config import ConfigurationError
from kd_det.config.arguments import Names, Place, declared
from kd_det.config.classes import find_label_names, match_classes, read_categories
from kd_det.config.detectors import TeacherError
from kd_det.config.files import iterate_built_datasets
from kd_det.datasets import CARRIED, FIRST_ROW, LoadDetections, PackDetections, is_unlabelled
from kd_det.teachers.guide import Guide, Reading
from kd_det.teachers.results import (
    Results,
    index_names,
    is_same_file,
    list_some,
    read_file_names,
    read_results,
    to_key,
)

FEW = 0.05  # share of images that are the same in the file and in the data, in both less: they are of other data
BEYOND = 0.2  # share of boxes that reach beyond their image by more than a pixel: they are of other images
READS_LABELS = ('CopyPaste', 'RandomSamplingNegPos', 'LoadTextAnnotations')  # transforms that a row would lead astray


class Coverage(NamedTuple):
    """The images of one data set and where in a file their boxes stand.

    Attributes:
        dataset: The built data set.
        labelled: Whether it has ground truth.
        images: (I, ) of indices into the file's images; -1 for an image without boxes in it.
        counts: (I, ) of how many boxes are carried.
    """
    dataset: Any
    labelled: bool
    images: np.ndarray
    counts: np.ndarray


@MODELS.register_module()
class Detections(Guide):
    """Boxes of a file, for pseudo-labels: of a detector that can not be run here, of a segmenter, of people.

    The file holds COCO results: a list of ``{"image_id": 7, "category_id": 1, "bbox": [x, y, width, height],
    "score": 0.9}`` with boxes in pixels of the original images. Images are matched by id, where the results were made
    for the annotation file of the training data, or else by file name; classes by name. No network runs, so that a
    step costs what it does without a teacher.

    Args:
        file: The results.
        annotations: The COCO file whose images and categories the numbers in the results mean; by default that of the
            training data.
        classes: What the categories in the results are called, by number from 0 on; by default what ``annotations``
            calls them. Where numbers start at 1, begin with a name that is no class, such as ``'-'``.

    Attributes:
        boxes: (R, 4) of all boxes in the file, of x1, y1, x2, y2.

    Raises:
        ArgumentError: An argument does not fit.
    """

    detects = True

    @declared
    def __init__(self, file: Place, annotations: Place | None = None, classes: Names = ()) -> None:
        self.file, self.annotations, self._names = str(file), annotations, tuple(classes)
        self._score = 0.0
        self._results: Results | None = None
        self._coverage: list[Coverage] = []
        self._scores, self._labels = torch.zeros(0), torch.zeros(0, dtype=torch.long)

    @property
    def boxes(self) -> np.ndarray:
        return self.results.boxes

    @property
    def results(self) -> Results:
        """What the file holds; read once.

        Raises:
            TeacherError: It holds no COCO results.
        """
        if self._results is None:
            self._results = read_results(self.file)
        return self._results

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Detections:
        if self._names or self.annotations:  # else the training data tells
            self._take_names(self._name_categories(()))
        else:
            _ = self.results
        return self

    def _take_names(self, names: Mapping[str, str]) -> None:
        results, order = self.results, {key: label for label, key in enumerate(names)}
        self.classes, self.num_classes = tuple(names.values()), len(names)
        labels = np.array([order[key] for key in results.categories])
        self._scores, self._labels = torch.from_numpy(results.scores), torch.from_numpy(labels[results.category_of])

    def match(self, datasets: Sequence[Any], score: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Matches images and classes of the file with those of the training data.

        Args:
            datasets: Built data sets, no wrappers.
            score: The smallest score of a box that will be asked for.

        Returns:
            For each data set: (M, ) of rows of the file, those of an image one after the other, and (I, 2) of where
            among them those of each of its images begin and end.

        Raises:
            TeacherError: They are of other images, or what the numbers of its categories mean is not known.
        """
        self._take_names(self._name_categories(datasets))
        results, self._score, self._coverage = self.results, score, []
        sides = results.boxes[:, 2:] - results.boxes[:, :2]
        rows = np.flatnonzero((results.scores >= score) & (sides > 0).all(1))
        rows = rows[np.argsort(results.image_of[rows], kind='stable')]
        bounds = np.searchsorted(results.image_of[rows], np.arange(len(results.images) + 1))
        matched = []
        for dataset, images in zip(datasets, self._match_images(datasets)):
            spans = np.where(images[:, None] < 0, 0, np.stack([bounds[images], bounds[images + 1]], axis=1))
            self._coverage.append(Coverage(dataset, not is_unlabelled(dataset), images, spans[:, 1] - spans[:, 0]))
            matched.append((rows, spans))
        self._require_same_images(datasets, matched)
        return matched

    def _name_categories(self, datasets: Sequence[Any]) -> dict[str, str]:
        """The names of categories by their ids, as texts."""
        names: dict[str, str] = {}
        if self._names:
            names, source = dict(zip(map(str, range(len(self._names))), self._names)), 'classes'
        else:
            files = [self.annotations] if self.annotations else [
                getattr(each, 'ann_file', '') for each in datasets]
            source = f"'{files[0]}'"
            for file in dict.fromkeys(map(str, files)):
                try:
                    found = {to_key(key): name for key, name in read_categories(file).items()}
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise TeacherError(
                        f"What the category_id of '{self.file}' mean is not known: '{file}' is no COCO annotation file "
                        f'with categories ({type(error).__name__}: {error}). Name one that has them with '
                        'annotations=…, or their names with classes=[…].') from error
                differ = [key for key, name in found.items() if names.get(key, name) != name]
                if differ:
                    raise TeacherError(
                        f"category_id {differ[0]} of '{self.file}' may be '{names[differ[0]]}' or "
                        f"'{found[differ[0]]}': the training data's annotation files number their categories "
                        'differently. Name the file that the results were made for with annotations=….')
                names.update(found)
        unknown = [key for key in self.results.categories if key not in names]
        if unknown:
            raise TeacherError(
                f"'{self.file}' has boxes of category_id {list_some(unknown)}, and {source} names {list_some(names)}. "
                'Name the annotation file that the results were made for with annotations=…, or all their names, '
                "counted from 0, with classes=[…]; where they count from 1, with classes=['-', …].")
        return names

    def _match_images(self, datasets: Sequence[Any]) -> list[np.ndarray]:
        """For each image of each data set its index among the file's images; -1 where that has none."""
        infos = [[dataset.get_data_info(index) for index in range(len(dataset))] for dataset in datasets]
        ids = {key: index for index, key in enumerate(self.results.images)}
        if self.annotations is None:
            by_id = [np.array([ids.get(to_key(info.get('img_id')), -1) for info in group], int) for group in infos]
            if any((each >= 0).any() for each in by_id):
                self._require_one_meaning(infos)
                return by_id
            names = list(ids.items())
        else:
            names = [(name, ids[key]) for key, name in read_file_names(self.annotations).items() if key in ids]
        find = index_names(names)
        found = []
        for dataset, group in zip(datasets, infos):
            if self.annotations is not None and is_same_file(self.annotations, getattr(dataset, 'ann_file', '')):
                found.append(np.array([ids.get(to_key(info.get('img_id')), -1) for info in group], int))
            else:
                folder = str((getattr(dataset, 'data_prefix', None) or {}).get('img') or '')
                found.append(np.array([find(str(info.get('img_path', '')), folder) for info in group], int))
        return found

    def _require_one_meaning(self, infos: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Refuses ids that stand for several images."""
        paths: dict[str, str] = {}
        for info in (each for group in infos for each in group):
            key, path = to_key(info.get('img_id')), str(info.get('img_path'))
            if paths.setdefault(key, path) != path:
                raise TeacherError(f"image_id {key} of '{self.file}' may be '{paths[key]}' or '{path}': two of the "
                                   'training data sets have this id. Name the annotation file that the results were '
                                   'made for with annotations=…; then images are matched by file name.')

    def _require_same_images(self, datasets: Sequence[Any],
                             matched: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Refuses boxes of other images: of other ids and names, or of another size."""
        images = sum(len(each.images) for each in self._coverage)
        with_boxes = sum(int((each.images >= 0).sum()) for each in self._coverage)
        found = set().union(*(each.images[each.images >= 0].tolist() for each in self._coverage))
        if len(found) <= FEW * len(self.results.images) and with_boxes <= FEW * images:
            first = datasets[0].get_data_info(0) if len(datasets[0]) else {}
            raise TeacherError(
                f"'{self.file}' has boxes of {len(self.results.images):,} images, such as image_id "
                f"{self.results.images[0]}, and {len(found):,} of them are among the {images:,} of the training data, "
                f"such as {first.get('img_id')} ('{first.get('img_path')}'). If they are the same images under other "
                'ids, name the COCO file that the results were made for with annotations=…; otherwise the results are '
                "another data set's.")
        boxes, sizes = [], []
        for dataset, (rows, spans) in zip(datasets, matched):
            counts = spans[:, 1] - spans[:, 0]
            offsets = np.repeat(spans[:, 0] - np.cumsum(counts) + counts, counts)
            boxes.append(self.boxes[rows[offsets + np.arange(len(offsets))]])
            infos = map(dataset.get_data_info, np.flatnonzero(counts).tolist())
            sizes.append(np.repeat(np.array([[info.get('width') or np.inf, info.get('height') or np.inf]
                                             for info in infos], float).reshape(-1, 2), counts[counts > 0], axis=0))
        corners, limits = np.concatenate(boxes), np.concatenate(sizes)
        if not len(corners):
            return
        if corners.max() <= 1 < limits.min():
            raise TeacherError(f"All boxes of '{self.file}' end within the first pixel of their image: they are shares "
                               'of its width and height. COCO results are in pixels of the image.')
        beyond = (corners[:, 2:] > limits + 1).any(1) | (corners[:, :2] < -1).any(1)
        if beyond.mean() > BEYOND:
            sides = corners[:, 2:] - corners[:, :2]
            fit = (sides <= limits + 1).all() and (sides > corners[:, :2]).all()
            raise TeacherError(
                f"{int(beyond.sum()):,} of {len(beyond):,} boxes of '{self.file}' reach beyond their images"
                + (', and all would fit as corners x1, y1, x2, y2: COCO results are x, y, width, height' if fit else
                   ': they are of other images that have the same ids, or of images of another size')
                + '. Write them anew, in pixels of the images that the training data lists.')

    def detect(self, images: Tensor, data_samples: Sequence) -> list[InstanceData]:
        found = []
        for sample in data_samples:
            carried = sample.metainfo.get(CARRIED)
            if carried is None and self._coverage:
                raise TeacherError(f"An image came without the boxes of '{self.file}': some hook or wrapper exchanged "
                                   'the pipeline of the training data, which had been prepared to bring them.')
            # Noise of a dry run, or an image that is only looked at, has none.
            carried = sample.gt_instances[len(sample.gt_instances) - (carried or 0):]
            boxes, rows = getattr(carried.bboxes, 'tensor', carried.bboxes), carried.labels - FIRST_ROW
            self._scores, self._labels = self._scores.to(rows.device), self._labels.to(rows.device)
            found.append(InstanceData(bboxes=boxes, scores=self._scores[rows], labels=self._labels[rows]))
        return found

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Detections:
        self._scores, self._labels = function(self._scores), function(self._labels)
        return self

    def report(self, runner: Any, images: int, min_map: float) -> str | None:
        if not self._coverage:  # pseudo-labels of no weight
            return None
        counts = np.concatenate([each.counts for each in self._coverage])
        lines = [f"'{self.file}' has {int(counts.sum()):,} boxes of a score of {self._score:g} or more on "
                 f'{int((counts > 0).sum()):,} of the {len(counts):,} training images '
                 f'({(counts > 0).mean():.1%}).']
        used = set().union(*(each.images.tolist() for each in self._coverage))
        unused = len(set(range(len(self.results.images))) - used)
        if unused:
            lines.append(f'{unused:,} of its {len(self.results.images):,} images are not in the training data.')
        found = {self.classes[label] for label in self._labels.unique().tolist()} if self.classes else set()
        names = next(filter(None, (find_label_names(each.dataset) for each in self._coverage)), None)
        if names is not None:
            match = match_classes(names, [name for name in self.classes if name in found])
            missing = [name for label, name in enumerate(names) if label not in match.of_student]
            if missing:
                lines.append(f'It has no box of {list_some(missing)}.')
            skill = self._evaluate(names, images)
            if skill is not None:
                lines.append(f'Against the ground truth of up to {images} training images all its boxes reach mAP '
                             f'{skill[0]:.3f}, mAP_50 {skill[1]:.3f}.')
                if skill[0] < min_map:
                    raise TeacherError(
                        f"Pre-flight: {' '.join(lines)} That is less than min_map={min_map:g}. Its boxes are of other "
                        'images, of other classes than their numbers say, or not in pixels of the original images. '
                        'Look at some; to train all the same, set default_hooks.distill.preflight=None, or lower its '
                        'min_map.')
        return ' '.join(lines)

    def _evaluate(self, names: Sequence[str], images: int) -> tuple[float, float] | None:
        """COCO's mAP and mAP_50 on the first labelled images that have boxes; None where none has."""
        match, boxes = match_classes(names, self.classes), self.boxes.astype(float)
        students, labels = dict(zip(match.of_teacher, match.of_student)), self._labels.tolist()
        truth, found, entries = [], [], []
        for dataset, place, image in self._list_labelled():
            if len(entries) == images:
                break
            objects = dataset.get_data_info(place).get('instances') or ()
            if all(each.get('ignore_flag') for each in objects):
                continue
            entries.append(dict(id=len(entries)))
            for each in objects:
                x1, y1, x2, y2 = each['bbox']
                truth.append(dict(id=len(truth) + 1, image_id=entries[-1]['id'], category_id=each['bbox_label'],
                                  bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1),
                                  iscrowd=int(bool(each.get('ignore_flag')))))
            for row in np.flatnonzero(self.results.image_of == image).tolist():
                label = students.get(labels[row])
                if label is not None:
                    x1, y1, x2, y2 = boxes[row]
                    found.append(dict(image_id=entries[-1]['id'], category_id=label, bbox=[x1, y1, x2 - x1, y2 - y1],
                                      score=float(self.results.scores[row])))
        if not truth:
            return None
        if not found:
            return 0.0, 0.0
        with redirect_stdout(StringIO()):  # pycocotools tells how long it took
            api = COCO()
            api.dataset = dict(images=entries, annotations=truth, info={},
                               categories=[dict(id=label, name=name) for label, name in enumerate(names)])
            api.createIndex()
            evaluation = COCOeval(api, api.loadRes(found), 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(evaluation.stats[0]), float(evaluation.stats[1])

    def _list_labelled(self) -> Iterator[tuple[Any, int, int]]:
        for each in self._coverage:
            if each.labelled:
                yield from ((each.dataset, place, image) for place, image in enumerate(each.images.tolist()))


def insert_detections(dataset: Any, guide: Detections, score: float = 0.0, hooks: Sequence[Any] = ()) -> None:
    """Lets the images of a data set come with the boxes that a file has for them, however they are augmented.

    The pipelines of the built data sets are changed: each that loads ground truth loads the boxes of the file beside
    it, as boxes whose labels are rows of the file, and each that packs puts them last;
    :func:`~kd_det.datasets.drop_detections` takes them out again. Call it before the workers of a loader start.

    Args:
        dataset: The training data, wrappers included.
        guide: Whose boxes to insert.
        score: The smallest score of a box that will be asked for.
        hooks: Of the run; the pipeline that one of them switches to is changed, too.

    Raises:
        ConfigurationError: A pipeline can not carry boxes.
        TeacherError: The boxes are of other images; see :meth:`Detections.match`.
    """
    leaves: list[Any] = list({id(leaf): leaf for leaf in iterate_built_datasets(dataset)}.values())
    for leaf, (rows, spans) in zip(leaves, guide.match(leaves, score)):
        load = partial(LoadDetections, boxes=guide.boxes, rows=rows, spans=spans)
        _insert_load(leaf.pipeline.transforms, load)
        # MMDetection's hook sets the pipeline of the outermost data set, and HeldOut passes that on.
        for hook in hooks if getattr(dataset, 'pipeline', None) is leaf.pipeline else ():
            if getattr(hook, 'switch_pipeline', None):
                hook.switch_pipeline = Compose(hook.switch_pipeline).transforms
                _insert_load(hook.switch_pipeline, load)
                _insert_pack(hook.switch_pipeline)
    if not _insert_into_wrappers(dataset):
        raise ConfigurationError('The boxes of a file travel with the images up to PackDetInputs, and the training '
                                 'pipeline has none: end it with PackDetInputs.')


def _insert_load(transforms: list, load: Callable[[Any], LoadDetections]) -> None:
    """Lets the boxes be loaded after the ground truth, or first of all where no transform loads that."""
    for index, transform in enumerate(transforms):
        if isinstance(transform, LoadDetections):  # of an earlier call
            transforms[index] = load(transform.load)
            return
        if isinstance(transform, (LoadAnnotationsOfMMCV, LoadEmptyAnnotations)):
            if getattr(transform, 'with_mask', False):
                raise ConfigurationError(
                    'The boxes of a file have no masks, and the training pipeline loads those of the ground truth: '
                    'leave with_mask=True out of LoadAnnotations, or take no Detections.')
            transforms[index] = load(transform)
            return
    transforms.insert(0, load(None))


def _insert_into_wrappers(dataset: Any) -> bool:
    """Lets every pipeline within a data set that packs put the boxes last; whether each image passes one that does."""
    inner = getattr(dataset, 'datasets', None) or getattr(dataset, 'dataset', None)
    transforms = getattr(dataset, 'pipeline', None)
    transforms = getattr(transforms, 'transforms', transforms)
    own = _insert_pack(transforms) if isinstance(transforms, list) else False
    if not hasattr(inner, '__getitem__') or isinstance(inner, str):
        return own
    found = [_insert_into_wrappers(each) for each in (inner if isinstance(inner, (list, tuple)) else [inner])]
    return own or all(found)


def _insert_pack(transforms: list) -> bool:
    found = False
    for index, transform in enumerate(transforms):
        if type(transform).__name__ in READS_LABELS:
            raise ConfigurationError(f'{type(transform).__name__} of the training pipeline looks up what the labels of '
                                     'boxes mean, and those of a file travel as rows: leave it out, or take no '
                                     'Detections.')
        if isinstance(transform, PackDetections):  # one pipeline may serve two data sets
            found = True
        elif isinstance(transform, PackDetInputs):
            transforms[index], found = PackDetections(transform), True
        else:
            for inner in _list_inner(transform):
                found = _insert_pack(inner) or found
    return found


def _list_inner(transform: Any) -> Iterator[list]:
    """The lists of transforms within one."""
    inner = getattr(transform, 'transforms', None)
    for each in inner if isinstance(inner, (list, tuple)) else ():
        if isinstance(each, list):
            yield each
        elif isinstance(each, Compose):
            yield each.transforms
    if isinstance(inner, list):
        yield inner
