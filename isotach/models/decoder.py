"""The one language model: tokens -> logits, with its memory as an explicit value.

    x ← embed(tokens) · √D
    per block:  x ← x + mixer(norm(x));  x ← x + ffn(norm(x))
    logits = head(norm(x))

Which mixer sits in which layer is a pattern of names, repeated over the depth; the channel mixer is the same in all.
Where nothing else is said it is as published for TransNormerLLM (arXiv:2307.14995): SimpleRMSNorm before each part and
at the end, a GLU, biases nowhere, weights from N(0, 0.02).
"""

import hashlib
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from isotach import config as configuration
from isotach import mixers, shapes
from isotach.config import Config
from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.models import quantize, step16
from isotach.models.block8 import Block8
from isotach.models.presets import preset
from isotach.models.state import DecoderState
from isotach.nn.ffn import Activation, ChannelMixer, Kind, channel_mixer
from isotach.nn.linear8 import Embedding8, Linear8
from isotach.nn.mixer import MixerConfig, MixerState, Place, Scan, Shared, initialize, linear
from isotach.nn.norm import SRMSNorm
from isotach.ops.engine import Span
from isotach.rng import generator

Norm = Literal["srms", "rms", "layer"]
NORMS: dict[Norm, type[nn.Module]] = {"srms": SRMSNorm, "rms": nn.RMSNorm, "layer": nn.LayerNorm}


class ModelConfig(Config):
    """[model] of a recipe. `preset = "tnl-1m"` fills in what is not given; a mixer's options are a table by its name.

    vocab    tokens the model knows            width   D               depth   blocks
    heads    per mixer; divides width          hidden  inside the ffn  pattern mixers, repeated over the depth
    tie      share embedding and head          scale_embedding         embeddings times √D; embed_norm: normalised
    ffn      channel mixer (nn/ffn.py)         activation, ffn_bias    of the GLU
    norm     srms; rms: with learned gains; layer: LayerNorm
    """

    vocab: int = Field(ge=1)
    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    hidden: int = Field(ge=1)
    pattern: tuple[str, ...] = Field(("lightning",), min_length=1)
    tie: bool = True
    scale_embedding: bool = True
    embed_norm: bool = False
    ffn: Kind = "glu"
    activation: Activation = "none"
    ffn_bias: bool = False
    norm: Norm = "srms"
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(0.02, gt=0)
    mixers: dict[str, MixerConfig] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        """Merge the preset, and collect [model.NAME] tables into `mixers`, each parsed by its mixer."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "mixers" in data:
            raise ValueError("unknown key mixers; write a mixer's options as a table by its name")
        if "preset" in data:
            name = data.pop("preset")
            if not isinstance(name, str):
                raise ValueError(f"preset: expected a name, got {name!r}")
            data = preset(name) | data
        options = {name: data.pop(name) for name in mixers.names() if name in data}
        pattern = data.get("pattern", ("lightning",))
        named = {name for name in pattern if isinstance(name, str)} if isinstance(pattern, list | tuple) else set()
        shape = {key: data[key] for key in ("width", "heads") if key in data}
        for name in sorted(set(options) | named):
            table = options.pop(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"{name}: expected a table of options, got {table!r}")
            if own := [key for key in ("width", "heads") if key in table]:
                raise ValueError(f"{name}: {own[0]} is the same for all mixers; set it in [model]")
            try:
                options[name] = mixers.find(name).Config.model_validate(shape | table)
            except ValidationError as error:
                if error.errors()[0]["loc"][:1] in (("width",), ("heads",)):
                    continue  # told below, where the key is the user's
                raise ValueError(configuration.sentence(mixers.find(name).Config, name, error)) from None
            if not (mixers.find(name).causal and getattr(options[name], "causal", True)):
                raise ValueError(
                    f"{name}: its tokens read later ones, which a language model has to predict; choose a causal mixer"
                )
        return data | {"mixers": options}

    @model_validator(mode="after")
    def _ffn_takes_its_options(self) -> Self:
        with torch.device("meta"):
            self.channel_mixer(Place(0, self.depth))
        return self

    @model_serializer(mode="wrap")
    def _flatten(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = serialize(self)
        del data["mixers"]
        for name, options in self.mixers.items():
            data[name] = options.model_dump(mode="json", exclude={"width", "heads"}, exclude_none=True)
        return data

    @classmethod
    def keys(cls) -> list[str]:
        return [*(set(cls.model_fields) - {"mixers"}), "preset", *mixers.names()]

    def mixer_of(self, layer: int) -> str:
        return self.pattern[layer % len(self.pattern)]

    def channel_mixer(self, place: Place) -> ChannelMixer:
        return channel_mixer(self.ffn, self.width, self.hidden, place, activation=self.activation, bias=self.ffn_bias)

    def normalization(self) -> nn.Module:
        return NORMS[self.norm](self.width, eps=self.norm_eps)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        name = config.mixer_of(place.index)
        self.mixer = mixers.find(name).build(config.mixers[name], place)
        self.mixer_norm, self.ffn_norm = config.normalization(), config.normalization()
        self.ffn = config.channel_mixer(place)

    def forward(
        self, x: Tensor, state: MixerState | None, span: Span, shared: dict[str, Tensor]
    ) -> tuple[Tensor, MixerState]:
        if state is not None and step16.serves(self, x, span):
            return step16.step(self, x, state, span)
        y, after = self.mixer(self.mixer_norm(x), state, span, shared)
        x, scan = x + y, Scan(state, span, shared)
        return x + self.ffn(self.ffn_norm(x), scan), after | scan.after

    def stored(self, name: str, context: int) -> tuple[int, int]:
        """Entries that the growing state called `name` holds after `context` tokens, and heads that read each."""
        if name == "cache" and self.mixer.cache is not None:
            return context // self.mixer.cache.config.segment, 1
        return self.mixer.recurrence.stored(context), self.mixer.heads

    def room(self, name: str, context: int) -> int:
        """Entries that its buffers need at most while it reads up to `context` tokens."""
        return self.stored(name, context)[0] if name == "cache" else self.mixer.recurrence.room(context)


class Decoder(nn.Module):
    """Weights are float32 and drawn from streams named (seed, parameter), so no layer shifts another's numbers.

    `recompute` trades time for memory: block activations are computed again in the backward pass.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.recompute = config, False
        self.embed = nn.utils.skip_init(nn.Embedding, config.vocab, config.width, device=torch.get_default_device())
        self.embed_norm = config.normalization() if config.embed_norm else nn.Identity()
        self.shared = Shared()
        self.blocks = nn.ModuleList(Block(config, Place(i, config.depth, self.shared)) for i in range(config.depth))
        self.norm = config.normalization()
        self.unembed = None if config.tie else linear(config.width, config.vocab)
        if not self.embed.weight.is_meta:
            initialize(self, partial(generator, seed), config.init_std)

    def forward(
        self, tokens: Int[Tensor, "B T"], state: DecoderState | None = None, *, span: Span | None = None
    ) -> tuple[Float[Tensor, "B T vocab"], DecoderState]:
        """Logits for the token after each, and the state after the last. The state given stays valid.

        state  one row per sequence (per document where span is packed); None for the empty past
        span   where the tokens sit; None continues every row of `state` where it stopped
        """
        hidden, state = self.hidden(tokens, state, span=span)
        return self.head(hidden), state

    def hidden(
        self, tokens: Int[Tensor, "B T"], state: DecoderState | None = None, *, span: Span | None = None
    ) -> tuple[Float[Tensor, "B T D"], DecoderState]:
        """As forward, but what the head reads instead of logits: (B, T, D)."""
        if quantize.is_bfloat16(self) and not torch.is_autocast_enabled(tokens.device.type):
            with torch.autocast(tokens.device.type, torch.bfloat16):
                return self.hidden(tokens, state, span=span)
        if span is None:
            span = Span.of(*tokens.shape, start=0 if state is None else state.positions, device=tokens.device)
        x = self.embed(tokens)
        if x.dtype == torch.bfloat16:
            x = x.float()
        if self.config.scale_embedding:
            x = x * self.config.width**0.5
        x = self.embed_norm(x)
        after = []
        shared: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[i]
            if self.recompute and torch.is_grad_enabled():
                x, own = checkpoint(block, x, before, span, shared, use_reentrant=False, preserve_rng_state=False)
            else:
                x, own = block(x, before, span, shared)
            after.append(own)
        return self.norm(x), DecoderState(tuple(after), _ends(span, state))

    def head(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T vocab"]:
        if quantize.is_bfloat16(self):
            hidden = hidden.to(torch.bfloat16)
        if self.unembed is not None:
            return self.unembed(hidden)
        if isinstance(self.embed, Embedding8):
            return self.embed.logits(hidden)
        return nn.functional.linear(hidden, self.embed.weight)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    # ---- what it is and what it costs

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs of one token with `context` tokens before it; a multiply-add counts twice.

        Matrices and head; 4 per number of a constant state (write, read); of every token that is stored, in a window
        or for good, 2 per head and channel of its key and of its value, and 2 per number of what it has besides.
        """
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear | Linear8))
        if self.unembed is None:
            matrices += self.embed.weight.numel()
        flops = 2.0 * matrices
        for dtype, sizes, heads in self._state_tensors(context):
            numbers = math.prod(size for _, size in sizes)
            stored = [size for axis, size in sizes if axis in ("S", "W")]
            channels = [size for axis, size in sizes if axis in ("K", "V")]
            if not dtype.is_floating_point:
                continue
            if not stored:
                flops += 4 * numbers
            else:
                flops += 2 * (heads * stored[0] * channels[0] if channels else numbers)
        return flops

    def state_bytes(self, context: int) -> int:
        """Bytes of one sequence's state after `context` tokens."""
        tensors = self._state_tensors(context)
        return sum(math.prod(size for _, size in sizes) * dtype.itemsize for dtype, sizes, _ in tensors)

    def stored(self, block: int, name: str, context: int) -> int:
        """Entries along S that the state called `name` of a block holds after `context` tokens."""
        return self._block(block).stored(name, context)[0]

    def room(self, block: int, name: str, context: int) -> int:
        """Entries along S that its buffers need at most while it reads up to `context` tokens."""
        return self._block(block).room(name, context)

    def _block(self, index: int) -> Block | Block8:
        block = self.blocks[index]
        assert isinstance(block, Block | Block8)
        return block

    def _state_tensors(self, context: int) -> Iterator[tuple[torch.dtype, list[tuple[str, int]], int]]:
        """Of all tensors of a sequence's state: dtype, sizes by axis after `context` tokens, heads that read them."""
        for i, states in enumerate(self.template().blocks):
            for name, state in states.items():
                entries, heads = self._block(i).stored(name, context)
                for field, declared in shapes.axes(type(state)).items():
                    leaf = getattr(state, field)
                    named = zip((axis.name for axis in declared), leaf.shape, strict=True)
                    yield leaf.dtype, [(axis, entries if axis == "S" else size) for axis, size in named], heads

    @torch.inference_mode()
    def template(self) -> DecoderState:
        """The state of one sequence after one token: which tensors there are, of which shapes and dtypes."""
        if self.device.type != "meta":
            return self.hidden(torch.zeros(1, 1, dtype=torch.int64, device=self.device))[1]
        # Mixers look at positions and lengths, which have no values there. Blocks in memory have the same states, and
        # take none of it while nothing touches their weights.
        x, modules, states = torch.zeros(1, 1, self.config.width), Shared(), []
        with torch.device("cpu"), _WithoutMatrices():
            for i in range(self.config.depth):
                block = Block(self.config, Place(i, self.config.depth, modules))
                states.append(block(x, None, Span.of(1, 1), {})[1])
        return DecoderState(tuple(states), torch.ones(1, dtype=torch.int64))

    @torch.inference_mode()
    def initial(self) -> DecoderState:
        """The state of one sequence before its first token; None stands for the same."""
        bounds = torch.tensor([0, 0, 1], device=self.device)  # an empty document, and another to have a token at all
        _, state = self.hidden(torch.zeros(1, 1, dtype=torch.int64, device=self.device), span=Span.packed(bounds))
        return state.select(torch.tensor([0], device=self.device))

    # ---- on disk

    @property
    def _config_text(self) -> str:
        return configuration.dumps(self.config)

    def fingerprint(self) -> str:
        """sha256 of configuration and weights, hex: the identity that states are bound to."""
        digest = hashlib.sha256(self._config_text.encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors, and config.toml where there is none yet, into an existing folder."""
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomically(Path(folder) / "model.safetensors", save(weights, {"format": "isotach-model-1"}))
        if not (Path(folder) / "config.toml").exists():
            table = configuration.dumps(_Model(model=self.config))
            write_atomically(Path(folder) / "config.toml", table.encode())

    @staticmethod
    def load(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Decoder":
        """The model in `folder`: config.toml's [model] and model.safetensors, in float32, int8, or on a GPU bfloat16.

        UserError where they do not fit.
        """
        text = Path(folder) / "config.toml"
        decoder = Decoder(
            configuration.parse(ModelConfig, configuration.read(text).get("model", {}), who=f"{text}: model")
        ).to(device)
        file = Path(folder) / "model.safetensors"
        try:
            weights = load_file(file)
            quantize.make_room(decoder, weights)
            decoder.load_state_dict(weights)
        except FileNotFoundError:
            raise UserError(f"{file}: expected the model's weights, found none; name a checkpoint folder") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: expected whole safetensors weights, got {error}; use another copy") from None
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{file}: the weights do not fit config.toml ({reason}); use another copy") from None
        return decoder


class _WithoutMatrices(TorchFunctionMode):
    """Linear maps give zeros, and do not read their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], len(weight))
        return func(*args, **(kwargs or {}))


class _Model(Config):
    model: ModelConfig


def _ends(span: Span, state: DecoderState | None) -> Tensor:
    """Position of the next token of every row or document; an empty document stays where it was."""
    if span.cu_seqlens is None:
        return span.positions[:, -1] + 1
    before = span.cu_seqlens.new_zeros(span.rows) if state is None else state.positions
    last = span.positions[0, (span.cu_seqlens[1:] - 1).clamp_min(0)]
    return torch.where(span.cu_seqlens.diff() > 0, last + 1, before)
