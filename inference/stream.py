"""Decodes tokens to text as they come, up to a stop text or an end token."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from tokenizers import Tokenizer


class TextStream:
    """Decodes one text token by token, in whole characters.

    The text ends at the first end token, before the `stop` text, or after the last token.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | None = None):
        self.tokens, self.ends, self.stop = tokenizer.tokens, tokenizer.ends, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.has_ended = "", False

    def add(self, token: int | None) -> str:
        """The text that one more token completes; None, for the end, gives the text held back."""
        if self.has_ended:
            return ""
        self.has_ended = token is None or token in self.ends
        data = b"" if self.has_ended else self.tokens[token]
        text, n_held = self.held + self.decoder.decode(data, final=self.has_ended), 0
        if self.stop and self.stop in text:
            text, self.has_ended = text.partition(self.stop)[0], True
        elif self.stop and not self.has_ended:  # the text may end with a part of the stop text
            lengths = range(len(self.stop) - 1, 0, -1)
            n_held = next((n for n in lengths if text.endswith(self.stop[:n])), 0)
        boundary = len(text) - n_held
        self.held = text[boundary:]
        return text[:boundary]


def added_texts(
    tokens: Iterable[Sequence[int]], streams: Iterable[TextStream]
) -> Iterator[list[str]]:
    """Yields the text that each stream adds with its next token, until all streams have ended."""
    streams = list(streams)
    for new in chain(tokens, [[None] * len(streams)]):
        yield [stream.add(token) for stream, token in zip(streams, new, strict=True)]
        if all(stream.has_ended for stream in streams):
            return
