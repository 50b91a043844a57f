"""Steps as graphs: the same numbers as steps one by one, whoever comes and goes, from fixed places in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isotach import mixers
from isotach.config import parse
from isotach.data.tokenizer import ByteTokenizer
from isotach.infer.calls import step
from isotach.infer.generate import Session
from isotach.infer.graphs import Stepper, Work
from isotach.infer.sample import Sampling
from isotach.models.decoder import Decoder, ModelConfig
from isotach.models.state import DecoderState

VOCAB = 50


class Recorder:
    """Stands for CUDA graphs: what is recorded reads and writes the same memory whenever it is done again."""

    def __init__(self) -> None:
        self.recorded = 0

    def capture(self, work: Work) -> tuple[Tensor, Callable[[], object]]:
        self.recorded += 1
        result = work()
        return result, lambda: result.copy_(work())


def model(*pattern: str, vocab: int = VOCAB) -> Decoder:
    table = {"vocab": vocab, "width": 16, "depth": len(pattern), "heads": 2, "hidden": 16, "pattern": list(pattern)}
    decoder = Decoder(parse(ModelConfig, table, who="test"))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)
    return decoder


def streaming() -> list[str]:
    """The mixers whose states do not grow."""
    found = []
    for name in mixers.names():
        if mixers.find(name).causal:
            try:
                decoder = model(name)
            except Exception:  # noqa: BLE001  a mixer that is no language model's
                continue
            if not decoder.initial().grows:
                found.append(name)
    return found


def leaves(state: DecoderState) -> list[Tensor]:
    return [state.positions, *(leaf for block in state.blocks for own in block.values() for leaf in own)]


def check(decoder: Decoder, rows: list[int], **how: object) -> Recorder:
    """Rows join and leave as the list says; every step is held against calls.step from the same state."""
    recorder = Recorder()
    stepper, stream = Stepper(decoder, values=False, capture=recorder.capture), torch.Generator().manual_seed(0)
    state, expected = decoder.initial(), decoder.initial()
    for count in rows:
        if count != state.rows:
            chosen = torch.randint(state.rows, (count,), generator=stream)
            state, expected = state.select(chosen), expected.select(chosen)
        tokens = torch.randint(VOCAB, (count,), generator=stream).tolist()
        logits, state = stepper.step(tokens, state)
        want, expected = step(decoder, tokens, expected)
        torch.testing.assert_close(logits, want)
        for got, exact in zip(leaves(state), leaves(expected), strict=True):
            torch.testing.assert_close(got, exact)
    return recorder


@pytest.mark.parametrize("name", streaming())
def test_every_mixer_steps_as_it_does_alone(name: str) -> None:
    check(model(name, name), [1, 1, 1, 1])


def test_rows_come_and_go() -> None:
    recorder = check(model("lightning", "gated_delta"), [1, 1, 3, 3, 3, 2, 4, 4, 3, 1, 1, 5, 5, 2, 2])
    # For one row; with room for four: four, two, one; with room for eight: eight, two. A pair of graphs each.
    assert recorder.recorded == 2 * (1 + 3 + 2)


def test_the_state_before_a_step_outlives_it() -> None:
    decoder, recorder = model("lightning"), Recorder()
    stepper, state = Stepper(decoder, values=False, capture=recorder.capture), decoder.initial()
    for token in range(6):
        kept = [leaf.clone() for leaf in leaves(state)]
        _, after = stepper.step([token], state)
        assert all(map(torch.equal, leaves(state), kept))
        state = after


def test_states_that_are_values_stay() -> None:
    """Two conversations through one stepper, gone on with from any state that it ever gave."""
    decoder, recorder = model("gated_delta"), Recorder()
    stepper = Stepper(decoder, values=True, capture=recorder.capture)
    given: list[tuple[DecoderState, DecoderState]] = [(decoder.initial(), decoder.initial())]
    for token, start in ((1, 0), (2, 1), (3, 0), (4, 2), (5, 3), (6, 1), (7, 6)):
        logits, state = stepper.step([token], given[start][0])
        want, expected = step(decoder, [token], given[start][1])
        assert torch.equal(logits, want)
        given.append((state, expected))
    for state, expected in given:
        assert all(map(torch.equal, leaves(state), leaves(expected)))
    assert recorder.recorded == 2


def test_a_session_and_its_fork() -> None:
    """A session whose steps are graphs writes what it writes without, and so does one that forks off on its way."""

    decoder = model("lightning", vocab=257)

    def texts(recorder: Recorder | None) -> list[list[int]]:
        session = Session(decoder, ByteTokenizer())
        if recorder is not None:
            session._stepper = Stepper(decoder, values=True, capture=recorder.capture)
        session.read([1, 2, 3])
        written, forks = [], []
        for number, event in enumerate(session.generate(Sampling(seed=1, max_tokens=12, ignore_eos=True))):
            written.append(event.token)
            if number in (3, 7):
                forks.append(session.fork())
                written += [each.token for each in forks[0].generate(Sampling(seed=number, max_tokens=3))]
        return [written, *([each.token for each in fork.generate(Sampling(seed=5, max_tokens=6))] for fork in forks)]

    recorder = Recorder()
    assert texts(recorder) == texts(None)
    assert recorder.recorded == 2


def test_a_state_from_elsewhere_is_copied_in_and_left_alone() -> None:
    decoder, recorder = model("mamba2"), Recorder()
    stepper, start = Stepper(decoder, values=False, capture=recorder.capture), decoder.initial()
    _, first = step(decoder, [3], start)
    kept = [leaf.clone() for leaf in leaves(first)]
    logits = [stepper.step([token], first)[0].clone() for token in (5, 5)]
    assert torch.equal(*logits)
    assert all(map(torch.equal, leaves(first), kept))


def test_what_grows_is_stepped_without_graphs() -> None:
    assert check(model("lightning", "softmax"), [1, 1, 2, 2]).recorded == 0


def test_there_are_no_graphs_on_a_cpu() -> None:
    decoder = model("lightning")
    logits, state = Stepper(decoder, values=False).step([1], decoder.initial())
    want, expected = step(decoder, [1], decoder.initial())
    assert torch.equal(logits, want)
    assert all(map(torch.equal, leaves(state), leaves(expected)))


LOOKING = ("cosformer", "swa", "transnormer")  # at how far a row is, and at what is in a window or a block


@pytest.mark.parametrize("name", streaming())
def test_what_looks_at_values_is_not_recorded(name: str) -> None:
    """It steps all the same; everything else is recorded."""
    recorder = check(model(name, name), [1, 1, 2, 2])
    assert (recorder.recorded == 0) == (name in LOOKING)


@pytest.mark.gpu
@pytest.mark.parametrize("name", streaming())
def test_on_a_gpu(name: str) -> None:
    """Graphs against plain steps of the same device."""
    decoder = model(name, name).cuda()
    stepper, state, expected = Stepper(decoder, values=False), decoder.initial(), decoder.initial()
    for count, token in ((1, 3), (1, 4), (3, 5), (3, 6), (2, 7), (2, 8)):
        if count != state.rows:
            chosen = torch.arange(count, device="cuda") % state.rows
            state, expected = state.select(chosen), expected.select(chosen)
        logits, state = stepper.step([token] * count, state)
        want, expected = step(decoder, [token] * count, expected)
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
