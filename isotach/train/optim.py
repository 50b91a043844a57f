"""AdamW and Muon behind one object: parameter groups, one learning rate, a flat state that goes to disk as it is.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) replaces the momentum of a hidden matrix, M = U S V^T, by an
approximation of U V^T, so every direction moves equally far. The update is scaled by 0.2 sqrt(max(rows, columns)),
which gives it AdamW's root mean square (arXiv:2502.16982, section 2.2): one learning rate serves both.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from isotach.errors import UserError

MUON_MOMENTUM = 0.95  # Keller Jordan's post
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the same post: steepest at 0 that stays within about [0.7, 1.2]
NEWTON_SCHULZ_STEPS = 5


class Optimizer:
    """Updates a model's trainable parameters with AdamW, or with Muon where Muon is meant to work.

    Weight decay applies to matrices only: the weights of `nn.Linear`. Embeddings (also one tied to the output head),
    norms, biases and free parameters are not decayed. With `name="muon"`, Muon takes the matrices inside blocks,
    found as members of an `nn.ModuleList`; AdamW keeps the rest, the output head included.

    Args:
        model: where the parameters live; they must not be replaced afterwards, only changed in place.
        name: "adamw" or "muon".
        lr: peak learning rate, multiplied at every step by the schedule's value.
        betas: AdamW's two decay rates.
        weight_decay: decoupled: a matrix shrinks by lr * weight_decay per step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: Literal["adamw", "muon"] = "adamw",
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        self.lr = lr
        self.named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        matrices = matrix_names(model)
        hidden = matrices & block_names(model) if name == "muon" else set[str]()
        decayed = self._select(matrices - hidden)
        plain = self._select(self.named.keys() - matrices)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        # The fused kernel makes one pass over memory; the default for CPU is a Python loop with a dozen.
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        muon = [Muon(self._select(hidden), lr=lr, weight_decay=weight_decay)] if hidden else []
        self.parts: list[torch.optim.Optimizer] = [adamw, *muon]

    def step(self, multiplier: float) -> None:
        """One update from the gradients in place, at learning rate lr * multiplier."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * multiplier
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients (set to None)."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The live state as "parameter/slot" -> tensor, parameters by name: nothing depends on their order."""
        names: dict[Tensor, str] = {p: key for key, p in self.named.items()}
        return {
            f"{names[p]}/{slot}": value
            for part in self.parts
            for p, slots in part.state.items()
            for slot, value in slots.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave, to the bit.

        Raises UserError when a key names an unknown parameter or a tensor has the wrong shape.
        """
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for part in self.parts:
            part.state.clear()
        for key, value in state.items():
            name, _, slot = key.rpartition("/")
            p = self.named.get(name)
            if p is None or value.shape not in (p.shape, torch.Size()):
                raise UserError(
                    f"optimizer: expected state for the parameters of this model, got {key} {tuple(value.shape)}; "
                    "resume with the recipe that made the checkpoint"
                )
            owner[p].state[p][slot] = value.to(p.device, copy=True)

    def _select(self, names: Iterable[str]) -> list[nn.Parameter]:
        chosen = set(names)
        return [p for key, p in self.named.items() if key in chosen]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum on matrices (rows, columns); torch.optim.Muon always multiplies in bfloat16, slow
    on most CPUs and coarse, so this one orthogonalizes in float32 there (`orthogonalize`)."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; closures are not supported."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - MUON_MOMENTUM)
                update = orthogonalize(p.grad.lerp(momentum, MUON_MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """U f(S / |S|) V^T for matrix = U S V^T: singular values pushed towards 1 by five Newton-Schulz steps.

    Args:
        matrix: (rows, columns), floating; not changed.

    Returns:
        The same shape and dtype. Products run in the matrix's dtype on CPU and in bfloat16 on GPU.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix
    if tall := x.shape[0] > x.shape[1]:
        x = x.T  # the Gram matrix of the short side is the small one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def matrix_names(model: nn.Module) -> set[str]:
    """Names of the weights of `nn.Linear` modules that are not also an embedding's."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return {name for name, p in model.named_parameters() if id(p) in linears - embeddings}


def block_names(model: nn.Module) -> set[str]:
    """Names of the parameters inside the members of an `nn.ModuleList`: the repeated part of a network."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(p) for blocks in lists for p in blocks.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}
