"""DecoderState: a value that is forked, selected, saved and loaded, and never mistaken for another model's."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from isotach import mixers
from isotach.config import parse
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.state import DecoderState
from isotach.ops.engine import Span

PATTERNS = (["lightning"], ["softmax"], ["lightning", "softmax"])


def decoder(pattern: list[str], seed: int = 0, **changes: object) -> Decoder:
    table = {"vocab": 31, "width": 16, "depth": 2, "heads": 2, "hidden": 24, "pattern": pattern} | changes
    return Decoder(parse(ModelConfig, table, who="test"), seed=seed)


def text(rows: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(31, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest) -> Decoder:
    return decoder(request.param)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Decoder, Path]:
    model = decoder(["lightning", "softmax"])
    with torch.no_grad():
        _, state = model(text(2, 10))
    state.save(tmp_path / "state", weights=model.fingerprint(), tokens="abc")
    return model, tmp_path / "state"


@torch.no_grad()
def test_saved_and_loaded_goes_on_to_the_bit(model: Decoder, tmp_path: Path) -> None:
    tokens = text(2, 20)
    _, state = model(tokens[:, :10])
    state.save(tmp_path / "state", weights=model.fingerprint(), tokens="abc")
    loaded = DecoderState.load(tmp_path / "state", decoder=model, tokens="abc")
    assert torch.equal(model(tokens[:, 10:], loaded)[0], model(tokens[:, 10:], state)[0])
    assert loaded.positions.tolist() == [10, 10]
    assert (tmp_path / "state").stat().st_size <= state.nbytes() + 65536


@torch.no_grad()
def test_fork_select_and_cat_are_rows(model: Decoder) -> None:
    _, state = model(text(2, 10))
    forked = state.fork(3)
    assert (forked.rows, forked.positions.tolist()) == (6, [10] * 6)
    following = text(6, 4, seed=1)
    together, _ = model(following, forked)
    for row in range(6):
        alone, _ = model(following[row : row + 1], state.select(torch.tensor([row // 3])))
        torch.testing.assert_close(together[row : row + 1], alone)
    rejoined = DecoderState.cat([state.select(torch.tensor([1])), state.select(torch.tensor([0]))])
    swapped, _ = model(following[:2], rejoined)
    torch.testing.assert_close(swapped, model(following[:2].flip(0), state)[0].flip(0))


@torch.no_grad()
def test_rows_of_different_ages_step_together() -> None:
    model = decoder(["lightning", "softmax"]).double()
    tokens = text(1, 30)
    states = [model(tokens[:, :n])[1] for n in (3, 17, 8)]
    together, after = model(text(3, 5, seed=2), DecoderState.cat(states))
    assert after.positions.tolist() == [8, 22, 13]
    for row, state in enumerate(states):
        alone, _ = model(text(3, 5, seed=2)[row : row + 1], state)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-12)


def _causal() -> list[str]:
    return [name for name in mixers.names() if mixers.find(name).causal]


CACHED = {"lightning": {"cache": {"segment": 4}}}
EVERY = [*((name, {}) for name in _causal()), ("lightning", CACHED), ("tnn", {"tnn": {"window": 6}})]


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[f"{name}{' '.join(options)}" for name, options in EVERY])
@torch.inference_mode()
def test_rows_of_any_age_come_and_go_and_are_as_if_alone(name: str, options: dict[str, object]) -> None:
    """Stepped and read packed; one of them has read nothing, and the growing ones have room reserved or not."""
    model = decoder(["lightning", name], **options).double()
    tokens = text(1, 40)
    alone = [model.initial(), *(model(tokens[:, :n])[1] for n in (3, 17, 8))]
    alone[2] = alone[2].reserved(lambda block, state: model.room(block, state, 40))
    together = DecoderState.cat(alone)
    following = text(8, 12, seed=2)

    def check(outputs: Tensor, rows: list[int], steps: slice) -> None:
        for place, row in enumerate(rows):
            expected, alone[row] = model(following[row : row + 1, steps], alone[row])
            torch.testing.assert_close(outputs[place : place + 1], expected, rtol=1e-9, atol=1e-11)

    for t in range(3):
        outputs, together = model(following[:4, t : t + 1], together)
        check(outputs, [0, 1, 2, 3], slice(t, t + 1))
    alone += [model(tokens[:, :5])[1], model.initial()]
    together = together.exchanged(torch.tensor([3, 1]), [alone[4], alone[5]])
    rows = [3, 1, 4, 5]
    outputs, together = model(following[rows, 3:4], together)
    check(outputs, rows, slice(3, 4))
    lengths = [2, 0, 5, 1]
    packed = torch.cat([following[row, 4 : 4 + n] for row, n in zip(rows, lengths, strict=True)])[None]
    span = Span.packed(torch.tensor([0, *lengths]).cumsum(0), start=together.positions)
    outputs, together = model(packed, together, span=span)
    for row, n, own in zip(rows, lengths, outputs[0].split(lengths), strict=True):
        if n:
            expected, alone[row] = model(following[row : row + 1, 4 : 4 + n], alone[row])
            torch.testing.assert_close(own[None], expected, rtol=1e-9, atol=1e-11)
    together = together.select(torch.tensor([2, 0]))
    outputs, _ = model(following[[4, 3], 9:11], together.compact())
    check(outputs, [4, 3], slice(9, 11))


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[f"{name}{' '.join(options)}" for name, options in EVERY])
@torch.inference_mode()
def test_every_state_is_saved_and_loaded(name: str, options: dict[str, object], tmp_path: Path) -> None:
    model = decoder(["lightning", name], **options)
    tokens = text(1, 30)
    for read in (0, 1, 23):
        state = model(tokens[:, :read])[1] if read else model.initial()
        reserved = state.reserved(lambda block, name: model.room(block, name, 30))
        reserved.save(tmp_path / "state", weights=model.fingerprint(), tokens="abc")
        loaded = DecoderState.load(tmp_path / "state", decoder=model, tokens="abc")
        assert loaded.nbytes() == state.nbytes()
        following = tokens[:, read : read + 7]
        torch.testing.assert_close(model(following, loaded)[0], model(following, state)[0], rtol=1e-3, atol=1e-6)


@torch.inference_mode()
def test_a_growing_row_stays_where_its_room_was_reserved() -> None:
    model = decoder(["softmax"])
    state = DecoderState.cat([model.initial()] * 2).reserved(lambda block, name: 40)
    where = [row.k.data_ptr() for row in state.blocks[0]["main"]]
    for t in range(40):
        _, state = model(text(2, 40)[:, t : t + 1], state)
    assert [row.k.data_ptr() for row in state.blocks[0]["main"]] == where
    assert state.compact().nbytes() == 2 * model.state_bytes(40)


@torch.no_grad()
def test_linear_layers_are_of_constant_size() -> None:
    model = decoder(["lightning"])
    assert model(text(1, 4))[1].nbytes() == model(text(1, 400))[1].nbytes() == model.state_bytes(10**6)


def test_another_model_is_refused(saved: tuple[Decoder, Path]) -> None:
    with pytest.raises(UserError, match=r"weights .* load it with the model that made it"):
        DecoderState.load(saved[1], decoder=decoder(["lightning", "softmax"], seed=1), tokens=None)


def test_other_tokens_are_refused(saved: tuple[Decoder, Path]) -> None:
    with pytest.raises(UserError, match="expected tokens xyz, got abc"):
        DecoderState.load(saved[1], decoder=saved[0], tokens="xyz")


def test_another_precision_is_refused(saved: tuple[Decoder, Path], tmp_path: Path) -> None:
    model = saved[0].double()
    state = model(text(1, 3))[1]
    state.save(tmp_path / "double", weights=saved[0].fingerprint(), tokens="abc")
    with pytest.raises(UserError, match=r"weights|dtypes"):
        DecoderState.load(tmp_path / "double", decoder=decoder(["lightning", "softmax"]), tokens=None)


def test_a_missing_file_is_refused(saved: tuple[Decoder, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        DecoderState.load(tmp_path / "nothing", decoder=saved[0], tokens=None)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(saved: tuple[Decoder, Path], keep: int) -> None:
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[:keep])
    with pytest.raises(UserError, match="expected"):
        DecoderState.load(saved[1], decoder=saved[0], tokens=None)


def test_an_edited_byte_is_refused(saved: tuple[Decoder, Path]) -> None:
    content = bytearray(saved[1].read_bytes())
    content[-5] ^= 1
    saved[1].write_bytes(content)
    with pytest.raises(UserError, match="edited or damaged"):
        DecoderState.load(saved[1], decoder=saved[0], tokens=None)


def test_a_changed_position_is_refused(saved: tuple[Decoder, Path]) -> None:
    with safe_open(saved[1], framework="pt") as file:
        header, leaves = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(leaves, saved[1], header | {"positions": "[9, 10]"})
    with pytest.raises(UserError, match="edited or damaged"):
        DecoderState.load(saved[1], decoder=saved[0], tokens=None)


def test_a_foreign_safetensors_file_is_refused(saved: tuple[Decoder, Path], tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="expected format"):
        DecoderState.load(tmp_path / "foreign", decoder=saved[0], tokens=None)
