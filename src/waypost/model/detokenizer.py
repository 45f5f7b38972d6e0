"""Tokens to text one at a time, never half a character.

Invariant: whatever the tokens, the pieces of `push` and `flush` join to the text that decoding all tokens at once gives.

Three things can still change what is decoded already: bytes of an unfinished character (shown as U+FFFD at the end), a run
of byte tokens (`<0x0A>`), which some decoders accept or refuse as a whole, and the removal of spaces before punctuation.
Text is held back until none of them can. The tokens that decoding starts from are forgotten as soon as one of them
stands for whole characters by itself, so that a long stream costs no more per token than a short one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\ufffd"


def tidy(text: str) -> str:
    """Drops the space before punctuation and English contractions: `clean_up_tokenization_spaces` of old tokenizers."""
    for end in (".", "?", "!", ","):
        text = text.replace(" " + end, end)
    text = text.replace(" ' ", "'")
    for end in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(" " + end, end)
    return text


class Detokenizer:
    """`decode` maps ids to text; `skip` holds ids that leave no trace; `token` names the string of an id; `alone`, which may
    remember, is `decode` of one id."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        skip: Container[int],
        token: Callable[[int], str | None],
        byte_runs: bool,
        tidied: bool,
        alone: Callable[[int], str] | None = None,
    ) -> None:
        self._decode, self._skip, self._token, self._byte_runs, self._tidied = decode, skip, token, byte_runs, tidied
        self._alone = alone if alone is not None else lambda token_id: decode([token_id])
        self._ids: list[int] = []
        self._given = ""  # the part of decode(self._ids) that was given out
        self._raw = ""  # decoded, but not yet safe to tidy

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is now certain, possibly none."""
        token = self._token(token_id)
        if token is None or token_id in self._skip:
            return ""
        self._ids.append(token_id)
        is_byte = self._byte_runs and _BYTE.fullmatch(token) is not None
        if is_byte:
            return ""
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._given) :]
        alone = self._alone(token_id)
        if alone and _UNFINISHED not in alone:
            self._ids, text = [token_id], alone
        self._given = text
        return self._tidy(new)

    def flush(self) -> str:
        """The rest, at the end of the text; the object is then as new."""
        rest = self._decode(self._ids)[len(self._given) :]
        rest = tidy(self._raw + rest) if self._tidied else rest
        self._ids, self._given, self._raw = [], "", ""
        return rest

    def _tidy(self, new: str) -> str:
        """A rule of `tidy` takes a space and up to three other characters: text after three without a space is certain."""
        if not self._tidied:
            return new
        self._raw += new
        cut = len(self._raw)
        while cut > 0 and " " in self._raw[max(0, cut - 3) : cut]:
            cut -= 1
        if cut < 3:
            return ""
        done, self._raw = tidy(self._raw[:cut]), self._raw[cut:]
        return done
