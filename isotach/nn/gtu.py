"""Gated Toeplitz unit, (u ∘ mixed v) Wo + bo with u, v = silu(x Wu + bu), silu(x Wv + bv); mixing v is not its part.

Toeplitz Neural Network (arXiv:2305.04749).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isotach.nn.mixer import Stream, linear


class GTU(nn.Module):
    def __init__(self, width: int, mixed: int) -> None:
        super().__init__()
        self.u, self.v = linear(width, mixed, bias=True), linear(width, mixed, bias=True)
        self.out = linear(mixed, width, bias=True)

    def initialize(self, stream: Stream, std: float) -> None:
        """As released; `std` is for linear maps that are drawn otherwise."""
        initialize_uniform(self, stream)

    def project(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T C"]]:
        """v and u."""
        return F.silu(self.v(x)), F.silu(self.u(x))

    def output(self, o: Float[Tensor, "B T C"], u: Float[Tensor, "B T C"]) -> Float[Tensor, "B T D"]:
        return self.out(u * o)


@torch.no_grad()
def initialize_uniform(module: nn.Module, stream: Stream) -> None:
    """Linear maps inside `module` as PyTorch begins them: weights and biases uniform within ±1/√inputs."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for part, parameter in layer.named_parameters():
                parameter.uniform_(-bound, bound, generator=stream(f"{name}.{part}"))
