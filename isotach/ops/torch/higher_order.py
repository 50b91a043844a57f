"""Higher-order linear attention as nested chunk loops of the decay family; see ops/higher_order.py.

Each level is one pass of ops/torch/decay.py, whose backward is written by hand, over tokens that stay in memory between
passes: y and z, and their gradients, (B, T, H, K or V) each. Beside one pass of linear attention the second order and
the asymmetric form cost two, the third order three.
"""

from torch import Tensor

from isotach.ops.backends import register
from isotach.ops.decay import Decay
from isotach.ops.higher_order import Asymmetric, SecondOrder, ThirdOrder
from isotach.ops.recurrence import Tensors
from isotach.ops.torch.decay import decay

_decay = Decay()


@register(SecondOrder, "torch")
@register(Asymmetric, "torch")
@register(ThirdOrder, "torch")
def higher_order(
    rec: SecondOrder | Asymmetric | ThirdOrder,
    x: Tensors,
    s: Tensors,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensors]:
    def attend(x: Tensors, s: Tensors) -> tuple[Tensor, Tensors]:
        return decay(_decay, x, s, cu_seqlens, chunk_size)

    return rec.nest(x, s, attend)
