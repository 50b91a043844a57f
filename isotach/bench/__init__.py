"""One file in this folder that defines `measure` is one benchmark, and the file name is its name.

    measure(*, device: torch.device, ...) -> report.Result

It may take `presets` (models), `against` (names from peers.py), `rounds` and `minutes`, all with defaults; the command
line offers each option to those that take it. A benchmark with a picture also defines

    panels(document) -> Sequence[picture.Panel]

of what was stored. This file imports nothing heavy: the command line reads it before it knows what is wanted.
"""

import pkgutil
import re
from pathlib import Path


def names() -> tuple[str, ...]:
    """Every benchmark's name, sorted."""
    (folder,) = map(Path, __path__)
    files = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return tuple(sorted(name for name in files if _measures((folder / f"{name}.py").read_text(encoding="utf-8"))))


def _measures(source: str) -> bool:
    return re.search(r"^def measure\(", source, re.MULTILINE) is not None
