"""Asks the pipelines' own loaders for every image, before training does.

What reads an image is the pipeline: its transforms up to the one that puts ``img`` there. Whatever these read is sound,
be it an array of NumPy's or a TIFF of many bands; what they can not read is found here, and not hours later. What was
read is remembered in the work dir, by path, size and time, so that the next start takes a moment.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger

from kd_det.checks.environment import DiagnosisError, Finding
from kd_det.checks.image_reader import MOST_FAULTS, Look, Memory, Reader, gathered, loading_transforms, spread
from kd_det.compat.process import preserved_randomness
from kd_det.config.files import iterate_built_datasets, student_model

REMEDY = ("Replace it, or take it out of the annotations; if it is what it should be, begin the data set's pipeline "
          'with a transform that reads it')
NOTE_REMEDY = 'Correct the annotations or the images'
TURNED = 'turned by 90 degrees, as by an EXIF tag that only one of the two heeds'


@dataclass
class Report:
    """What was found out about the images of a data set.

    Attributes:
        faults: What stops a training.
        notes: What does not, and is worth to know.
        images: How many were looked at; 0 where there is nothing to ask for them.
        known: How many of them were read before.
    """
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    known: int = 0


def check_images(dataset: Any, memory: Memory | None = None, most: int | None = None,
                 channels: int | None = None) -> None:
    """Checks a built data set: that it holds images, and that its pipeline's own loader reads them.

    Each rank of a distributed run looks at its share; all end with the same error.

    Args:
        dataset: The data set.
        memory: What is known from before, and is added to.
        most: Look at so many images, evenly spread; at all by default.
        channels: That the student expects, see :func:`student_channels`.

    Raises:
        DiagnosisError: It is empty, or images are missing, damaged, or of other channels.
    """
    if len(dataset) == 0:
        raise DiagnosisError(
            'The data set is empty: no image has boxes of its classes. Run kd-det doctor on the config.')
    for leaf in iterate_built_datasets(dataset):
        report = look_at_images(leaf, memory or Memory(), most, channels)
        if report.faults:
            raise DiagnosisError('\n  '.join([*(f'{fault}.' for fault in report.faults), f'{REMEDY}.']))
        for note in report.notes:
            MMLogger.get_current_instance().warning(f'{note}.')


def inspect_images(datasets: Mapping[str, object], channels: int | None = None, memory: Memory | None = None,
                   most: int | None = None) -> Iterator[Finding]:
    """Whether the images of built data sets, by split, can be read; as :func:`check_images`, and the same arguments."""
    memory, told = memory or Memory(), set()
    for split, dataset in datasets.items():
        for leaf in iterate_built_datasets(dataset):
            report = look_at_images(leaf, memory, most, channels)
            findings = [*(Finding(f'{split} images', fault, REMEDY, fault=True) for fault in report.faults),
                        *(Finding(f'{split} images', note, NOTE_REMEDY) for note in report.notes)]
            yield from (finding for finding in findings if finding.found not in told)
            told.update(finding.found for finding in findings)


def student_channels(config: Config) -> int | None:
    """How many channels the student's images have, if its normalisation tells: one mean may stand for all channels."""
    mean = (student_model(config).get('data_preprocessor') or {}).get('mean')
    return len(mean) if isinstance(mean, (list, tuple)) and len(mean) > 1 else None


def look_at_images(dataset: Any, memory: Memory, most: int | None = None,
                   channels: int | None = None) -> Report:
    """Has the images of a data set read by the transforms of its pipeline that load.

    Args:
        dataset: Built, and no wrapper. Nothing is asked of one without a pipeline, or whose images lie elsewhere.
        memory: See :func:`check_images`, as for the others.
        most: Of the images.
        channels: That the student expects.
    """
    if most == 0 or not hasattr(dataset, 'get_data_info') or not len(dataset) or _lie_elsewhere(dataset):
        return Report()
    with preserved_randomness():
        transforms = loading_transforms(dataset)
        if not transforms:
            return Report()
        reader = Reader(dataset, transforms, memory)
        looks = gathered(reader.read(spread(len(dataset), most)), memory, reader.identity)
        report = Report(images=len(looks), known=sum(look.known for look in looks))
        report.faults = [look.fault for look in looks if look.fault][:MOST_FAULTS]
        report.faults += _channel_faults(dataset, looks, channels) if not report.faults else []
        skipped = [look.name for look in looks if look.shape is None and not look.fault]
        if skipped:  # the loader was told to pass over what it can not read
            text = f"{len(skipped)} of {len(looks)} images are skipped by their loader, such as '{skipped[0]}'"
            (report.notes if len(skipped) < len(looks) else report.faults).append(text)
        report.notes += _size_notes(looks) if reader.decodes_files else []
    return report


def _channel_faults(dataset: Any, looks: Sequence[Look], channels: int | None) -> list[str]:
    """Whether the images have one number of channels, the student's, when the pipeline is through with them."""
    first = {look.shape[2]: look for look in reversed(looks) if look.shape and look.shape[2]}
    if len(first) < 2 and (channels is None or channels in first):
        return []
    found = {}
    for look in first.values():
        try:
            results = dataset.pipeline(dataset.get_data_info(look.index))
        except Exception:  # of a transform that comes later, which is not asked here
            continue
        image = None if results is None else results.get('inputs', results.get('img'))
        if getattr(image, 'ndim', 0) == 3:
            found.setdefault(image.shape[0 if 'inputs' in results else 2], look.name)
    if len(found) > 1:
        return ['The images have different numbers of channels: ' + ', '.join(
            f"{count} in '{name}'" for count, name in sorted(found.items())) + ' (color_type of the loader decides)']
    return [f"The image '{name}' has {count} channels, and the student's data_preprocessor normalises {channels} "
            '(color_type of the loader decides, and the length of mean and std)'
            for count, name in found.items() if channels not in (None, count)]


def _size_notes(looks: Sequence[Look]) -> list[str]:
    """Whether images have another size than their annotations say, so that boxes lie elsewhere."""
    others = [look for look in looks if look.shape and look.annotated and tuple(look.annotated) != look.shape[:2]]
    if not others:
        return []
    (height, width), (read_height, read_width, _) = others[0].annotated, others[0].shape
    turned = f' ({TURNED})' if (height, width) == (read_width, read_height) else ''
    return [f'{len(others)} of {len(looks)} images have another size than their annotations say, so boxes lie '
            f"elsewhere: '{others[0].name}' is read as {read_width} x {read_height} pixels, its annotations say "
            f'{width} x {height}{turned}']


def _lie_elsewhere(dataset: Any) -> bool:
    """Whether the images come from a server, or from where a file client of MMEngine's finds them."""
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    clients = [getattr(each, name, None) for each in (dataset, *transforms)
               for name in ('backend_args', 'file_client_args')]
    path = dataset.get_data_info(0).get('img_path')
    return any(client and client.get('backend') != 'local' for client in clients) or '://' in str(path)
