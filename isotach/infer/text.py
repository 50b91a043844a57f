"""Text out of tokens, up to a stop string."""

from collections.abc import Sequence

from isotach.data.tokenizer import TextStream, Tokenizer


class StoppedText:
    """Grows by tokens, gives out text, and ends before the first stop string.

    Text that may turn out to be the beginning of a stop string is held back until it is decided, so what `push` and
    `finish` return, joined, never holds a stop string nor any beginning of the one that ended it. Stop strings are
    compared as text: they may span tokens, begin inside one, and hold characters of several bytes. When several are
    present, the one that begins first ends the text.

    - stop: the strings; they may be exchanged between two tokens, and then count from there on.
    - before: the token that the text follows, None for none.
    - stopped: whether a stop string ended the text.
    - hidden: how many of the last tokens have not shown any of their text, so far or, once stopped, ever.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, before: int | None) -> None:
        self.stopped = False
        self._stream = TextStream(tokenizer, before)
        self.stop = tuple(stop)
        self._held = ""
        self._starts: list[int] = []  # where in the held text every hidden token begins

    @property
    def hidden(self) -> int:
        return len(self._starts)

    def push(self, token: int) -> str:
        """The text that this token settles; it may be empty. Sets `stopped` when a stop string is complete."""
        self._starts.append(len(self._held))
        self._held += self._stream.push(token)
        return self._give(len(self._held) - self._undecided())

    def finish(self) -> str:
        """The text still held back: no more tokens come, so no stop string will be completed."""
        if self.stopped:
            return ""
        self._held += self._stream.finish()
        text = self._give(len(self._held))
        if not self.stopped:
            self._starts = []  # what gave no text by now is shown as well as it can be
        return text

    def _give(self, length: int) -> str:
        starts = [start for stop in self.stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            length = min(starts)
        text, self._held = self._held[:length], self._held[length:]
        self._starts = [start - length for start in self._starts if start >= length]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self.stop)), 0)
