"""What the tests of GPU kernels share: Triton's interpreter, mended, and errors beside those of the plain backend.

The oracle is a family's definition in float64. What is allowed is law 7's: twice the error of the plain PyTorch backend
on the same inputs. Its results are nearly as exact as their dtype where the inputs have 16 bits, so float32 results are
then compared as if they had 16 bits too.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from isotach.ops import backends
from isotach.ops.engine import Span, run
from isotach.ops.recurrence import Recurrence, Tensors

WIDE = ("beta", "log_decay", "state")  # what is float32 beside 16 bits
# The error allowed where there are few numbers, as in the gradient of a rate that all tokens share: which of two
# backends is nearer is then a lottery.
FEW = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


class Case(NamedTuple):
    """Inputs in float64 that float32 or a narrower dtype holds exactly, and what weighs outputs and final state."""

    rec: Recurrence
    x: Tensors
    state: Tensors
    weights: tuple[Tensor, Tensor]
    span: Span

    def everything(self, backend: str, dtype: torch.dtype, chunk_size: int | None = None) -> dict[str, Tensor]:
        """Outputs, final state and all gradients, by name."""
        wide = torch.promote_types(dtype, torch.float32)
        fields = [*self.x._fields, "state"]
        leaves = [
            leaf.to(wide if field in WIDE else dtype).requires_grad_()
            for field, leaf in zip(fields, (*self.x, *self.state), strict=True)
        ]
        x, state = type(self.x)(*leaves[:-1]), type(self.state)(leaves[-1])
        output, after = run(self.rec, x, state, self.span, backend=backend, chunk_size=chunk_size)  # type: ignore[arg-type]
        values = (output, after[0])
        grads = torch.autograd.grad(values, leaves, [w.to(v.dtype) for w, v in zip(self.weights, values, strict=True)])
        names = ["output", "after", *(f"d{field}" for field in fields)]
        return dict(zip(names, (*(value.detach() for value in values), *grads), strict=True))

    def inputs(self, dtype: torch.dtype) -> Tensors:
        """Leaves that require gradients."""
        wide = torch.promote_types(dtype, torch.float32)
        fields = zip(self.x._fields, self.x, strict=True)
        return type(self.x)(*(x.to(wide if field in WIDE else dtype).requires_grad_() for field, x in fields))

    def excess(self, dtype: torch.dtype = torch.float32, chunk_size: int | None = None) -> dict[str, float]:
        """Our error over the plain backend's, both against float64, by what was computed."""
        exact = self.everything("reference", torch.float64)
        got, plain = self.everything("triton", dtype, chunk_size), self.everything("torch", dtype)
        ratios = {}
        for name, want in exact.items():
            assert bool(got[name].isfinite().all()), name
            assert got[name].dtype == plain[name].dtype, name
            scale = float(want.norm()) or 1.0
            errors = [float((x[name].to(dtype).double() - want).norm()) / scale for x in (got, plain)]
            allowed = max(errors[1], torch.finfo(dtype).eps / 4) if want.numel() > 100 else FEW[dtype]
            ratios[name] = errors[0] / allowed
        return ratios


def drawn(stream: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, where: str = "cpu") -> Tensor:
    """Normal numbers in float64 that `dtype` holds exactly."""
    return torch.randn(shape, generator=stream, dtype=torch.float64).to(dtype).double().to(where)


def span(batch: int, time: int, bounds: list[int] | None, where: str = "cpu") -> Span:
    return Span.of(batch, time, device=where) if bounds is None else Span.packed(torch.tensor(bounds, device=where))


def interpreted(monkeypatch: pytest.MonkeyPatch, family: type[Recurrence]) -> pytest.MonkeyPatch:
    """The family's kernels take inputs on the CPU, in the interpreter.

    It multiplies bfloat16 as integers and cuts instead of rounding to it; and most of its time it scans number by
    number, looks for overflow, and prepares the language anew for every function that a kernel calls. That is mended.
    """
    from triton import language
    from triton.runtime import interpreter

    if torch.cuda.is_available():
        pytest.skip("kernels are defined for the GPU")
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(value: Any) -> Any:
        if value.dtype.scalar != language.bfloat16:
            return value
        return interpreter.TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    def rounded(self: Any, value: Any, to: Any) -> Any:
        if to.scalar != language.bfloat16 or value.dtype.scalar != language.float32:
            return cast(self, value, to)
        near = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(near, language.bfloat16)

    def scan(self: Any, values: Any) -> list[Any]:
        """Row by row along the axis."""
        rows = [np.moveaxis(value.handle.data, self.axis, 0) for value in values]
        results = [row[:1] for row in rows]
        for i in range(1, len(rows[0])):
            before = (self.to_tensor(r[-1], v.dtype) for r, v in zip(results, values, strict=True))
            now = (self.to_tensor(r[i], v.dtype) for r, v in zip(rows, values, strict=True))
            after = self.combine_fn.fn(*before, *now)
            results = [np.concatenate([r, a.handle.data[None]]) for r, a in zip(results, after, strict=True)]
        return [self.to_tensor(np.moveaxis(r, 0, self.axis), v.dtype) for r, v in zip(results, values, strict=True)]

    def prepared_once(fn: Any) -> Any:
        if not language.core.is_builtin(language.load):
            return interpreter._LangPatchScope()
        return prepare(SimpleNamespace(__globals__={"tl": language, "core": language.core}))

    prepare = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", prepared_once)
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", rounded)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan)
    entry = backends._kernels[family, "triton"]
    monkeypatch.setitem(backends._kernels, (family, "triton"), entry._replace(device="cpu"))
    return monkeypatch


def replayed(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Forward and backward captured as a CUDA graph and replayed for new inputs in the same memory, and as they are."""
    x, weight = case.inputs(dtype), case.weights[0].to(dtype)
    state = type(case.state)(*(leaf.to(torch.promote_types(dtype, torch.float32)) for leaf in case.state))

    def step() -> tuple[Tensor, ...]:
        output, _ = run(case.rec, x, state, case.span, backend="triton")
        return (output, *torch.autograd.grad(output, x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x[0].mul_(0.5)
    graph.replay()
    return list(zip(captured, step(), strict=True))


def compiled_and_plain(case: Case, dtype: torch.dtype, chunk_size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Gradients with and without torch.compile, which may not break the graph."""
    x = case.inputs(dtype)

    def forward(*leaves: Tensor) -> Tensor:
        kind = type(case.x)
        return run(case.rec, kind(*leaves), None, case.span, backend="triton", chunk_size=chunk_size)[0]

    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(function(*x).square().sum(), x) for function in (compiled, forward))
    return list(zip(got, expected, strict=True))


def hopper(family: str) -> dict[str, int]:
    """What became of the family's kernels in the compiler, in a process where they are not the interpreter's."""
    script = Path(__file__).with_name("hopper.py")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script), family], check=True, capture_output=True, text=True, env=plain)
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return report
