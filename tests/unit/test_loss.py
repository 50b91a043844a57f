"""The loss from what the head reads: as from logits in float64, values and gradients, whichever way it goes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isotach.config import parse
from isotach.models.decoder import Decoder, ModelConfig
from isotach.rng import generator
from isotach.train import loss

TOKENS = 40


def model(**changes: object) -> Decoder:
    table = {"vocab": 97, "width": 16, "depth": 1, "heads": 2, "hidden": 16, "init_std": 0.3} | changes
    return Decoder(parse(ModelConfig, table, who="test"))


def inputs(width: int = 16) -> tuple[Tensor, Tensor]:
    stream = generator(0, "loss")
    hidden = torch.randn(2, TOKENS // 2, width, generator=stream)
    return hidden, torch.randint(97, (2, TOKENS // 2), generator=stream)


def found(decoder: Decoder, hidden: Tensor, targets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The loss, and its gradients by hidden and by the head's weight."""
    leaf = hidden.clone().requires_grad_()
    head = decoder.embed if decoder.unembed is None else decoder.unembed
    value = loss.nats(decoder, leaf, targets, dtype=dtype)
    return [value.detach(), *torch.autograd.grad(value, [leaf, head.weight])]


def expected(decoder: Decoder, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    head = decoder.embed if decoder.unembed is None else decoder.unembed
    leaf, weight = hidden.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    value = F.cross_entropy((leaf @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    return [value.detach(), *torch.autograd.grad(value, [leaf, weight])]


def choose(by: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels run in Triton's interpreter here."""
    if by == "torch" and not loss.FUSED:
        pytest.skip("this PyTorch does not have it")
    if by == "liger":
        pytest.importorskip("liger_kernel")
    monkeypatch.setattr(loss, "MANY", 1)
    monkeypatch.setattr(loss, "CHUNK", 16)  # so that the last one is shorter
    monkeypatch.setattr(loss, "_fused", lambda *given: by)


@pytest.mark.parametrize("by", ["torch", "liger", None])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_value_and_gradients(
    by: str | None, tie: bool, dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (by, dtype) == ("torch", torch.bfloat16):
        pytest.skip("is never chosen")
    choose(by, monkeypatch)
    decoder, (hidden, targets) = model(tie=tie), inputs()
    for got, want in zip(found(decoder, hidden, targets, dtype), expected(decoder, hidden, targets), strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - want).norm() / want.norm()) < most


@pytest.mark.parametrize("by", ["torch", "liger"])
@pytest.mark.parametrize("width", [16, 128])
def test_few_tokens(width: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(by, monkeypatch)
    decoder = model(width=width)
    hidden, targets = inputs(width)
    for tokens in (TOKENS, 1):
        part, classes = hidden.flatten(0, 1)[None, :tokens], targets.flatten()[None, :tokens]
        want = expected(decoder, part, classes)
        for got, exact in zip(found(decoder, part, classes, torch.float32), want, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["torch", "liger", None])
def test_without_gradients_it_is_the_same(by: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(by, monkeypatch)
    decoder, (hidden, targets) = model(), inputs()
    with torch.no_grad():
        value = loss.nats(decoder, hidden, targets, dtype=torch.float32)
    torch.testing.assert_close(value, found(decoder, hidden, targets, torch.float32)[0])


@pytest.mark.parametrize(
    ("where", "rows", "weight", "dtype", "by"),
    [
        ("cpu", torch.float32, torch.float32, torch.float32, "torch"),
        ("cpu", torch.float32, torch.float32, torch.bfloat16, None),
        ("cuda", torch.float32, torch.float32, torch.bfloat16, "liger"),
        ("cuda", torch.bfloat16, torch.float32, torch.bfloat16, "liger"),
        ("cuda", torch.float32, torch.float32, torch.float32, "liger"),
        ("cuda", torch.float64, torch.float64, torch.float32, None),
    ],
)
def test_what_is_chosen(
    where: str, rows: torch.dtype, weight: torch.dtype, dtype: torch.dtype, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(loss, "FUSED", True)
    monkeypatch.setattr(loss, "LIGER", True)
    with FakeTensorMode():
        given = torch.empty(2, 2, dtype=rows, device=where), torch.empty(2, 2, dtype=weight, device=where)
    assert loss._fused(*given, dtype) == by
    monkeypatch.setattr(loss, "LIGER", False)
    assert loss._fused(*given, dtype) != "liger"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    decoder = model(vocab=32000, width=256).cuda()
    stream = generator(0, "loss")
    hidden = torch.randn(2, 200, 256, generator=stream).cuda()
    targets = torch.randint(32000, (2, 200), generator=stream).cuda()
    assert targets.numel() * 32000 >= loss.MANY
    for got, want in zip(found(decoder, hidden, targets, dtype), expected(decoder, hidden, targets), strict=True):
        assert float((got.double() - want).norm() / want.norm()) < (1e-4 if dtype == torch.float32 else 0.02)
