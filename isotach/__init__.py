"""Isotach: language models whose time and memory per token do not grow with the context.

    from isotach import Decoder, Session

The names below load on first use, so that `import isotach` costs nothing and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotach.errors import UserError
    from isotach.infer.generate import Session
    from isotach.infer.sample import Sampling
    from isotach.models.decoder import Decoder, ModelConfig
    from isotach.models.presets import preset
    from isotach.models.state import DecoderState
    from isotach.ops.decay import Decay
    from isotach.ops.engine import Span, run
    from isotach.serve.engine import Engine

__version__ = "0.1.0"

_HOME = {
    "Decay": "isotach.ops.decay",
    "Decoder": "isotach.models.decoder",
    "DecoderState": "isotach.models.state",
    "Engine": "isotach.serve.engine",
    "ModelConfig": "isotach.models.decoder",
    "Sampling": "isotach.infer.sample",
    "Session": "isotach.infer.generate",
    "Span": "isotach.ops.engine",
    "UserError": "isotach.errors",
    "preset": "isotach.models.presets",
    "run": "isotach.ops.engine",
}

__all__ = [
    "Decay",
    "Decoder",
    "DecoderState",
    "Engine",
    "ModelConfig",
    "Sampling",
    "Session",
    "Span",
    "UserError",
    "preset",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'isotach' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
