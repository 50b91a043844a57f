"""Sequence parallelism: each rank summarises its stretch, ranks exchange summaries, each reads from its true past.

    state before rank r = (summary_0 · … · summary_{r-1}) applied to s0

gather (LASP-2, arXiv:2502.07563): one all-gather of every summary, then each rank composes those before it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isotach.ops.recurrence import Recurrence, Tensors


def exchange(rec: Recurrence, local: Tensors, s0: Tensors, *, group: dist.ProcessGroup) -> tuple[Tensors, Tensors]:
    """The state before this rank's stretch, and the state after the last rank's; differentiable.

    local  this rank's summary;  s0  the state before the first rank, equal on every rank
    """
    tensors = _Exchange.apply(group, len(local), *local, *s0)
    gathered, before = tensors[: len(local)], type(s0)(*tensors[len(local) :])
    state = before
    for rank in range(dist.get_world_size(group)):
        if rank == dist.get_rank(group):
            before = state
        state = rec.apply(type(local)(*(leaf[rank] for leaf in gathered)), state)
    return before, state


class _Exchange(torch.autograd.Function):
    """Summaries (…) -> (R, …) on every rank, s0 unchanged. Every rank contributed to what each rank read, so a gradient
    is the sum over ranks.

    s0 goes through the same node because rank 0 reads nothing else: were its backward not to come by here, the other
    ranks would wait for it forever.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, summaries: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.summaries = group, summaries
        outputs = []
        for leaf in leaves[:summaries]:
            parts = [torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) for _ in range(group.size())]
            dist.all_gather(parts, leaf.contiguous(), group=group)
            outputs.append(torch.stack(parts))
        outputs += [leaf.clone() for leaf in leaves[summaries:]]
        ctx.mark_non_differentiable(*(leaf for leaf in outputs if not leaf.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        results: list[Tensor | None] = []
        for i, grad in enumerate(grads):
            if not grad.is_floating_point():
                results.append(None)
                continue
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)
            results.append(grad[dist.get_rank(ctx.group)] if i < ctx.summaries else grad)
        return None, None, *results
