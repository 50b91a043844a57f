"""Published architectures by name, and small ones of the same shape.

tnl-385m, tnl-0.4b and tnl-1b are the released configurations. tnl-7b has the released width and vocabulary; its depth,
heads and GLU reproduce the printed 6.8 B parameters. TransNormerLLM (arXiv:2307.14995). tnl-135m has the vocabulary,
width, depth and heads of SmolLM2-135M (arXiv:2502.02737) and as many parameters, to be timed beside it.
"""

from typing import Any

from isotach.config import nearest
from isotach.errors import UserError

BYTES = 257  # the byte tokenizer's vocabulary

PRESETS: dict[str, dict[str, Any]] = {
    "tnl-1m": {"vocab": BYTES, "width": 128, "depth": 4, "heads": 4, "hidden": 384},
    "tnl-10m": {"vocab": BYTES, "width": 320, "depth": 8, "heads": 5, "hidden": 880},
    "tnl-44m": {"vocab": BYTES, "width": 512, "depth": 12, "heads": 8, "hidden": 1536},
    "tnl-135m": {"vocab": 49152, "width": 576, "depth": 30, "heads": 9, "hidden": 1088},
    "tnl-385m": {"vocab": 50272, "width": 1024, "depth": 24, "heads": 8, "hidden": 2816},
    "tnl-0.4b": {"vocab": 64000, "width": 1024, "depth": 24, "heads": 8, "hidden": 2816},
    "tnl-1b": {"vocab": 64000, "width": 2048, "depth": 16, "heads": 16, "hidden": 5632},
    "tnl-7b": {"vocab": 64000, "width": 4096, "depth": 30, "heads": 32, "hidden": 11008},
}


def preset(name: str) -> dict[str, Any]:
    """The [model] table called `name`."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is not known; {nearest(name, PRESETS)}")
    return dict(PRESETS[name])
