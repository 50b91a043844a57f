"""The task of keys that get a second value, replayed with a dictionary; DeltaNet's layer that only adds."""

import torch

from benchmarks.findings.delta_rule import KEYS, REWRITTEN, model, only_add, rewritings
from isotach.eval.recall import IGNORED
from isotach.nn.mixer import Scan
from isotach.ops.engine import Span


def test_rewritings() -> None:
    tokens, targets, old = rewritings(20, torch.Generator().manual_seed(0))
    writes = KEYS + REWRITTEN
    for row in range(len(tokens)):
        values: dict[int, list[int]] = {}
        for key, value in tokens[row, : 2 * writes].view(-1, 2).tolist():
            values.setdefault(key, []).append(value)
        assert sorted(map(len, values.values())) == [1] * (KEYS - REWRITTEN) + [2] * REWRITTEN
        asked = tokens[row, 2 * writes :: 2].tolist()
        assert sorted(asked) == sorted(values)
        assert targets[row, 2 * writes :: 2].tolist() == [values[key][-1] for key in asked]
        first = [values[key][0] if len(values[key]) == 2 else IGNORED for key in asked]
        assert old[row, 2 * writes :: 2].tolist() == first
        for marked in (targets, old):
            assert (marked[row, : 2 * writes] == IGNORED).all()
            assert (marked[row, 2 * writes + 1 :: 2] == IGNORED).all()


def test_only_add() -> None:
    """The memory is Σ β k v over all tokens, from the layer's own q, k, v and β."""
    decoder, x = model("delta", {}, width=16, seed=0), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    mixer = decoder.blocks[0].mixer
    (q, k, v, beta, _), aux = mixer.project(x, Scan(None, Span.of(2, 9)))
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    expected = mixer.output(torch.einsum("bhts,bshv->bthv", scores, beta * v), aux)
    only_add(decoder)
    found, _ = mixer(x, None, Span.of(2, 9))
    torch.testing.assert_close(found, expected)
