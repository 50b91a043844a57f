"""A vision transformer over the same mixers: image -> logits of its classes.

    per stage:      x ← LayerNorm(conv(x))                         overlapping patches become rows × columns tokens
        per block:  x ← x + mixer(LayerNorm(x));  x ← x + MLP(LayerNorm(x))
                    x ← LayerNorm(x)
    logits = mean over tokens of x · W + b

    MLP(x) = W₂ gelu(c(W₁ x + b₁)) + b₂,  c a depthwise 3 × 3 convolution

Patches have no order: every mixer is told so, and those that read tokens in order are refused. The convolutions let
tokens know their neighbours, and there is no positional embedding. One stage is a plain vision transformer; `vvt` gives
the published ones of four.

Vicinity Vision Transformer (arXiv:2206.10552).
"""

import math
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from isotach import config as configuration
from isotach import mixers
from isotach.config import Config
from isotach.nn.mixer import MixerConfig, Place, Shared, Stream, initialize, linear
from isotach.ops.engine import Span
from isotach.rng import generator

Size = Annotated[int, Field(ge=1)]
Grid = tuple[int, int]


class Stage(Config):
    """Blocks at one resolution.

    width   D               depth  blocks           heads  per mixer
    hidden  of the MLP      patch  side of the patches that become tokens, in pixels or in tokens of the stage before
    """

    width: Size
    depth: Size
    heads: Size
    hidden: Size
    patch: Size


class VisionConfig(Config):
    """image    rows and columns of pixels       channels  per pixel          classes  to tell apart
    stages   from fine to coarse              pattern   mixers, repeated over all blocks
    options  a mixer's options, by its name; what follows from the image it is told
    """

    image: tuple[Size, Size]
    channels: Size = 3
    classes: Size
    stages: tuple[Stage, ...] = Field(min_length=1)
    pattern: tuple[str, ...] = Field(default=("vicinity",), min_length=1)
    options: dict[str, dict[str, Any]] = {}
    norm_eps: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if strangers := sorted(set(self.options) - set(self.pattern)):
            raise ValueError(
                f"options: {strangers[0]} is not in pattern = {list(self.pattern)}; add it, or leave it out"
            )
        for stage, grid in zip(self.stages, self.grids, strict=True):
            for name in self.pattern:
                self.mixer(name, stage, grid)
        return self

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of tokens in every stage."""
        grids, (rows, columns) = [], self.image
        for stage in self.stages:
            rows, columns = math.ceil(rows / stage.patch), math.ceil(columns / stage.patch)
            grids.append((rows, columns))
        return grids

    def mixer(self, name: str, stage: Stage, grid: Grid) -> MixerConfig:
        """The mixer's own configuration in a stage: what its Config asks for and the image decides, and its options."""
        kind = mixers.find(name)
        if not takes_sets(name):
            able = ", ".join(filter(takes_sets, mixers.names()))
            raise ValueError(f"pattern: {name} reads tokens in order, and patches have none; choose from {able}")
        known = {
            "width": stage.width, "heads": stage.heads, "causal": False,
            "rows": grid[0], "columns": grid[1], "length": math.prod(grid),
        }  # fmt: skip
        known = {key: value for key, value in known.items() if key in kind.Config.model_fields}
        options = self.options.get(name, {})
        if given := [key for key in known if key in options]:
            raise ValueError(f"options.{name}: {given[0]} follows from image and stages; leave it out")
        try:
            config: MixerConfig = kind.Config.model_validate(known | options)
        except ValidationError as error:
            raise ValueError(configuration.sentence(kind.Config, f"options.{name}", error)) from None
        return config


def takes_sets(name: str) -> bool:
    """Whether the mixer can read tokens that have no order."""
    kind = mixers.find(name)
    return not kind.causal or "causal" in kind.Config.model_fields


class Conv(nn.Conv2d):
    """A convolution drawn from a named stream, normal with variance 2 / fan-out, biases zero."""

    def reset_parameters(self) -> None:
        """Left to `initialize`."""

    def initialize(self, stream: Stream, std: float) -> None:
        fan_out = self.out_channels // self.groups * math.prod(self.kernel_size)
        with torch.no_grad():
            self.weight.normal_(0, math.sqrt(2 / fan_out), generator=stream("weight"))
            if self.bias is not None:
                self.bias.zero_()


class Patches(nn.Module):
    """Overlapping patches: a convolution of kernel 2 p - 1 and stride p, then LayerNorm."""

    def __init__(self, channels: int, width: int, patch: int, *, eps: float) -> None:
        super().__init__()
        self.conv = Conv(channels, width, 2 * patch - 1, stride=patch, padding=patch - 1)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, image: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B T D"]:
        return self.norm(self.conv(image).flatten(2).transpose(1, 2))


class MLP(nn.Module):
    """Two linear maps around a depthwise 3 × 3 convolution over the grid."""

    def __init__(self, width: int, hidden: int, grid: Grid) -> None:
        super().__init__()
        self.up, self.down = linear(width, hidden, bias=True), linear(hidden, width, bias=True)
        self.conv, self.grid = Conv(hidden, hidden, 3, padding=1, groups=hidden), grid

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        image = self.up(x).transpose(1, 2).unflatten(-1, self.grid)
        return self.down(F.gelu(self.conv(image)).flatten(2).transpose(1, 2))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: VisionConfig, stage: Stage, grid: Grid, place: Place) -> None:
        super().__init__()
        name = config.pattern[place.index % len(config.pattern)]
        self.mixer = mixers.find(name).build(config.mixer(name, stage, grid), place)
        self.mixer_norm, self.mlp_norm = (nn.LayerNorm(stage.width, eps=config.norm_eps) for _ in range(2))
        self.mlp = MLP(stage.width, stage.hidden, grid)

    def forward(self, x: Tensor, span: Span, shared: dict[str, Tensor]) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), None, span, shared)[0]
        return x + self.mlp(self.mlp_norm(x))


class Level(nn.Module):
    """A stage: patches, blocks and a norm, from an image (or the tokens of the stage before) to tokens."""

    def __init__(self, config: VisionConfig, index: int, places: list[Place]) -> None:
        super().__init__()
        stage, self.grid = config.stages[index], config.grids[index]
        channels = config.stages[index - 1].width if index else config.channels
        self.patches = Patches(channels, stage.width, stage.patch, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config, stage, self.grid, place) for place in places)
        self.norm = nn.LayerNorm(stage.width, eps=config.norm_eps)

    def forward(self, image: Float[Tensor, "B C Y X"], shared: dict[str, Tensor]) -> Float[Tensor, "B D rows columns"]:
        x = self.patches(image)
        span = Span.of(*x.shape[:2], device=x.device)
        for block in self.blocks:
            x = block(x, span, shared)
        return self.norm(x).transpose(1, 2).unflatten(-1, self.grid)


class Vision(nn.Module):
    """Weights are float32 and drawn from streams named (seed, parameter), as the language model's are."""

    def __init__(self, config: VisionConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.shared, self.levels = config, Shared(), nn.ModuleList()
        depths = [stage.depth for stage in config.stages]
        for index, depth in enumerate(depths):
            first = sum(depths[:index])
            places = [Place(first + i, sum(depths), self.shared) for i in range(depth)]
            self.levels.append(Level(config, index, places))
        self.head = linear(config.stages[-1].width, config.classes, bias=True)
        if not self.head.weight.is_meta:
            initialize(self, partial(generator, seed), config.init_std)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B classes"]:
        """Logits of the classes. Raises ValueError where images are not of the configured size."""
        expected = (self.config.channels, *self.config.image)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"vision: images must be (B, channels, rows, columns) = (B, {', '.join(map(str, expected))}); "
                f"got {tuple(images.shape)}; resize them, or give the model's `image` and `channels`"
            )
        shared: dict[str, Tensor] = {}
        for level in self.levels:
            images = level(images, shared)
        return self.head(images.mean((2, 3)))

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


# depths and hidden / width of the four stages, as released
_VVT = {
    "tiny": ((2, 2, 2, 2), (8, 8, 4, 4)),
    "small": ((3, 3, 9, 3), (8, 8, 4, 4)),
    "medium": ((3, 3, 27, 3), (8, 8, 4, 4)),
    "large": ((4, 4, 36, 4), (4, 4, 4, 4)),
}


def vvt(
    size: Literal["tiny", "small", "medium", "large"], *, image: Grid = (224, 224), classes: int = 1000
) -> VisionConfig:
    """A published Vicinity Vision Transformer."""
    shape = zip((96, 160, 320, 512), (1, 2, 5, 8), (4, 2, 2, 2), *_VVT[size], strict=True)
    stages = tuple(
        Stage(width=width, depth=depth, heads=heads, hidden=ratio * width, patch=patch)
        for width, heads, patch, depth, ratio in shape
    )
    return VisionConfig(image=image, classes=classes, stages=stages)
