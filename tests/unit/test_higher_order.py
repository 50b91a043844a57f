"""The higher-order families against their operators, written out as masked products of T × T matrices in float64."""

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from isotach import shapes
from isotach.ops.engine import Span, run
from isotach.ops.higher_order import SEGMENT, Asymmetric, SecondOrder, ThirdOrder, Tokens
from isotach.ops.history import History
from isotach.ops.recurrence import Recurrence, Tensors, at_time, length
from isotach.rng import generator

Rec = SecondOrder | Asymmetric | ThirdOrder
RECS: tuple[Rec, ...] = (SecondOrder(), Asymmetric(), ThirdOrder())
CHUNK = 16

every_rec = pytest.mark.parametrize("rec", RECS, ids=lambda rec: rec.name)
every_variant = pytest.mark.parametrize("variant", ["head", "token"])
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def example(time: int, variant: str = "token", *, batch: int = 2, width: int = 4, values: int = 5) -> Tokens:
    sizes = {"B": batch, "T": time, "H": 2, "K": width, "V": values}
    stream = generator(0, "higher order", variant, str(time))
    return shapes.example(Tokens, sizes, stream, draws=SecondOrder.ranges, shared=SecondOrder.variants[variant])


def affinities(x: Tokens) -> Tensor:
    """W (B, H, T, T): W_ti = q_t·k_i Π_{i<r≤t} γ_r for i ≤ t, else 0."""
    running = x.log_decay.expand(-1, length(x), -1, -1)[..., 0].cumsum(1).transpose(1, 2)
    decay = (running.unsqueeze(-1) - running.unsqueeze(-2)).tril().exp()
    return (torch.einsum("bthk,bshk->bhts", x.q, x.k) * decay).tril()


def second(x: Tokens) -> Tensor:
    w = affinities(x)
    return torch.einsum("bhts,bshv->bthv", (w @ w.mT).tril(), x.v)


def asymmetric(x: Tokens) -> Tensor:
    w = affinities(x)
    return torch.einsum("bhts,bshv->bthv", w @ w, x.v)


def third(x: Tokens) -> Tensor:
    w = affinities(x)
    return torch.einsum("bhts,bshv->bthv", (w @ w.mT).tril() @ w, x.v)


OPERATORS: dict[str, Callable[[Tokens], Tensor]] = {
    "secondorder": second,
    "asymmetric": asymmetric,
    "thirdorder": third,
}


@every_rec
@every_variant
@pytest.mark.parametrize("time", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_every_form_is_the_masked_operator(rec: Rec, variant: str, time: int) -> None:
    x = example(time, variant)
    expected = OPERATORS[rec.name](x)
    start = rec.initial(x, 2)
    span = Span.of(2, time)
    stepped, after = run(rec, x, start, span, backend="reference")
    chunked, state = run(rec, x, start, span, backend="torch", chunk_size=CHUNK)
    composed = rec.apply(rec.summarize(x), start)
    for output in (stepped, chunked, rec.read(x, start)):
        close(output, expected)
    for leaves in zip(after, state, composed, strict=True):
        close(leaves[1], leaves[0])
        close(leaves[2], leaves[0])


@every_rec
@every_variant
def test_gradients_are_those_of_the_masked_operator(rec: Rec, variant: str) -> None:
    x = Tokens(*(leaf.requires_grad_() for leaf in example(3 * CHUNK + 5, variant)))
    output, _ = run(rec, x, None, Span.of(2, length(x)), backend="torch", chunk_size=CHUNK)
    weights = torch.randn(output.shape, generator=generator(0, "weights"), dtype=torch.float64)
    expected = torch.autograd.grad(OPERATORS[rec.name](x), x, weights)
    for got, want in zip(torch.autograd.grad(output, x, weights), expected, strict=True):
        close(got, want, rtol=1e-9, atol=1e-9)


@every_rec
def test_a_token_sees_itself(rec: Rec) -> None:
    x = example(1)
    power = 3 if isinstance(rec, ThirdOrder) else 2
    close(run(rec, x, None, Span.of(2, 1))[0], (x.q * x.k).sum(-1, keepdim=True) ** power * x.v)


def test_the_asymmetric_form_follows_two_links() -> None:
    """b holds c; a asks for b; whoever asks for a finds c."""
    a, b, nobody = torch.eye(3, dtype=torch.float64)
    c = torch.tensor([3.0, -1.0], dtype=torch.float64)
    q, k = torch.stack([nobody, b, a]), torch.stack([b, a, nobody])
    v = torch.stack([c, c * 0, c * 0])
    x = Tokens(*(leaf[None, :, None] for leaf in (q, k, v)), torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    output, _ = run(Asymmetric(), x, None, Span.of(1, 3), backend="torch")
    assert torch.equal(output[0, 2, 0], c)


def bracketed(rec: Recurrence, parts: list[Tensors], order: random.Random) -> Tensors:
    """The parts composed in sequence, split at random places."""
    if len(parts) == 1:
        return parts[0]
    cut = order.randint(1, len(parts) - 1)
    return rec.compose(bracketed(rec, parts[:cut], order), bracketed(rec, parts[cut:], order))


@every_rec
@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_any_bracketing_of_the_scan_is_the_summary(rec: Rec, variant: str, seed: int) -> None:
    x = example(SEGMENT + 20, variant)
    lifted = rec.lift(x)
    whole = bracketed(rec, [at_time(lifted, t) for t in range(length(x))], random.Random(seed))
    for got, want in zip(rec.summarize(x), whole, strict=True):
        close(got, want)


def test_an_asymmetric_scan_that_fades_kq_is_not_associative() -> None:
    """As printed: R = ρ_B R_A + R_B."""
    rec, x = Asymmetric(), example(3)
    lifted = rec.lift(x)
    a, b, c = (at_time(lifted, t) for t in range(3))

    def printed(a: Tensors, b: Tensors) -> Tensors:
        return rec.compose(a, b)._replace(kq=b.log_decay.exp().unsqueeze(-1) * a.kq + b.kq)

    left, right = printed(printed(a, b), c), printed(a, printed(b, c))
    assert float((left.kz - right.kz).norm() / right.kz.norm()) > 0.01


def test_a_second_order_chunk_must_read_the_keys_before_it() -> None:
    """As printed, its queries q_j meet only the keys of the chunk: the term through S is missing."""
    rec, x = SecondOrder(), example(2 * CHUNK)
    expected = second(x)[:, CHUNK:]
    first, rest = shapes.time_slice(x, 0, CHUNK), shapes.time_slice(x, CHUNK, 2 * CHUNK)
    _, state = run(rec, first, None, Span.of(2, CHUNK))
    close(rec.read(rest, state), expected)
    printed = rec.read(rest, state._replace(kk=state.kk * 0))
    assert float((printed - expected).norm() / expected.norm()) > 0.1


def test_third_order_keeps_the_triples_that_the_printed_prefix_sums_drop() -> None:
    """They keep (i, u, j) only where i = j or u = j, so they lose the two factors' common strictly lower part."""
    x = example(3 * CHUNK, "head")._replace(log_decay=torch.zeros(2, 1, 2, 1, dtype=torch.float64))
    w = affinities(x)
    before = w.tril(-1)
    dropped = torch.einsum("bhts,bshv->bthv", (w @ before.mT).tril() @ before, x.v)
    output, _ = run(ThirdOrder(), x, None, Span.of(2, length(x)))
    close(output, third(x))
    assert float(dropped.norm() / output.norm()) > 0.5


@every_rec
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_gradient_reaches_the_future(rec: Rec, backend: str) -> None:
    time, now = 2 * CHUNK + 3, CHUNK + 4
    x = Tokens(*(leaf.requires_grad_() for leaf in example(time)))
    output, _ = run(rec, x, None, Span.of(2, time), backend=backend, chunk_size=CHUNK)  # type: ignore[arg-type]
    for grad in torch.autograd.grad(output[:, now].sum(), x):
        assert bool((grad[:, now + 1 :] == 0).all())
        assert bool((grad[:, now] != 0).any())


@every_rec
def test_half_precision_inputs_are_rounded_once(rec: Rec) -> None:
    """y and z stay wide between the passes: only the output is rounded."""
    x = Tokens(*(leaf.bfloat16() for leaf in example(40)))
    output, state = run(rec, x, None, Span.of(2, 40), backend="torch")
    exact, _ = run(rec, Tokens(*(leaf.double() for leaf in x)), None, Span.of(2, 40))
    assert {leaf.dtype for leaf in state} == {torch.float32}
    torch.testing.assert_close(output, exact.bfloat16(), rtol=2**-7, atol=1e-5 * float(exact.abs().max()))


@every_rec
def test_a_state_weighs_as_much_as_a_cache_of_64_or_96_tokens(rec: Rec) -> None:
    """Heads of 64, float32: (K + V) / 2 tokens of keys and values for two matrices, (K + V) 3 / 4 for three."""
    x = Tokens(*(leaf.float() for leaf in example(3, batch=1, width=64, values=64)))
    time = 96 if isinstance(rec, ThirdOrder) else 64
    kv = example(time, batch=1, width=64, values=64)
    _, cache = run(History(), History.Inputs(*(leaf.float() for leaf in kv[:3])), None, Span.of(1, time))
    assert sum(leaf.nbytes for leaf in rec.initial(x, 1)) == cache.k.nbytes + cache.v.nbytes


@every_rec
def test_a_decay_per_channel_is_refused(rec: Rec) -> None:
    x = example(3)
    with pytest.raises(ValueError, match=r"log_decay must be \(B, 1 or T, H, 1\)"):
        run(rec, x._replace(log_decay=x.log_decay.expand(-1, -1, -1, 4)), None, Span.of(2, 3))
