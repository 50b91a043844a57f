"""Higher-order linear attention as nested sweeps of the decay family's GPU kernels; see ops/higher_order.py.

Beside one pass of linear attention the second order and the asymmetric form cost two, the third order three. All are
in float32 whatever the inputs are: with y and z rounded to bfloat16, results were up to 3.6 times as wrong as the plain
backend's, and float16 does not hold a sum of products of three.
"""

from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.decay import Decay
from isotach.ops.higher_order import Asymmetric, SecondOrder, ThirdOrder
from isotach.ops.recurrence import Tensors
from isotach.ops.triton import decay

_decay = Decay()


def _refusal(x: Tensors, chunk_size: int | None) -> str | None:
    return decay.refusal(Decay.Inputs(x.q.float(), x.k, x.v, x.log_decay), chunk_size)


def _step(
    rec: SecondOrder | Asymmetric | ThirdOrder, x: Tensors, s: Tensors, into: Tensors | None
) -> tuple[Tensor, Tensors]:
    places = iter((None,) * len(s) if into is None else map(Decay.State, into))  # nest takes states in their order

    def attend(x: Decay.Inputs, s: Decay.State) -> tuple[Tensor, Decay.State]:
        return decay.step(_decay, x, s, next(places))

    return rec.nest(x, s, attend)


@register(SecondOrder, "triton", device="cuda", refusal=_refusal, step=_step)
@register(Asymmetric, "triton", device="cuda", refusal=_refusal, step=_step)
@register(ThirdOrder, "triton", device="cuda", refusal=_refusal, step=_step)
def higher_order(
    rec: SecondOrder | Asymmetric | ThirdOrder,
    x: Tensors,
    s: Tensors,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensors]:
    def attend(x: Decay.Inputs, s: Decay.State) -> tuple[Tensor, Decay.State]:
        return decay.decay(_decay, x, s, cu_seqlens, chunk_size)

    return rec.nest(x, s, attend)
