"""What an inspection found, and the error that several of them make."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: What was looked at.
        found: What it is like.
        remedy: What to do about it; empty where all is well.
        fault: Whether a run would fail, or be worthless, as long as nothing is done.
    """
    subject: str
    found: str
    remedy: str = ''
    fault: bool = False


class DiagnosisError(ValueError):
    """A run would fail; the message lists why, and what to do."""


def raise_faults(findings: Iterable[Finding]) -> None:
    """Raises a :class:`DiagnosisError` that lists the faults and, once each, their remedies, if there are any."""
    faults = [finding for finding in findings if finding.fault]
    if faults:
        lines = [f'{finding.subject}: {finding.found}'
                 + ('' if '\n' in finding.found or finding.found.endswith('.') else '.') for finding in faults]
        remedies = dict.fromkeys(f'{finding.remedy}.' for finding in faults)
        raise DiagnosisError('\n  '.join([*lines, *remedies]))
