"""The benchmark of operations: who is compared is right, costs are counted, and a picture is made of the file alone."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from isotach import bench, cli
from isotach.bench import bars, families, limits, ops, peers, picture, report
from isotach.bench.families import BACKWARD, BOTH, CHUNK, FORWARD, OPERATIONS, Shape
from isotach.bench.ops import Cell
from isotach.bench.peers import PEERS, Call
from isotach.ops.engine import Span, run
from tools import results

CPU = torch.device("cpu")
TINY = Shape(heads=2, tokens=90, width=16)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a product that take no time."""
    monkeypatch.setattr(limits, "SIZES", {"cpu": (1 << 12, 8), "cuda": (1 << 12, 8)})


def draw(name: str, shape: Shape = TINY) -> families.Leaves:
    return OPERATIONS[name].draw(shape, CPU, torch.float32)


# ---- who is compared


@pytest.mark.parametrize(
    ("name", "peer"),
    [(name, peer) for name in OPERATIONS for peer in ("", *PEERS) if not peer or name in PEERS[peer].operations],
)
def test_whoever_is_compared_computes_the_operation(name: str, peer: str) -> None:
    """Values and gradients against the definition; a peer that cannot run here is left out."""
    operation = OPERATIONS[name]

    def ours(*leaves: Tensor) -> Call:
        return ops.ours(operation, TINY, "auto", *leaves)

    compute = peers.find(peer, name, CPU) if peer else ours
    if compute is None:
        pytest.skip(f"{peer} is not here")
    assert ops.error(operation, compute, draw(name), TINY) < 1e-5


def test_the_restated_algorithm_is_that_of_transformers() -> None:
    """On the module's own queries, keys and values."""
    pytest.importorskip("transformers")
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, num_hidden_layers=2, block_size=256,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        module = MiniMaxLightningAttention(config, layer_idx=0)
        x = torch.randn(2, 600, config.hidden_size)
        expected, _ = module(x, position_embeddings=None, attention_mask=None)
        heads = module.act_fn(module.qkv_proj(x)).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
        attended = peers.Minimax(module.slope_rate, block=config.block_size)(*heads.chunk(3, dim=-1))
        got = module.out_proj(torch.sigmoid(module.output_gate(x)) * module.norm(attended.transpose(1, 2).flatten(2)))
    assert report.relative_error(got, expected.double()) < 1e-6


def test_the_last_queries_of_softmax_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [leaf.double() for leaf in draw("decay")]
    call = PEERS["sdpa"].operations["decay"].call(*leaves)
    assert call.exact is not None
    whole = call.exact(*leaves)
    monkeypatch.setattr(peers, "QUERIES", 5)
    torch.testing.assert_close(call.exact(*leaves), whole[:, -5:])


def test_who_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in ("fla", "mamba_ssm") else name)
    assert list(peers.absent(("fla", "sdpa"), CPU)) == ["fla: needs a GPU"]
    gpu = torch.device("cuda")
    assert list(peers.absent(("fla", "mamba", "llama.cpp"), gpu)) == [
        "fla: not installed",
        "mamba: mamba_ssm is not installed",
    ]
    assert peers.find("fla", "decay", gpu) is None
    assert peers.find("mamba", "short filter", gpu) is not None
    assert peers.find("mamba", "decay", gpu) is None


def test_every_peer_computes_operations_that_there_are() -> None:
    assert {name for peer in PEERS.values() for name in peer.operations} <= OPERATIONS.keys()
    assert {cell.operation for grid in ops.GRIDS.values() for cell in grid()} == OPERATIONS.keys()


# ---- what is refused


class Astray(torch.autograd.Function):
    """Nothing, with a gradient that is off by a thousandth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.001


@pytest.mark.parametrize("wrong", ["everywhere", "at size", "gradient"])
def test_a_wrong_contender_is_refused_and_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PEERS["sdpa"].operations["decay"].call

    def call(*leaves: Tensor) -> Call:
        exact = right(*leaves)

        def forward(*inputs: Tensor) -> Tensor:
            output = exact.forward(*inputs)
            if wrong == "gradient":
                return Astray.apply(output)  # type: ignore[no-any-return, no-untyped-call]
            return output * 1.001 if wrong == "everywhere" or output.shape[2] == TINY.tokens else output

        return exact._replace(forward=forward)

    monkeypatch.setitem(PEERS, "sdpa", peers.Peer(None, {"decay": peers.Adapter("torch", call)}))
    result = ops.measure(device=CPU, against=("sdpa",), rounds=2, cells=[Cell("decay", TINY)])
    assert [sentence.partition(":")[0] for sentence in result.refused] == ["sdpa"]
    assert [row["contender"] for row in result.rows] == ["isotach", "isotach"]
    assert all(figure.value is None for figure in result.figures if "sdpa" in figure.name)


def test_ours_is_refused_where_a_gradient_is_wrong_at_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPERATIONS["decay"]

    def inputs(q: Tensor, *others: Tensor) -> Any:
        at_size = q.dtype == torch.float32 and q.shape[1] == TINY.tokens
        return right.inputs(Astray.apply(q) if at_size else q, *others)  # type: ignore[no-untyped-call]

    monkeypatch.setitem(OPERATIONS, "decay", right._replace(inputs=inputs))
    result = ops.measure(device=CPU, against=("sdpa",), rounds=1, cells=[Cell("decay", TINY)])
    assert [sentence.partition(":")[0] for sentence in result.refused] == ["isotach"]
    assert {row["contender"] for row in result.rows} == {"sdpa"}


def test_who_fails_is_refused_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*leaves: Tensor) -> Call:
        raise RuntimeError("0 active drivers")

    monkeypatch.setitem(PEERS, "sdpa", peers.Peer(None, {"decay": peers.Adapter("torch", call)}))
    result = ops.measure(device=CPU, against=("sdpa",), rounds=1, cells=[Cell("decay", TINY)])
    assert result.refused == [f"sdpa: decay, {TINY}, float32: RuntimeError: 0 active drivers"]
    assert len(result.rows) == 2


def test_who_is_slow_is_timed_once_and_then_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock(call: Callable[[], object]) -> float:
        call()
        return now

    monkeypatch.setattr(ops, "clock", lambda device: clock)
    cells = [Cell("decay", Shape(1, 1, tokens, 16), passes=(FORWARD,)) for tokens in (16, 64)]
    now = ops.PATIENCE * 0.9
    result = ops.measure(device=CPU, against=("sdpa",), rounds=5, cells=cells)
    assert [(row["contender"], row["rounds"]) for row in result.rows] == [("isotach", 3), ("sdpa", 3), ("isotach", 3)]
    assert result.absent == ["sdpa: decay, B1 H1 T64 D16, forward: would take too long"]


def test_what_no_time_is_left_for_is_named() -> None:
    result = ops.measure(device=CPU, against=(), rounds=1, minutes=0.0, cells=[Cell("decay", TINY)])
    assert (result.rows, result.absent) == ([], [f"decay, {TINY}: no time was left"])


# ---- what it costs


def listing(name: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """One head, (T, D) each, in chunks of 64: the textbook's closed forms, whose products are counted."""
    state, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype), []
    chunks = zip(*(x.split(CHUNK) for x in (q, k, v, beta)), strict=True)
    for q, k, v, beta in chunks:
        row = torch.arange(1, len(q) + 1, dtype=q.dtype)[:, None]
        between = ((row - row.T) * log_decay).exp().tril()
        reach, rest = (row * log_decay).exp(), ((len(q) - row) * log_decay).exp()
        if name == "delta":
            inverse = torch.linalg.inv(torch.eye(len(q), dtype=q.dtype) + (beta * (k @ k.T) * between).tril(-1))
            v = inverse @ (beta * (v - reach * (k @ state)))
        outputs.append((q @ k.T * between) @ v + reach * (q @ state))
        state = (len(q) * log_decay).exp() * state + (rest * k).T @ v
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["decay", "delta"])
def test_flops_are_those_of_the_closed_form(name: str) -> None:
    shape = Shape(1, 1, 3 * CHUNK, 32)
    leaves = [leaf.detach().double() for leaf in draw(name, shape)]
    q, k, v, *beta, log_decay = leaves
    flat = [leaf[0, :, 0] for leaf in (q, k, v, beta[0] if beta else torch.ones_like(q[..., :1]))]
    with FlopCounterMode(display=False) as counted:
        output = listing(name, *flat, log_decay.squeeze())
    operation = OPERATIONS[name]
    expected, _ = run(operation.rec, operation.inputs(*leaves), None, Span.of(1, shape.tokens), backend="reference")
    torch.testing.assert_close(output, expected[0, :, 0])
    assert families.flops(operation, FORWARD, shape) == counted.get_total_flops()


def test_flops_of_the_others_follow() -> None:
    shape = Shape(2, 4, 128, 32)
    decay = families.flops(OPERATIONS["decay"], FORWARD, shape)
    assert decay is not None
    assert decay == 2 * 4 * 128 * (4 * 64 * 32 + 4 * 32**2)
    assert families.flops(OPERATIONS["HLA"], FORWARD, shape) == 2 * decay
    shared = 2 * 4 * 128 * 2 * 64 * 32
    assert families.flops(OPERATIONS["Mamba-2"], FORWARD, shape) == decay - shared * 3 / 4
    assert families.flops(OPERATIONS["TNN"], FORWARD, shape) is None
    for name, ratio in (("decay", 2.5), ("HGRN", 3.0), ("short filter", 2.0)):
        forward, backward, both = (families.flops(OPERATIONS[name], which, shape) for which in ops.PASSES)
        assert forward is not None
        assert (backward, both) == (ratio * forward, (1 + ratio) * forward)


def test_the_backward_of_softmax_is_counted_as_ours() -> None:
    """2.5 times the forward, scores once more included, and as torch counts it."""
    shape = (1, 2, 64, 16)
    forward = sdpa_flop_count(shape, shape, shape)
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == OPERATIONS["decay"].backward * forward


def test_bytes_are_counted_once() -> None:
    """q, k, v and o once; then q, k, v, do once more and three gradients: what log_decay adds is 8 numbers a time."""
    shape = Shape(2, 4, 128, 32)
    leaves = draw("decay", shape)
    tensor, decay = leaves[0].nbytes, leaves[-1].nbytes
    counts = {which: families.moved(which, leaves, leaves[0]) for which in ops.PASSES}
    assert counts == {FORWARD: 4 * tensor + decay, BACKWARD: 7 * tensor + decay, BOTH: 11 * tensor + 2 * decay}
    assert families.least(FORWARD, leaves, leaves[0]) == 4 * tensor + decay
    assert families.least(BOTH, leaves, leaves[0]) == 8 * tensor + decay


def test_a_call_holds_what_it_returns_and_what_it_needs_meanwhile() -> None:
    x = torch.randn(1000)
    assert limits.peak(lambda: x + 1, CPU) == pytest.approx(4000, abs=100)  # scalars are tensors too
    assert limits.peak(lambda: (x + 1) * 2, CPU) == pytest.approx(8000, abs=100)
    assert limits.peak(lambda: x.add_(1), CPU) < 100


# ---- what comes out


def measured(*cells: Cell) -> report.Row:
    result = ops.measure(device=CPU, against=("sdpa", "fla"), rounds=2, cells=cells)
    about = {"machine": report.machine(), "commit": None, "date": "2026-01-01", "idle": True, "benchmark": "ops"}
    document: report.Row = json.loads(json.dumps(about | result.document(), allow_nan=False))
    return document


def test_a_measurement_has_rows_a_page_and_a_picture() -> None:
    lengths = [Cell("decay", Shape(1, 1, tokens, 16), part="length") for tokens in (32, 64)]
    pack = Cell("decay", TINY._replace(batch=1, documents=2), passes=(FORWARD,))
    document = measured(Cell("decay", TINY), pack, Cell("HGRN", TINY), *lengths)
    assert document["refused"] == []
    assert document["absent"] == ["fla: needs a GPU"]
    row = next(row for row in document["rows"] if row["contender"] == "sdpa")
    assert {"ms", "GB/s", "of_copy", "GFLOP/s", "of_product", "MiB", "of_least", "times", "error"} <= row.keys()
    assert row["GB/s"] * row["ms"] * 1e6 == pytest.approx(row["at"]["bytes"])
    assert row["at"]["dtype"] == "float32"
    written = report.pages("ops", document, ops.panels)
    assert "| decay" in written["ops.md"]
    assert "Not measured: fla: needs a GPU" in written["ops.md"]
    drawn = ET.fromstring(written["ops.svg"])
    texts = [element.text or "" for element in drawn.iter() if element.tag.endswith("text")]
    assert {"Fading attention, forward and backward", "sdpa", "HGRN", "copy, product"} <= set(texts)
    assert {"decay", "decay, packed"} <= set(texts)
    assert report.pages("ops", document, ops.panels) == written


def test_pages_of_speed_are_made_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    stored = measured(Cell("decay", Shape(1, 1, 32, 16), part="length"))
    decoding = [{"model": "tnl", "position": position, "ms": 1.0} for position in (8, 16)]
    (tmp_path / "ops.json").write_text(json.dumps(stored), encoding="utf-8")
    (tmp_path / "decode.json").write_text(json.dumps(stored | {"rows": decoding}), encoding="utf-8")
    (tmp_path / "shakespeare.json").write_text("{}", encoding="utf-8")
    made = dict(results.speed())
    assert {path.name for path in made} == {"ops.md", "ops.svg", "decode.md", "speed.md", "speed.svg"}
    page = made[results.DOCS / "speed.md"]
    assert "| GPU: decay, forward, ms" in page
    assert "not measured" in page
    assert "ops.svg" in page
    assert all(name in made[results.DOCS / "speed.svg"] for name in ("One more token", "tnl", "sdpa"))
    missed = [report.Figure("a", 1.0, at_least=2.0)]
    (tmp_path / "ops.json").write_text(
        json.dumps(stored | report.Result({}, figures=missed).document()), encoding="utf-8"
    )
    assert "| a      | 1     | ≥ 2   | missed |" in dict(results.speed())[results.DOCS / "speed.md"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_figures_of_a_gpu_are_called_not_measured_without_one() -> None:
    document = measured(Cell("decay", TINY, passes=(FORWARD,)))
    found = {figure["name"]: figure["verdict"] for figure in document["figures"]}
    assert found["GPU: decay, forward, ms"] == "not measured"
    assert found["GPU: decay, forward + backward, cost of a token at 1M over 4k"] == "not measured"


def row(operation: str, which: str, contender: str = "isotach", **columns: Any) -> report.Row:
    at = {"part": "core", "documents": 1, "tokens": 8192, "width": 128} | columns.pop("at", {})
    return {"operation": operation, "pass": which, "contender": contender, "at": at} | columns


def test_figures_are_read_off_their_rows() -> None:
    rows = [
        row("decay", FORWARD, ms=0.3, at={"documents": 500}),
        row("decay", FORWARD, ms=0.5, at={"part": "heads"}),
        row("decay", FORWARD, ms=0.39),
        row("decay", FORWARD, "fla", ms=0.7, times=1.8),
        row("decay", BOTH, ms=2.0, at={"part": "length", "tokens": 4096}),
        row("decay", BOTH, ms=2.2, at={"part": "length", "tokens": 1 << 20}),
        row("decay", BOTH, "sdpa", ms=2.0, times=0.9, at={"part": "length", "tokens": 2048}),
    ]
    found = {figure.name: (figure.value, figure.verdict) for figure in bars.figures(rows, "cuda")}
    assert found["GPU: decay, forward, ms"] == (0.39, "met")
    assert found["GPU: decay, forward, fla's time over ours"] == (1.8, "missed")
    assert found["GPU: decay, forward + backward, cost of a token at 1M over 4k"] == (pytest.approx(1.1), "met")
    assert found["GPU: decay, T 2,048, forward + backward, sdpa's time over ours"] == (0.9, "missed")
    assert found["GPU: KDA, forward, fla's time over ours"] == (None, "not measured")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_figure_is_of_a_cell_in_the_grid(kind: str) -> None:
    """Rows as the grid would give them, from everybody: no figure stays without a value, and none is ambiguous."""
    columns = {"ms": 1.0, "times": 1.0, "of_product": 1.0, "of_copy": 1.0, "of_least": 1.0}
    rows = [
        {"operation": cell.operation, "pass": which, "contender": name, **columns,
         "at": {**cell.shape._asdict(), "part": cell.part}}
        for cell in ops.GRIDS[kind]()
        for which in cell.passes
        for name in ("isotach", *(peer for peer in PEERS if cell.operation in PEERS[peer].operations))
    ]  # fmt: skip
    found = bars.figures(rows, kind)
    assert [figure.name for figure in found if figure.value is None] == []
    assert len({figure.name for figure in found}) == len(found)


def test_figures_without_a_value_or_a_bound_have_no_verdict_of_their_own() -> None:
    figure = report.Figure
    assert [figure("x", value, 1.0, 2.0).verdict for value in (None, 0.9, 1.0, 2.0, 2.1)] == [
        "not measured", "missed", "met", "met", "missed",
    ]  # fmt: skip
    assert (figure("x", 1.0).verdict, figure("x", None).verdict) == ("", "not measured")


def test_names_in_a_picture_do_not_overlap() -> None:
    series = tuple(picture.Series(f"line {i}", ((1.0, 1.0 + i / 100), (1024.0, 2.0 + i / 100))) for i in range(20))
    drawn = picture.draw([picture.Panel("many", "x", "y", series)])
    heights = sorted(float(found) for found in re.findall(r'y="([\d.]+)"[^>]*>line', drawn))
    assert len(heights) == 20
    assert min(b - a for a, b in itertools.pairwise(heights)) >= picture.LINE - 0.2
    assert heights[0] >= picture.TOP
    assert heights[-1] <= picture.TOP + picture.HEIGHT + picture.LINE


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (16384, "16k"), (1 << 20, "1M"), (0.002, "0.002"), (1e5, "10⁵"), (3e5, "3·10⁵"), (0.25, "0.25")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert picture.number(value) == text


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_benchmark_runs_on_a_gpu(name: str) -> None:
    cell = Cell(name, Shape(2, 2, 200, 64), torch.bfloat16, passes=ops.PASSES)
    result = ops.measure(device=torch.device("cuda"), rounds=2, cells=[cell])
    assert [sentence for sentence in result.refused if sentence.startswith("isotach")] == []
    assert {row["pass"] for row in result.rows if row["contender"] == "isotach"} == set(ops.PASSES)


# ---- the command


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["bench", *arguments])
    return code, capsys.readouterr().err


def test_a_file_that_measures_is_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"ops", "mixers", "decode", "train"} <= set(bench.names())
    assert not {"report", "peers", "families", "limits"} & set(bench.names())
    monkeypatch.setattr(bench, "__path__", [str(tmp_path)])
    (tmp_path / "late.py").write_text("def measure(*, device):\n    pass\n", encoding="utf-8")
    (tmp_path / "other.py").write_text(
        "def helper():\n    pass\n\nclass A:\n    def measure(self): ...\n", encoding="utf-8"
    )
    assert bench.names() == ("late",)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["opps"], "bench: 'opps' is no benchmark; did you mean ops?"),
        (["ops", "--against", "fla,flaa"], "bench: expected --against to name fla, mamba, sdpa, transformers, torch, "),
        (["ops", "--preset", "tnl-1m"], "bench: ops takes no --preset; leave it out"),
        (["train", "--against", "fla"], "bench: train takes no --against; leave it out"),
        (["train", "--preset", "tnl-2m"], "preset 'tnl-2m'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = said(capsys, *arguments)
    assert code == 2
    assert error.startswith(sentence)
    assert error.count("\n") == 1


def test_the_command_measures_prints_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = tuple(Cell("decay", Shape(1, 1, tokens, 16), part="length") for tokens in (16, 32))
    monkeypatch.setitem(ops.GRIDS, "cpu", lambda: iter(lengths))
    out = tmp_path / "results"
    code, _ = said(capsys, "ops", "--against", "sdpa", "--rounds", "2", "--wait", "0", "--out", str(out))
    assert code == 0
    assert {path.name for path in out.iterdir()} == {"ops.json", "ops.md", "ops.svg"}
    document = json.loads((out / "ops.json").read_text(encoding="utf-8"))
    assert document["settings"]["against"] == ["sdpa"]
    assert {row["contender"] for row in document["rows"]} == {"isotach", "sdpa"}
    assert (out / "ops.md").read_text(encoding="utf-8") == report.pages("ops", document, ops.panels)["ops.md"]
