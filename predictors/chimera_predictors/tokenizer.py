"""Texts to token ids: a `tokenizer.json`, and what is kept of a long text.

Its head and its tail, the middle goes: first by bytes (text.py), then by tokens. Knows neither
weights nor torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

try:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer as LibraryTokenizer
except ImportError as error:
    raise ImportError(
        f"{error}; tokenising needs: pip install 'chimera-daemon[predict]'"
    ) from error

from chimera_predictors.text import cut

# English has 4 to 5 bytes a token. Of 3,678 benchmark prompts that this cuts, with 64 to 256 tokens
# kept of each, one kept other tokens than it would have without the cut.
BYTES_PER_TOKEN = 12


class Packed(NamedTuple):
    """Token ids of several texts, one after the other."""

    ids: NDArray[np.int32]  # [T]
    lengths: NDArray[np.int32]  # [S], each >= 1, T in all


class Tokenizer:
    """A `tokenizer.json`, with texts cut to `max_tokens`: the first and the last half of the
    content tokens (an odd one goes to the head) between the special ones that frame every text.

    Half and half because a task states itself at the head and asks at the tail. Raises ValueError
    for a file that is no tokenizer and for `max_tokens` too small for one content token.
    """

    def __init__(self, definition: str, max_tokens: int) -> None:
        """`definition` is the text of a `tokenizer.json`."""
        try:
            self._library = LibraryTokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._before, self._after = self._frame()
        if max_tokens <= self._before + self._after:
            raise ValueError(
                f"max_tokens is {max_tokens}; with {self._before + self._after} special tokens"
                " around each text there is no room for one of the text"
            )
        self.definition = definition
        self.max_tokens = max_tokens
        self.max_bytes = BYTES_PER_TOKEN * max_tokens

    @property
    def vocabulary(self) -> int:
        """One more than the highest token id."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> Packed:
        """Token ids of all `texts`, cut first by bytes and then by tokens.

        An empty text gives the special tokens alone, or the single id 0 if there are none. Uses
        the library's threads: for one text they cost nothing, for eight they already pay.
        """
        cleaned = [cut(text, self.max_bytes) for text in texts]
        kept = [self._shorten(e.ids) for e in self._library.encode_batch_fast(cleaned)]
        return Packed(
            np.array([token for ids in kept for token in ids], dtype=np.int32),
            np.array([len(ids) for ids in kept], dtype=np.int32),
        )

    def _frame(self) -> tuple[int, int]:
        """How many special tokens stand before and after a text."""
        bare = self._library.encode("a", add_special_tokens=False).ids
        framed = self._library.encode("a").ids
        extra = len(framed) - len(bare)
        before = next((i for i in range(extra) if framed[i : i + len(bare)] == bare), extra)
        return before, extra - before

    def _shorten(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_tokens:
            return ids or [0]
        content = self.max_tokens - self._before - self._after
        tail = content // 2
        return ids[: self._before + content - tail] + ids[len(ids) - self._after - tail :]
