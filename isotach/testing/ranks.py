"""Law 10 needs processes: three ranks on this machine, each holding a third of the sequence.

They are started once, for all subjects, and end with the process that started them.
"""

import atexit
import functools
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from isotach import shapes
from isotach.ops.engine import Span
from isotach.testing.laws import Case, error, floating, weights
from isotach.testing.subjects import SIZES, Subject

RANKS, TIME = 3, 36
PATIENCE = 240.0  # seconds for one subject


def sharded(subject: Subject) -> Iterator[Case]:
    """Outputs, final state and gradients of three ranks against one process."""
    results = _started().of(subject)
    for variant in subject.variants:
        parts = [torch.load(file) for file in results[variant]]
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


@functools.cache
def _started() -> "_Ranks":
    return _Ranks()


class _Ranks:
    """Processes that wait for subjects."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="isotach-ranks-"))
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(RANKS)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_rank, args=(rank, self._folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()
        atexit.register(self._end)

    def of(self, subject: Subject) -> dict[str, list[Path]]:
        """Every variant's files, rank by rank. RuntimeError where a rank fails, which ends all: others wait for it."""
        for pipe in self._pipes:
            pipe.send((type(subject), subject.name))
        waiting = list(self._pipes)
        while waiting:
            ready = [pipe for pipe in wait(waiting, timeout=PATIENCE) if isinstance(pipe, Connection)]
            for pipe in ready:
                try:
                    fault = pipe.recv()
                except EOFError:
                    fault = "it has died"
                if fault is not None:
                    self._end()
                    raise RuntimeError(f"rank {self._pipes.index(pipe)} of {subject.name}: {fault}")
                waiting.remove(pipe)
            if not ready:
                self._end()
                raise RuntimeError(f"ranks of {subject.name}: not done after {PATIENCE:g} seconds")
        return {v: [_file(self._folder, v, rank) for rank in range(RANKS)] for v in subject.variants}

    def _end(self) -> None:
        _started.cache_clear()
        atexit.unregister(self._end)
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _rank(rank: int, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    while True:
        try:
            kind, name = pipe.recv()
        except EOFError:  # whoever started this has gone
            return
        try:
            subject = kind.named(name)
            for variant in subject.variants:
                torch.save(
                    _forward_backward(subject, variant, rank, RANKS, dist.group.WORLD), _file(folder, variant, rank)
                )
            pipe.send(None)
        except Exception:  # noqa: BLE001  told where it was asked for
            pipe.send(traceback.format_exc())


def _file(folder: Path, variant: str, rank: int) -> Path:
    return folder / f"{variant}-{rank}.pt"


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
