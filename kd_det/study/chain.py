"""Trainings and measurements that follow one another in a folder, each done once, however often the whole is begun."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd_det.compat.writing import WritingError, write_whole
from kd_det.config import ConfigurationError
from kd_det.study.identity import sha256
from kd_det.study.runs import read_json
from kd_det.training.runs import RunResult

Run = tuple[Path, Path]  # config and checkpoint


class Chain:
    """What is finished, kept in a file.

    Args:
        out: The folder; exists.
        record: The name of the file.
        settings: All that the result depends on.
        what: The folder holds, for the message.
        log: Given a line on what is being done.

    Attributes:
        record: The content of the file: ``runs``, config and checkpoint of each step by name, and ``stages``, what was
            measured of each; JSON can hold it.

    Raises:
        WritingError: The folder holds the like with other settings.
    """

    def __init__(self, out: Path, record: str, settings: Mapping[str, Any], what: str, log: Callable[[str], None]
                 ) -> None:
        self.out, self.file, self.log = out, out / record, log
        new: dict[str, Any] = dict(identity=sha256(json.dumps(settings, default=str).encode()), runs={}, stages={})
        self.record = read_json(self.file) if self.file.is_file() else new
        if self.record.get('identity') != new['identity']:
            # What was refused before it left a checkpoint, such as a method that there is not, holds nothing.
            if self.record.keys() != new.keys() or self.record['runs'] or any(out.glob('*/last_checkpoint')):
                raise WritingError(f"'{out}' holds {what} of other settings: give another folder.")
            self.record = new
        self.save()  # or a training that is killed would go on with other settings

    def save(self) -> None:
        write_whole(self.file, json.dumps(self.record, indent=1))

    def once(self, name: str, make: Callable[[], Run]) -> Run:
        """Config and checkpoint that a step leaves, which is not done again."""
        found = [Path(each) for each in self.record['runs'].get(name, ())]
        if not found or not all(each.is_file() for each in found):
            self.log(f'{name} …')
            found = list(make())
            self.record['runs'][name] = [str(each) for each in found]
            self.save()
        return found[0], found[1]

    def train(self, name: str, folder: Path, train: Callable[..., RunResult]) -> Run:
        """Trains once, or goes on with what was begun; its best checkpoint counts.

        Args:
            name: Of the step.
            folder: The work dir.
            train: Given ``work_dir`` and ``resume``.

        Raises:
            ConfigurationError: The training keeps no checkpoints.
        """

        def make() -> Run:
            run = train(work_dir=folder, resume=(folder / 'last_checkpoint').is_file())
            best = run.best_checkpoint or run.checkpoint
            if run.config is None or best is None:
                raise ConfigurationError(f"'{name}': the training left no checkpoint in '{folder}'; it needs a "
                                         'CheckpointHook.')
            return run.config, best

        return self.once(name, make)
