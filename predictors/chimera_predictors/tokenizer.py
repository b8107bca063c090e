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
from chimera_predictors.words import ID_BYTES, Words, pack_ids

# English has 4 to 5 bytes a token. Of 3,678 benchmark prompts that this cuts, with 64 to 256 tokens
# kept of each, one kept other tokens than it would have without the cut.
BYTES_PER_TOKEN = 12

_PROBE = "a"


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
        self._words = self._known_words()
        special = (len(self._before) + len(self._after)) // ID_BYTES
        content = max_tokens - special
        if content < 1:
            raise ValueError(
                f"max_tokens is {max_tokens}; with {special} special tokens around each text there"
                " is no room for one of the text"
            )
        self.definition = definition
        self.max_tokens = max_tokens
        self.max_bytes = BYTES_PER_TOKEN * max_tokens
        self._half = (content + 1) // 2
        self._tail = len(self._after) + ID_BYTES * (content // 2)

    @property
    def vocabulary(self) -> int:
        """One more than the highest token id."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> Packed:
        """Token ids of all `texts`, cut first by bytes and then by tokens.

        An empty text gives the special tokens alone, or the single id 0 if there are none. Where
        words.py does not know the kind of tokenizer, the library's threads are used: for one text
        they cost nothing, for eight they already pay.
        """
        cleaned = [cut(text, self.max_bytes) for text in texts]
        kept = [self._shorten(ids) for ids in self._tokenise(cleaned)]
        return Packed(
            np.frombuffer(bytearray().join(kept), dtype=np.int32),
            np.array([len(ids) // ID_BYTES for ids in kept], dtype=np.int32),
        )

    def _tokenise(self, texts: Sequence[str]) -> list[bytes]:
        """Packed ids of each text, special ones included."""
        if self._words is None:
            return self._by_library(texts)
        return [self._by_words(self._words, text) for text in texts]

    def _by_words(self, words: Words, text: str) -> bytes:
        ids = words.encode(text, self._half)
        return self._by_library([text])[0] if ids is None else self._before + ids + self._after

    def _by_library(self, texts: Sequence[str]) -> list[bytes]:
        return [pack_ids(encoding.ids) for encoding in self._library.encode_batch_fast(texts)]

    def _frame(self) -> tuple[bytes, bytes]:
        """Packed ids of the special tokens before and after a text."""
        bare = self._library.encode(_PROBE, add_special_tokens=False).ids
        framed = self._library.encode(_PROBE).ids
        extra = len(framed) - len(bare)
        before = next((i for i in range(extra) if framed[i : i + len(bare)] == bare), extra)
        return pack_ids(framed[:before]), pack_ids(framed[before + len(bare) :])

    def _known_words(self) -> Words | None:
        special = self._library.encode("").ids
        if set(special) & set(self._library.encode(_PROBE, add_special_tokens=False).ids):
            return None  # where the special tokens end is a guess
        try:
            return Words(self._library)
        except ValueError:
            return None

    def _shorten(self, ids: bytes) -> bytes:
        limit = ID_BYTES * self.max_tokens
        if len(ids) <= limit:
            return ids or pack_ids([0])
        return ids[: limit - self._tail] + ids[len(ids) - self._tail :]
