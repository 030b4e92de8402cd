"""Keeps what takes long to find out beside the run that it is about."""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable

FOLDER = 'report'


def cached(folder: Path, name: str, depends_on: Any, make: Callable[[], Any]) -> Any:
    """Gives what was kept, or makes and keeps it.

    Args:
        folder: The run's work dir; the file is ``report/<name>.json`` within.
        name: Of the file.
        depends_on: What it follows from, as JSON can hold it: with anything else it is made anew.
        make: Makes it; returns what JSON can hold.
    """
    file = folder / FOLDER / f'{name}.json'
    identity = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
    if file.is_file():
        stored = json.loads(file.read_text(encoding='utf-8'))
        if stored.get('identity') == identity:
            return stored['content']
    content = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix('.partial')
    partial.write_text(json.dumps(dict(identity=identity, content=content)), encoding='utf-8')
    os.replace(partial, file)
    return content


def stamp(file: Path) -> list:
    """Tells a file from what it was before it was written again: its name, size and time."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]
