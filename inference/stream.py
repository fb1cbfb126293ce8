"""The text of tokens that come one by one."""

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

from tokenizers import Tokenizer


class TextStream:
    """The text of tokens, as far as it is certain: whole characters, without the `stop` text.

    It ends with the first id of `ends`, before the stop text, or when no token is left.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | None = None, ends: Collection[int] = ()):
        self.tokens, self.stop, self.ends = tokenizer.tokens, stop, ends
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.has_ended = "", False

    def add(self, token: int | None) -> str:
        """The text that becomes certain with one more token, or, by None, with the last."""
        if self.has_ended:
            return ""
        self.has_ended = token is None or token in self.ends
        data = b"" if self.has_ended else self.tokens[token]
        text, n_held = self.held + self.decoder.decode(data, final=self.has_ended), 0
        if self.stop and self.stop in text:
            text, self.has_ended = text.partition(self.stop)[0], True
        elif self.stop and not self.has_ended:  # its beginning may be at the end of the text
            lengths = range(len(self.stop) - 1, 0, -1)
            n_held = next((n for n in lengths if text.endswith(self.stop[:n])), 0)
        boundary = len(text) - n_held
        self.held = text[boundary:]
        return text[:boundary]


def added_texts(
    tokens: Iterable[Sequence[int]], streams: Iterable[TextStream]
) -> Iterator[list[str]]:
    """Yields the text that each stream adds with its next token, until all of them have ended."""
    streams = list(streams)
    for new in chain(tokens, [[None] * len(streams)]):
        yield [stream.add(token) for stream, token in zip(streams, new, strict=True)]
        if all(stream.has_ended for stream in streams):
            return
