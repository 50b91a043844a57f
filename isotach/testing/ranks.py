"""Law 10 needs processes: three ranks on this machine, each holding a third of the sequence."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from isotach import shapes
from isotach.ops.engine import Span
from isotach.testing.laws import Case, error, floating, weights
from isotach.testing.subjects import SIZES, Subject

RANKS, TIME = 3, 36


def sharded(subject: Subject) -> Iterator[Case]:
    """Outputs, final state and gradients of three ranks against one process."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (type(subject), subject.name, folder), nprocs=RANKS)
        for variant in subject.variants:
            parts = [torch.load(Path(folder) / f"{variant}-{rank}.pt") for rank in range(RANKS)]
            output, state, grads, past_grads = _forward_backward(subject, variant, 0, 1, None)
            shares = zip(*(part[2] for part in parts), strict=True)
            gathered = [_gathered(share, leaf) for share, leaf in zip(shares, grads, strict=True)]
            yield f"{variant} outputs", error([torch.cat([part[0] for part in parts], 1)], [output])
            for rank, part in enumerate(parts):
                yield f"{variant} state on rank {rank}", error(part[1], state)
            yield f"{variant} gradients", error([*gathered, *parts[0][3]], [*grads, *past_grads])


def _gathered(shares: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Stretches laid end to end; a value that every rank holds whole has the sum of their gradients."""
    return sum(shares[1:], shares[0]) if shares[0].shape == like.shape else torch.cat(shares, 1)


def _rank(rank: int, kind: type[Subject], name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    subject = kind.named(name)
    for variant in subject.variants:
        torch.save(_forward_backward(subject, variant, rank, RANKS, dist.group.WORLD), f"{folder}/{variant}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything is written; tearing down an interpreter that held gloo's threads has been seen to abort


def _forward_backward(
    subject: Subject, variant: str, rank: int, ranks: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, final state, gradients of this rank's inputs and of the initial state."""
    size = TIME // ranks
    whole = subject.example(variant, SIZES | {"T": TIME}, torch.float64)
    x = shapes.time_slice(whole, rank * size, (rank + 1) * size)
    x = type(x)(*(leaf.clone().requires_grad_() for leaf in x))
    past = subject.past(variant, SIZES["B"], torch.float64)
    leaves = [leaf.requires_grad_() for leaf in floating(subject, past)]
    positions = Span.of(SIZES["B"], size, start=3 + rank * size).positions
    output, state = subject.run(variant, x, past, Span(positions, group=group))
    share = weights(torch.empty(output.shape[0], TIME, *output.shape[2:]), 0).split(size, 1)[rank]
    loss = (output * share).sum()
    if rank == ranks - 1:  # the final state is equal on every rank and counts once
        loss = loss + sum((leaf * weights(leaf, 1)).sum() for leaf in subject.leaves(state))
    grads = torch.autograd.grad(loss, [*x, *leaves])
    final = [leaf.detach() for leaf in subject.leaves(state)]
    return output.detach(), final, list(grads[: len(x)]), list(grads[len(x) :])
