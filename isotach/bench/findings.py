"""A published finding, tried again: what its authors say, what was found here, and a verdict.

A script in benchmarks/findings measures one and writes it; documentation is made from the files. Training takes
minutes, so a script stores each part as soon as it is there, and goes on where it stopped.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from isotach.bench import report
from isotach.config import Config
from isotach.files import write_atomically

Verdict = Literal["reproduced", "partly reproduced", "not reproduced"]


class Comparison(Config):
    """One number: the authors' where they print one, ours, and what it is measured in."""

    what: str
    authors: float | None
    ours: float
    unit: str


class Finding(Config):
    """title: of its section; claim: what was published, in a sentence; source: where; setting: how it was tried here
    and what differs from the authors' setting; verdict, because: what came out, also when it is a failure; curves: what
    the picture draws.
    """

    name: str
    title: str
    claim: str
    source: str
    setting: str
    numbers: tuple[Comparison, ...]
    verdict: Verdict
    because: str
    curves: dict[str, Any] = {}
    seconds: float


def part(folder: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` gives, from folder/name.json when it was stored there before."""
    path = folder / f"{name}.json"
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found, indent=1).encode() + b"\n")
    return found


def save(finding: Finding, folder: Path) -> Path:
    """folder/NAME.json, with the machine and the commit that it was measured on."""
    document = {"machine": report.machine(), "commit": report.commit()} | finding.model_dump(mode="json")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path := folder / f"{finding.name}.json", json.dumps(document, indent=1).encode() + b"\n")
    return path
