"""A layer read whole, in pieces and token by token, for comparison with a peer."""

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isotach.mixers import find
from isotach.nn.mixer import Mixer, MixerState, Place, initialize
from isotach.ops.engine import Span
from isotach.rng import generator


def normal(*shape: int, name: str = "x", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(0, name), dtype=torch.float64).to(dtype)


def built(name: str, *, place: Place | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Mixer:
    """The mixer called `name` with weights from fixed streams."""
    cls = find(name)
    layer = cls(cls.Config(**options), place or Place(0, 1))
    initialize(nn.ModuleDict({"layer": layer}), lambda parameter: generator(0, parameter), 0.3)
    return layer.to(dtype)


def three_forms(layer: Mixer, x: Tensor) -> dict[str, Tensor]:
    """Outputs (B, T, D) of the same tokens, by how they were cut."""
    time = x.shape[1]
    cuts = {"whole": [time], "pieces": [time // 3, 1, time - time // 3 - 1], "stepped": [1] * time}
    return {name: _through(layer, x, sizes) for name, sizes in cuts.items()}


def _through(layer: Mixer, x: Tensor, sizes: list[int]) -> Tensor:
    state: MixerState | None = None
    outputs, start = [], 0
    for part in x.split(sizes, 1):
        output, state = layer(part, state, Span.of(x.shape[0], part.shape[1], start=start))
        outputs.append(output)
        start += part.shape[1]
    return torch.cat(outputs, 1)


def flash_linear_attention(operator: str) -> ModuleType:
    """Its plain version of `operator`; skips where it is absent. Read by file: the package imports triton at once."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed")
    file = f"{package.submodule_search_locations[0]}/ops/{operator}/naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{operator}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
