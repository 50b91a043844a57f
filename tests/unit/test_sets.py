"""The laws of mixers whose tokens have no order, and that each of them can fail."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isotach.ops.engine import Span
from isotach.testing import laws, sets
from isotach.testing.laws import Law
from isotach.testing.subjects import Hidden, Layer


class Unordered(Layer):
    """A mixer that reads tokens in order, told that they have none."""

    causal = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.causal = False

    def module(self, variant: str, dtype: torch.dtype) -> nn.Module:
        layer: Any = super().module(variant, dtype)
        layer.causal = False
        return layer


class Peeking(Unordered):
    """The first token to come counts a little more."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        output, state = super().run(variant, x, state, span, **how)
        return output + 1e-6 * x.x[:, :1], state


class Narrow(Unordered):
    """Tokens do not see the last one."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        zeroed = torch.cat([x.x[:, :-1], 0.99 * x.x[:, -1:]], 1)
        return super().run(variant, Hidden(zeroed), state, span, **how)


@pytest.mark.parametrize("name", ["linear", "cosformer", "vicinity"])
@pytest.mark.parametrize("law", [sets.order, sets.oracle])
def test_sets_obey(name: str, law: Any) -> None:
    cases = list(law(Unordered(name)))
    assert cases
    assert max(error for _, error in cases) <= laws.EXACT


@pytest.mark.parametrize(
    "law", [law for law in laws.LAWS if law.number in (3, 5, 8, 9, 11, 12)], ids=lambda law: law.number
)
@pytest.mark.parametrize("name", ["linear", "cosformer"])
def test_the_other_laws_hold_without_order(name: str, law: Law) -> None:
    verdict = laws.judge(law, Unordered(name))
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e} > {verdict.limit:.0e}"


@pytest.mark.parametrize(
    ("law", "subject"),
    [
        (sets.order, Unordered("lightning")),  # what fades is not a set
        (sets.oracle, Unordered("lightning")),
        (sets.order, Peeking("linear")),
        (sets.oracle, Narrow("linear")),
    ],
)
def test_planted_faults_are_found(law: Any, subject: Layer) -> None:
    assert max(error for _, error in law(subject)) > laws.EXACT
