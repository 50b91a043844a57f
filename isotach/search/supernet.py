"""All patterns in one model: every layer holds one mixer of each choice, and the chosen one runs.

A supernet is a Decoder whose blocks' mixers are `Choice`s, so it trains as any other, though what it saves only loads
into a supernet. Norms, GLUs and embeddings are shared by all patterns, and nothing is added. Weights are drawn from the
streams of an ordinary model's: before training every sub-model is, to the bit, the Decoder of its pattern and seed.

"Neural Architecture Search on Efficient Transformers and Beyond" (2022) trains one random sub-model per update.
"""

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from isotach import mixers
from isotach.models.decoder import Decoder, ModelConfig
from isotach.nn.mixer import Mixer, MixerState, Place, Stream, initialize
from isotach.ops.engine import Span
from isotach.rng import generator
from isotach.search.recipe import Pattern


class Choice(nn.ModuleDict):
    """One layer's mixers by name. Those that are not `chosen` neither run nor get a gradient."""

    def __init__(self, layers: Mapping[str, Mixer]) -> None:
        super().__init__(layers)
        self.chosen = next(iter(layers))

    def forward(
        self, x: Tensor, state: MixerState | None, span: Span, shared: dict[str, Tensor]
    ) -> tuple[Tensor, MixerState]:
        mixed: tuple[Tensor, MixerState] = self[self.chosen](x, state, span, shared)
        return mixed

    def initialize(self, stream: Stream, std: float) -> None:
        """Every mixer from the streams that it would have if it were the layer's only one."""
        for mixer in self.values():
            cast(Mixer, mixer).initialize(stream, std)


def supernet(model: ModelConfig, *, seed: int) -> Decoder:
    """The decoder that holds every pattern of the mixers in `model.pattern`; the first of them is chosen everywhere."""
    decoder = Decoder(model, seed=seed)
    for i, block in enumerate(decoder.blocks):
        place = Place(i, model.depth, decoder.shared)
        block.mixer = Choice({name: mixers.find(name).build(model.mixers[name], place) for name in model.pattern})
    initialize(decoder, partial(generator, seed), model.init_std)
    return decoder


def choose(net: Decoder, pattern: Pattern) -> None:
    """Make a supernet the sub-model with this pattern, one name per layer."""
    for block, name in zip(net.blocks, pattern, strict=True):
        assert isinstance(block.mixer, Choice)
        block.mixer.chosen = name


def draw(choices: Pattern, depth: int, stream: torch.Generator) -> Pattern:
    """A pattern, uniform in every layer."""
    return tuple(choices[i] for i in torch.randint(len(choices), (depth,), generator=stream).tolist())
