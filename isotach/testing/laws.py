"""The laws that make a recurrence one thing in many forms, checked on random and on hard examples.

Each law yields (case, error): the largest relative difference it saw. Laws 1-6, 9 and 10 are exact, so they are
checked in float64 and only rounding is forgiven; 12 says what float32 may cost.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isotach import shapes
from isotach.ops.engine import Span
from isotach.ops.recurrence import Recurrence, Tensors, at_time, length
from isotach.testing.subjects import SIZES, Family, Layer, Subject

EXACT = 1e-11  # float64 rounding of sums of a few hundred terms
Case = tuple[str, float]


@dataclass(frozen=True)
class Law:
    number: int
    title: str
    tolerance: float
    check: Callable[[Subject], Iterator[Case]]


class Verdict(NamedTuple):
    subject: str
    number: int
    title: str
    backends: tuple[str, ...]
    cases: int
    error: float
    limit: float
    worst: str
    holds: bool


LAWS: list[Law] = []


def judge(law: Law, subject: Subject) -> Verdict:
    """Check one law of one subject; a law that does not concern it has no cases, one that raises is broken."""
    try:
        cases = list(law.check(subject))
    except Exception as error:  # noqa: BLE001 (the reason goes into the verdict, and the other laws are still checked)
        cases = [(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", math.inf)]
    worst, largest = max(cases, key=lambda case: case[1], default=("", 0.0))
    return Verdict(
        subject=f"{subject.name} {type(subject).__name__.lower()}",
        number=law.number,
        title=law.title,
        backends=subject.backends(),
        cases=len(cases),
        error=largest,
        limit=law.tolerance,
        worst=worst,
        holds=largest <= law.tolerance,
    )


def law(number: int, title: str, *, tolerance: float = EXACT) -> Callable[..., Any]:
    def add(check: Callable[[Subject], Iterator[Case]]) -> Callable[[Subject], Iterator[Case]]:
        LAWS.append(Law(number, title, tolerance, check))
        return check

    return add


@law(1, "recurrent = parallel = chunked")
def forms(subject: Subject) -> Iterator[Case]:
    if not subject.causal:
        return
    time = SIZES["T"]
    for variant, hard, x, past in _examples(subject):
        span = Span.of(SIZES["B"], time, start=3)
        steps, state = [], past
        for t in range(time):
            now = shapes.time_slice(x, t, t + 1)
            output, state = subject.run(variant, now, state, Span.of(SIZES["B"], 1, start=3 + t))
            steps.append(output)
        expected = [torch.cat(steps, 1), *subject.leaves(state)]
        if isinstance(subject, Family):
            after = subject.rec.apply(subject.rec.summarize(x), past)
            yield (
                f"{_case(variant, hard)} parallel",
                error([subject.rec.read(x, past), *subject.leaves(after)], expected),
            )
        for backend in subject.backends():
            for chunk in (None, 1, 3, 16, time + 5) if isinstance(subject, Family) else (None,):
                output, state = subject.run(variant, x, past, span, backend=backend, chunk_size=chunk)
                yield f"{_case(variant, hard)} {backend} {chunk}", error([output, *subject.leaves(state)], expected)


@law(2, "split anywhere, same outputs and state")
def splits(subject: Subject) -> Iterator[Case]:
    if not subject.causal:
        return
    time = SIZES["T"]
    for variant, hard, x, past in _examples(subject):
        for backend in subject.backends():
            whole, end = subject.run(variant, x, past, Span.of(SIZES["B"], time, start=3), backend=backend)
            for cut in (1, 16, 17, time - 1):
                first, state = subject.run(
                    variant, shapes.time_slice(x, 0, cut), past, Span.of(SIZES["B"], cut, start=3), backend=backend
                )
                rest = Span.of(SIZES["B"], time - cut, start=3 + cut)
                second, state = subject.run(variant, shapes.time_slice(x, cut, time), state, rest, backend=backend)
                outputs = torch.cat([first, second], 1)
                yield (
                    f"{_case(variant, hard)} {backend} at {cut}",
                    error([outputs, *subject.leaves(state)], [whole, *subject.leaves(end)]),
                )


@law(3, "packed = separate")
def packing(subject: Subject) -> Iterator[Case]:
    for variant in subject.variants:
        for bounds in ([0, 1, 2, 18, 18, 37], list(range(38)), [0, 37]):
            sizes = SIZES | {"B": 1, "T": 37}
            x, rows = subject.example(variant, sizes, torch.float64), len(bounds) - 1
            past = subject.past(variant, rows, torch.float64)
            span = Span.packed(torch.tensor(bounds), start=torch.full((rows,), 3))
            separate, ends = [], []
            for n in range(rows):
                own = subject.rebuild(past, [type(s)(*(leaf[n : n + 1] for leaf in s)) for s in subject.states(past)])
                start, stop = bounds[n], bounds[n + 1]
                if stop > start:
                    part = shapes.time_slice(x, start, stop)
                    output, own = subject.run(variant, part, own, Span.of(1, stop - start, start=3))
                    separate.append(output)
                ends.append(subject.leaves(own))
            for backend in subject.backends():
                output, state = subject.run(variant, x, past, span, backend=backend)
                packed = [[*leaf] for leaf in zip(*(_rows(subject, state, n) for n in range(rows)), strict=True)]
                alone = [[*leaf] for leaf in zip(*ends, strict=True)]
                yield (
                    f"{variant} {backend} {rows} documents",
                    max(
                        error([output], [torch.cat(separate, 1)]),
                        *(error(a, b) for a, b in zip(packed, alone, strict=True)),
                    ),
                )


@law(4, "summaries compose")
def composition(subject: Subject) -> Iterator[Case]:
    if not isinstance(subject, Family):
        return
    rec = subject.rec
    for variant, hard, x, past in _examples(subject):
        lifted = rec.lift(x)
        a, b, c = (at_time(lifted, t) for t in range(3))
        left, right = rec.compose(rec.compose(a, b), c), rec.compose(a, rec.compose(b, c))
        yield f"{_case(variant, hard)} associative", error(list(left), list(right))
        one = rec.neutral(x)
        for composed in (rec.compose(one, a), rec.compose(a, one)):
            yield f"{_case(variant, hard)} neutral", error(list(composed), list(a))
        derived = Recurrence.summarize(rec, x)
        yield f"{_case(variant, hard)} summarize", error(list(rec.summarize(x)), list(derived))
        derived_read = Recurrence.read(rec, x, past)
        yield f"{_case(variant, hard)} read", error([rec.read(x, past)], [derived_read])
        cut = length(x) // 2
        parts = (shapes.time_slice(x, 0, cut), shapes.time_slice(x, cut, length(x)))
        joined = rec.compose(*(rec.summarize(part) for part in parts))
        yield f"{_case(variant, hard)} homomorphism", error(list(joined), list(rec.summarize(x)))


@law(5, "gradients", tolerance=1e-8)
def gradients(subject: Subject) -> Iterator[Case]:
    for variant, hard, x, past in _examples(subject):
        span = Span.of(SIZES["B"], SIZES["T"], start=3)
        expected = None
        for backend in subject.backends():
            grads = _gradients(subject, variant, x, past, span, backend=backend)
            expected = grads if expected is None else expected
            yield f"{_case(variant, hard)} {backend}", error(grads, expected)
    sizes = SIZES | {"B": 1, "T": 5, "D": SIZES["D"]}
    for variant in subject.variants:
        x, past = subject.example(variant, sizes, torch.float64), subject.past(variant, 1, torch.float64)
        for backend in subject.backends():
            yield (
                f"{variant} {backend} numerical",
                _numerical(subject, variant, x, past, Span.of(1, 5, start=3), backend),
            )


@law(6, "no output sees a later token", tolerance=0.0)
def causality(subject: Subject) -> Iterator[Case]:
    if not subject.causal:
        return
    time, cut = SIZES["T"], 17
    for variant in subject.variants:
        x = subject.example(variant, SIZES, torch.float64)
        changed = _change_after(x, cut)
        for backend in subject.backends():
            outputs = [
                subject.run(variant, y, None, Span.of(SIZES["B"], time), backend=backend)[0] for y in (x, changed)
            ]
            before, after = (outputs[0] - outputs[1]).abs().split([cut, time - cut], 1)
            alive = 0.0 if bool((after.amax((0, 2)) > 0).all()) else math.inf  # the change must be felt from cut on
            yield f"{variant} {backend}", float(before.detach().max()) + alive


@law(7, "kernel error at most twice the torch backend's", tolerance=2.0)
def kernels(subject: Subject) -> Iterator[Case]:
    for backend in subject.backends():
        if backend in ("auto", "reference", "torch"):
            continue
        for variant, hard, x, past in _examples(subject):
            span = Span.of(SIZES["B"], SIZES["T"], start=3)
            exact = _everything(subject, variant, x, past, span, backend="reference")
            low, low_past = _cast(x, torch.float32), _cast_state(subject, past, torch.float32)
            own = _everything(subject, variant, low, low_past, span, backend=backend)
            plain = _everything(subject, variant, low, low_past, span, backend="torch")
            for got, base, truth in zip(own, plain, exact, strict=True):
                yield f"{_case(variant, hard)} {backend}", _ratio(got, base, truth)


@law(8, "outputs follow the inputs' dtype, states are wide; no memory is read before it is written", tolerance=0.0)
def dtypes(subject: Subject) -> Iterator[Case]:
    for variant in subject.variants:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = subject.example(variant, SIZES, dtype)
            with _poisoned():
                output, state = subject.run(variant, x, None, Span.of(SIZES["B"], SIZES["T"]))
            kept = {leaf.dtype for leaf in subject.leaves(state)}
            wide = {torch.float64 if dtype == torch.float64 else torch.float32, dtype}
            good = output.dtype == dtype and kept <= wide and bool(output.isfinite().all())
            yield f"{variant} {dtype}", 0.0 if good else math.inf


@law(9, "saved, loaded and forked states go on bit for bit", tolerance=0.0)
@torch.no_grad()
def persistence(subject: Subject) -> Iterator[Case]:
    for variant in subject.variants:
        x, past = subject.example(variant, SIZES, torch.float32), subject.past(variant, SIZES["B"], torch.float32)
        span = Span.of(SIZES["B"], SIZES["T"], start=3)
        expected = subject.run(variant, x, past, span)[0]
        with tempfile.TemporaryDirectory() as folder:
            copies = [_through_file(state, Path(folder) / str(i)) for i, state in enumerate(subject.states(past))]
        loaded = subject.run(variant, x, subject.rebuild(past, copies), span)[0]
        yield f"{variant} loaded", float((loaded - expected).abs().max())
        twice = [type(s)(*(leaf.repeat_interleave(2, 0) for leaf in s)) for s in subject.states(past)]
        other = _change_after(x, 0)
        for tokens, reference in ((x, expected), (other, None)):
            both = _interleaved(tokens, other)
            forked = subject.run(
                variant, both, subject.rebuild(past, twice), Span.of(2 * SIZES["B"], SIZES["T"], start=3)
            )[0]
            if reference is not None:
                yield f"{variant} forked", float((forked[::2] - reference).abs().max() / reference.abs().max() > 1e-4)
        again = subject.run(variant, x, past, span)[0]
        yield f"{variant} unchanged by use", float((again - expected).abs().max())


@law(10, "three ranks = one")
def ranks(subject: Subject) -> Iterator[Case]:
    if not subject.causal:
        return
    from isotach.testing.ranks import sharded  # its processes import this module

    yield from sharded(subject)


@law(11, "registered ops pass opcheck; run compiles without a graph break")
def compilation(subject: Subject) -> Iterator[Case]:
    variant = subject.variants[0]
    x, span = subject.example(variant, SIZES, torch.float64), Span.of(SIZES["B"], SIZES["T"])
    leaves = [leaf.requires_grad_() for leaf in x]
    for op, args in _registered_calls(lambda: subject.run(variant, x, None, span)[0].sum().backward()):
        torch.library.opcheck(op, args)
        yield f"opcheck {op}", 0.0

    def forward(*leaves: Tensor) -> Tensor:
        return subject.run(variant, type(x)(*leaves), None, span)[0]

    if isinstance(subject, Layer):
        subject.module(variant, torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    results = []
    for function in (forward, compiled):
        output = function(*leaves)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    yield "compiled", error(results[1], results[0])


@law(12, "float32 against float64 on hard cases", tolerance=1e-4)
def precision(subject: Subject) -> Iterator[Case]:
    sizes = SIZES | {"T": 150}
    for variant in subject.variants:
        for hard in (False, True) if isinstance(subject, Family) else (False,):
            x = subject.example(variant, sizes, torch.float32, hard=hard)
            past = subject.past(variant, SIZES["B"], torch.float32)
            span = Span.of(SIZES["B"], 150, start=3)
            exact_past = _cast_state(subject, past, torch.float64)
            exact = _everything(subject, variant, _cast(x, torch.float64), exact_past, span)
            got = _everything(subject, variant, x, past, span)
            yield _case(variant, hard), max(error([a], [b]) for a, b in zip(got, exact, strict=True))


@law(13, "a set has no order")
def order(subject: Subject) -> Iterator[Case]:
    if subject.causal or not isinstance(subject, Layer):
        return
    from isotach.testing import sets  # which imports this module

    yield from sets.order(subject)


@law(14, "a set's token reads what comes last in a sequence")
def last(subject: Subject) -> Iterator[Case]:
    if subject.causal or not isinstance(subject, Layer):
        return
    from isotach.testing import sets  # which imports this module

    yield from sets.oracle(subject)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN: PyTorch fills it in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _examples(subject: Subject) -> Iterator[tuple[str, bool, Tensors, Any]]:
    for variant in subject.variants:
        for hard in (False, True) if isinstance(subject, Family) and subject.rec.hard else (False,):
            x = subject.example(variant, SIZES, torch.float64, hard=hard)
            yield variant, hard, x, subject.past(variant, SIZES["B"], torch.float64)


def _case(variant: str, hard: bool) -> str:
    return f"{variant}{' hard' if hard else ''}".strip()


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference in norm; inf where shapes differ or a value is not finite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or not bool(a.detach().isfinite().all()):
            return math.inf
        a, b = a.detach().double(), b.detach().double()
        scale = float(b.norm())
        worst = max(worst, float((a - b).norm()) / (scale if scale > 0 else 1.0))
    return worst


def _everything(
    subject: Subject, variant: str, x: Tensors, past: Any, span: Span, backend: str = "auto"
) -> list[Tensor]:
    """Outputs, final state and all gradients."""
    output, state = subject.run(variant, x, past, span, backend=backend)
    values = [output.detach(), *(leaf.detach() for leaf in subject.leaves(state))]
    return values + _gradients(subject, variant, x, past, span, backend=backend)


def _gradients(subject: Subject, variant: str, x: Tensors, past: Any, span: Span, *, backend: str) -> list[Tensor]:
    """Gradients of a fixed weighting of outputs and final state, for inputs and initial state."""
    x, past = _cast(x, None), _cast_state(subject, past, None)
    leaves = [leaf.requires_grad_() for leaf in (*x, *floating(subject, past))]
    total = _weighted(subject, variant, x, past, span, backend)
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))  # empty leaves are used by nothing


def _weighted(subject: Subject, variant: str, x: Tensors, past: Any, span: Span, backend: str) -> Tensor:
    output, state = subject.run(variant, x, past, span, backend=backend)
    total = output.new_zeros((), dtype=torch.float64)
    for i, value in enumerate((output, *subject.leaves(state))):
        total = total + (value.double() * weights(value, i)).sum()
    return total


def weights(like: Tensor, i: int) -> Tensor:
    """Fixed float64 numbers of the shape of `like`, another set for every i."""
    return torch.linspace(-1, 2, like.numel(), dtype=torch.float64).add(i).cos().view(like.shape)


def _numerical(subject: Subject, variant: str, x: Tensors, past: Any, span: Span, backend: str) -> float:
    """Central differences along one random direction per tensor, against the analytic gradient; relative."""
    grads = _gradients(subject, variant, x, past, span, backend=backend)
    x, past = _cast(x, None), _cast_state(subject, past, None)
    leaves, worst, step = [*x, *floating(subject, past)], 0.0, 1e-6
    with torch.no_grad():
        for leaf, grad in zip(leaves, grads, strict=True):
            direction = torch.linspace(0, 3, leaf.numel(), dtype=leaf.dtype).cos().view(leaf.shape)
            values = []
            for sign in (1, -2):
                leaf.add_(direction, alpha=sign * step)
                values.append(float(_weighted(subject, variant, x, past, span, backend)))
            leaf.add_(direction, alpha=step)
            slope, expected = (values[0] - values[1]) / (2 * step), float((grad * direction).sum())
            worst = max(worst, abs(slope - expected) / max(1.0, abs(expected)))
    return worst if worst > 1e-6 else 0.0  # below that it is the differences' own error


def floating(subject: Subject, state: Any) -> list[Tensor]:
    return [leaf for part in subject.states(state) for leaf in part if leaf.is_floating_point()]


def _cast(x: Tensors, dtype: torch.dtype | None) -> Tensors:
    """A detached copy, in `dtype` where given; integers as they are."""
    return type(x)(*(_copied(leaf, dtype) for leaf in x))


def _cast_state(subject: Subject, state: Any, dtype: torch.dtype | None) -> Any:
    return subject.rebuild(state, [_cast(part, dtype) for part in subject.states(state)])


def _copied(leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
    return leaf.detach().to(dtype if dtype and leaf.is_floating_point() else leaf.dtype, copy=True)


def _rows(subject: Subject, state: Any, n: int) -> list[Tensor]:
    one = [type(s)(*(leaf[n : n + 1] for leaf in s)) for s in subject.states(state)]
    return subject.leaves(subject.rebuild(state, one))


def _change_after(x: Tensors, cut: int) -> Tensors:
    """Other values from token `cut` on, in every field that has them per token, within what the field takes."""
    fields, limits = [], shapes.limits(type(x))
    for field, declared in shapes.axes(type(x)).items():
        leaf = getattr(x, field).clone()
        at = next((i for i, axis in enumerate(declared) if axis.name == "T"), None)
        if at is not None and (leaf.shape[at] > 1 or not declared[at].shared):
            later = leaf.narrow(at, cut, leaf.shape[at] - cut).mul_(1.5)
            if field in limits:
                later.clamp_(limits[field].low, limits[field].high)
        fields.append(leaf)
    return type(x)(*fields)


def _interleaved(a: Tensors, b: Tensors) -> Tensors:
    """Rows of a and b in turn; what has no rows is a's."""
    fields = []
    for field, declared in shapes.axes(type(a)).items():
        leaf, other = getattr(a, field), getattr(b, field)
        fields.append(torch.stack([leaf, other], 1).flatten(0, 1) if declared[0].name == "B" else leaf)
    return type(a)(*fields)


def _through_file(state: Tensors, path: Path) -> Tensors:
    save_file({field: getattr(state, field).contiguous() for field in state._fields}, path)
    loaded = load_file(path)
    return type(state)(*(loaded[field] for field in state._fields))


def _ratio(got: Tensor, base: Tensor, truth: Tensor) -> float:
    floor = torch.finfo(torch.float32).eps
    return error([got], [truth]) / max(error([base], [truth]), floor)


def _registered_calls(function: Callable[[], None]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of isotach's own operators made by `function`, one per operator."""
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op.namespace == "isotach":
                forward = "backward" not in str(op)  # second derivatives are refused
                calls.setdefault(str(op), (op, tuple(_argument(a, differentiable=forward) for a in args)))
            return op(*args, **(kwargs or {}))

    with Recorder():
        function()
    return list(calls.values())


def _argument(value: Any, *, differentiable: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(differentiable and value.is_floating_point())
