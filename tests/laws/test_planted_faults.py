"""A law that cannot fail proves nothing: each is shown a fault it must find."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isotach.ops import backends
from isotach.ops.decay import Decay
from isotach.ops.engine import Span
from isotach.testing import laws
from isotach.testing.subjects import Family, Layer


def broken(number: int, subject: Any) -> bool:
    (law,) = (law for law in laws.LAWS if law.number == number)
    return not laws.judge(law, subject).holds


class Undecayed(Decay):
    """The closed form forgets to fade the state that came before."""

    def read(self, x: Any, s: Any) -> Tensor:
        return super().read(x, Decay.State(s.state * 1.001))


class Reordered(Decay):
    """compose takes the later segment first."""

    def compose(self, a: Any, b: Any) -> Decay.Summary:
        return super().compose(b, a)


class Peeking(Family):
    """Every output sees the last token's value."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        output, state = super().run(variant, x, state, span, **how)
        return output + 1e-6 * x.v[:, -1:], state


class Remembering(Family):
    """State hidden in the object: a second call differs from the first."""

    calls = 0

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        output, state = super().run(variant, x, state, span, **how)
        return output + self.calls * 1e-9, state


class Leaking(Family):
    """Documents of a pack share one memory."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        if span.cu_seqlens is None:
            return super().run(variant, x, state, span, **how)
        first = None if state is None else Decay.State(state.state[:1])
        output, last = super().run(variant, x, first, Span(span.positions), **how)
        return output, Decay.State(last.state.expand(span.rows, -1, -1, -1))


class Truncating(Family):
    """Every second split loses the state."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        if int(span.positions[0, 0]) > 10:
            state = None
        return super().run(variant, x, state, span, **how)


class Narrow(Family):
    """The state is kept in the inputs' dtype."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        output, state = super().run(variant, x, state, span, **how)
        return output.float(), Decay.State(state.state.to(x.q.dtype))


class Unwritten(Family):
    """One output is whatever was in memory."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        output, state = super().run(variant, x, state, span, **how)
        return torch.cat([output[:, :-1], torch.empty_like(output[:, -1:])], 1), state


class Coarse(Family):
    """Float32 results rounded to bfloat16."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        output, state = super().run(variant, x, state, span, **how)
        return (output.bfloat16().float() if output.dtype == torch.float32 else output), state


class Detached(Family):
    """No gradient reaches the initial state."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        return super().run(variant, x, state and Decay.State(state.state.detach() + 0 * state.state), span, **how)


@pytest.mark.parametrize(
    ("number", "subject"),
    [
        (1, lambda: Family(Undecayed())),
        (2, lambda: Truncating(Decay())),
        (3, lambda: Leaking(Decay())),
        (4, lambda: Family(Reordered())),
        (5, lambda: Detached(Decay())),
        (6, lambda: Peeking(Decay())),
        (8, lambda: Narrow(Decay())),
        (8, lambda: Unwritten(Decay())),
        (9, lambda: Remembering(Decay())),
        (12, lambda: Coarse(Decay())),
    ],
)
def test_law_finds_its_fault(number: int, subject: Callable[[], Any]) -> None:
    assert broken(number, subject())


def test_law_7_finds_an_inaccurate_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(rec: Any, x: Any, s: Any, cu_seqlens: Tensor | None, chunk_size: int | None) -> tuple[Tensor, Any]:
        kernel = backends.find(Decay(), "torch", x, chunk_size)
        assert kernel is not None
        output, state = kernel(rec, x, s, cu_seqlens, chunk_size)
        return output.bfloat16().to(output.dtype), state

    monkeypatch.setitem(backends._kernels, (Decay, "triton"), backends.Entry(rounded, "cpu"))
    assert broken(7, Family(Decay()))


def test_law_10_finds_a_rank_that_starts_from_nothing() -> None:
    assert broken(10, AmnesicRanks(Decay()))


class AmnesicRanks(Family):
    """Ranks after the first forget the initial state."""

    def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
        if span.group is not None and span.group.rank() > 0 and state is not None:
            state = Decay.State(state.state * 0)
        return super().run(variant, x, state, span, **how)


def test_law_11_finds_a_graph_break() -> None:
    class Breaking(Layer):
        def run(self, variant: str, x: Any, state: Any, span: Span, **how: Any) -> tuple[Tensor, Any]:
            output, state = super().run(variant, x, state, span, **how)
            torch._dynamo.graph_break()
            return output, state

    assert broken(11, Breaking("lightning"))
