"""TransNormer: exact attention inside blocks in the first half of the layers, linear attention with a norm in the rest.

    DiagAttention    o_t = Σ_s w_ts v_s over the tokens s ≤ t of t's own block
        T1           w = relu(q_t · k_s / √K)            y = XNorm(o) Wo + bo
        T2           w = softmax_s(q_t · k_s / √K)       y = o Wo + bo
    NormAttention    S_t = S_{t-1} + k_tᵀ v_t            o_t = q_t S_t            y = XNorm(o) Wo + bo
        T1           q, k = R(elu(x W + b))
        T2           q, k = R(1 + elu(x W + b))

A sum of weights that may come near zero makes gradients unbounded; XNorm (SimpleRMSNorm over all heads) in its place
bounds them by 1/√eps, see tests/unit/test_transnormer.py. There is no 1/√K in NormAttention. R is LRPE, as published
a reflection that is drawn once, then a rotation by t θ_j with learned θ; it also turns q and k of DiagAttention. The
released models add sinusoidal embeddings to the tokens on top; Isotach does not.

The Devil in Linear Transformer (arXiv:2210.10340); LRPE (arXiv:2307.09270).
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from isotach.nn.feature_maps import feature_map, undecayed
from isotach.nn.mixer import Mixer, MixerConfig, Place, Scan, Stream, linear
from isotach.nn.norm import SRMSNorm
from isotach.nn.positions import LRPE, Basis, Core
from isotach.ops.decay import Decay
from isotach.ops.history import Blocks
from isotach.ops.recurrence import Recurrence, Tensors


class TransNormer(Mixer):
    class Config(MixerConfig):
        """type: which of the two published models; block: tokens of DiagAttention's blocks; diag: the layers that have
        DiagAttention, the others have NormAttention; core: of LRPE, what turns with the position; basis: of LRPE, the
        reflection or other unitary map before it.
        """

        type: Literal["t1", "t2"] = "t2"
        block: int = Field(64, ge=1)
        diag: Literal["first half", "all", "none"] = "first half"
        core: Core = "rotation"
        basis: Basis = "householder"

        @model_validator(mode="after")
        def _encodes(self) -> Self:
            if self.width // self.heads % 2 and self.core == "rotation":
                raise ValueError(
                    f"width / heads = {self.width // self.heads} is odd, and LRPE turns pairs; make it even"
                )
            if self.basis == "dft" and self.core != "complex":
                raise ValueError(f'basis = "dft" is complex, and core = "{self.core}" is not; set core = "complex"')
            return self

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(config, place)
        width, head, t1 = config.width, config.width // config.heads, config.type == "t1"
        self.heads = config.heads
        self.diag = config.diag == "all" or (config.diag == "first half" and place.index < place.depth / 2)
        self.recurrence: Recurrence = Decay()
        if self.diag:
            self.recurrence = Blocks(config.block, "relu" if t1 else "softmax")
        self.q, self.k, self.v, self.out = (linear(width, width, bias=True) for _ in range(4))
        self.map = feature_map("elu" if t1 else "elu1", heads=config.heads, width=head)
        self.encode = LRPE(head, core=config.core, basis=config.basis)
        self.norm = None if self.diag and not t1 else SRMSNorm(width)

    def initialize(self, stream: Stream, std: float) -> None:
        """Xavier, as released: NormAttention's q, k and v at 1/√2 of it; biases zero."""
        super().initialize(stream, std)
        gains = {"q": 1.0, "k": 1.0, "v": 1.0, "out": 1.0}
        if not self.diag:
            gains |= dict.fromkeys("qkv", 0.5**0.5)
        for name, gain in gains.items():
            nn.init.xavier_uniform_(getattr(self, name).weight, gain, generator=stream(f"{name}.weight"))

    def project(self, x: Tensor, scan: Scan) -> tuple[Tensors, None]:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if not self.diag:
            q, k = self.map(q), self.map(k)
        q, k = (self.encode(y, scan.span.positions) for y in (q, k))
        if not self.diag:
            return undecayed(q, k, v), None
        # The 1/√K is that of the heads' own width, which a complex core doubles.
        return Blocks.Inputs(q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v), None

    def output(self, o: Tensor, aux: None) -> Tensor:
        o = o.flatten(-2)
        return self.out(o if self.norm is None else self.norm(o))
