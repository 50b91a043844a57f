"""Short convolution against PyTorch's grouped one, and what its state costs and keeps."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isotach.nn.conv import ShortConv
from isotach.nn.mixer import Scan
from isotach.ops.engine import Span, run
from isotach.ops.window import Window
from isotach.rng import generator


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator(0, name), dtype=torch.float64)


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, T, D) through a grouped convolution layer with weight (D, W), zeros before the first token."""
    width, size = weight.shape
    return F.conv1d(F.pad(x.mT, (size - 1, 0)), weight[:, None], bias, groups=width).mT


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("time", [1, 3, 20])
def test_it_is_the_grouped_convolution(size: int, time: int) -> None:
    x, weight = normal(2, time, 5), normal(5, size, name="w").requires_grad_()
    own, expected = run(Window(size), Window.Inputs(x, weight.t()), None, Span.of(2, time))[0], grouped(x, weight)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-13)
    upstream = normal(2, time, 5, name="g")
    gradients = [torch.autograd.grad(y, weight, upstream)[0] for y in (own, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_the_state_is_the_last_inputs_and_does_not_keep_the_sequence_alive() -> None:
    x = normal(1, 1000, 3)
    _, state = run(Window(4), Window.Inputs(x, normal(4, 3, name="w")), None, Span.of(1, 1000))
    torch.testing.assert_close(state.inputs, x[:, -4:], rtol=0, atol=0)
    assert state.inputs.untyped_storage().nbytes() == state.inputs.nbytes


def test_documents_of_a_pack_do_not_see_each_other() -> None:
    bounds = torch.tensor([0, 2, 2, 3, 12, 13])
    x, weight = normal(1, 13, 3), normal(4, 3, name="w")
    output, state = run(Window(4), Window.Inputs(x, weight), None, Span.packed(bounds))
    for n, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
        own = x[:, start:stop]
        if stop > start:
            torch.testing.assert_close(output[:, start:stop], grouped(own, weight.t()), rtol=0, atol=1e-13)
        torch.testing.assert_close(state.inputs[n : n + 1], F.pad(own, (0, 0, 4, 0))[:, -4:], rtol=0, atol=0)


def test_half_precision_is_accumulated_in_float32() -> None:
    x, weight = normal(1, 50, 8).bfloat16(), normal(4, 8, name="w").bfloat16()
    output, state = run(Window(4), Window.Inputs(x, weight), None, Span.of(1, 50))
    expected = grouped(x.double(), weight.double().t())
    assert output.dtype == torch.bfloat16
    assert state.inputs.dtype == torch.float32
    torch.testing.assert_close(output, expected.bfloat16(), rtol=0, atol=0)


def test_a_filter_of_another_size_is_refused() -> None:
    for time in (1, 5):
        with pytest.raises(ValueError, match=r"W = 4; got \(3, 2\); build the family as Window\(3\)"):
            run(Window(4), Window.Inputs(normal(1, time, 2), normal(3, 2)), None, Span.of(1, time))
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        Window(0)


def layer(*, activation: str = "silu", bias: bool = False) -> ShortConv:
    conv = ShortConv(6, activation=activation, bias=bias)  # type: ignore[arg-type]
    conv.initialize(lambda name: generator(0, name), 0.02)
    return conv.double()


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_a_convolution_layer_and_its_activation(activation: str, bias: bool) -> None:
    conv, x = layer(activation=activation, bias=bias), normal(2, 9, 6)
    expected = grouped(x, conv.weight, conv.bias)
    expected = F.silu(expected) if activation == "silu" else expected
    torch.testing.assert_close(conv(x, Scan(None, Span.of(2, 9)), "conv"), expected, rtol=0, atol=1e-13)


def test_the_layer_steps_through_its_named_state() -> None:
    conv, x = layer(), normal(2, 9, 6)
    whole = Scan(None, Span.of(2, 9))
    expected, state, outputs = conv(x, whole, "q_conv"), None, []
    for t in range(9):
        scan = Scan(state, Span.of(2, 1, start=t))
        outputs.append(conv(x[:, t : t + 1], scan, "q_conv"))
        state = scan.after
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(state["q_conv"].inputs, whole.after["q_conv"].inputs, rtol=0, atol=0)


def test_the_layer_begins_as_convolution_layers_do() -> None:
    conv = ShortConv(4000, bias=True)
    conv.initialize(lambda name: generator(0, name), 0.02)
    for parameter in (conv.weight, conv.bias):
        assert parameter is not None
        assert 0.49 < float(parameter.detach().abs().max()) <= 0.5
        assert abs(float(parameter.detach().mean())) < 0.02
