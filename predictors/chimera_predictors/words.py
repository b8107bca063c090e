"""Token ids of texts word by word, remembered, for tokenizers to which whitespace is a wall.

That is BERT's WordPiece: what stands before a space never changes the ids of what follows. All ids
come from the `tokenizers` library; a text or a tokenizer of which this file cannot tell that the
ids are the library's is left to it. Knows neither lengths to keep nor batches.
"""

import json
import re
from array import array
from collections.abc import Iterable
from typing import Any

# The different words of about 5,000 benchmark prompts: 9 MB. If all were as long as possible and
# Chinese, 50 MB.
CAPACITY = 65_536
LONGEST = 64  # characters of a word that is remembered; of longer ones hardly any comes again
ID_BYTES = 4

# `str.split` splits at these, BERT's normaliser drops them: "a\x0bb" is one word to the library.
NO_WALL = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
_PIECE = re.compile(r"[0-9A-Za-z]+|.")


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as native int32, `ID_BYTES` each: bytes are what joins and slices fastest."""
    return array("i", ids).tobytes()


class Words:
    """What a tokenizer of BERT's kind makes of texts without the special tokens around them."""

    def __init__(self, library: Any) -> None:
        """`library` is a `tokenizers.Tokenizer`; ValueError where it is not of this kind."""
        definition = json.loads(library.to_str())
        if not _is_bert(definition):
            raise ValueError("not BERT's WordPiece, normaliser and pre-tokenizer alone")
        self._memo = _Memo(library, definition)

    def __len__(self) -> int:
        """How many words are remembered, `CAPACITY` at most."""
        return len(self._memo)

    def encode(self, text: str, half: int) -> bytes | None:
        """Ids of `text`, packed; None if only the library can tell. Safe from several threads.

        Of a long text the middle may be missing, never one of the first or last `half` >= 1 ids.
        """
        if any(map(text.__contains__, NO_WALL)):
            return None
        first = text.split(None, half)
        if len(first) <= half:
            return self._join(first)
        last = first.pop().rsplit(None, half)
        if len(last) <= half:
            return self._join(first + last)
        head, tail = self._join(first), self._join(last[1:])
        if min(len(head), len(tail)) < half * ID_BYTES:  # there are words without any token
            return self._join(text.split())
        return head + tail

    def _join(self, words: list[str]) -> bytes:
        return b"".join(map(self._memo.__getitem__, words))


class _Memo(dict[str, bytes]):
    """Word -> its ids, computed when first asked for.

    Emptied when full: the words that matter are back after a few texts, and a hit, which most
    look-ups are, has no order to keep.
    """

    def __init__(self, library: Any, definition: dict[str, Any]) -> None:
        super().__init__()
        self._library = library
        self._model = library.model
        self._lowercase = definition["normalizer"]["lowercase"]
        self._added = [token["content"] for token in definition["added_tokens"]]

    def __missing__(self, word: str) -> bytes:
        ids = self._compute(word)
        if len(word) <= LONGEST:
            if len(self) >= CAPACITY:
                self.clear()
            self[word] = ids
        return ids

    def _compute(self, word: str) -> bytes:
        if not self._is_plain(word):
            [encoding] = self._library.encode_batch_fast([word], add_special_tokens=False)
            return pack_ids(encoding.ids)
        pieces = _PIECE.findall(word)
        if len(pieces) > 1:
            return b"".join(map(self.__getitem__, pieces))
        tokens = self._model.tokenize(word.lower() if self._lowercase else word)
        return pack_ids([token.id for token in tokens])

    def _is_plain(self, word: str) -> bool:
        """To such a word the normaliser does nothing but lowercase it, and then all that is neither
        letter nor digit stands alone."""
        if not (word.isascii() and word.isprintable()):
            return False
        return not any(map(word.__contains__, self._added))


def _is_bert(definition: dict[str, Any]) -> bool:
    return (
        _type(definition["normalizer"]) == "BertNormalizer"
        and _type(definition["pre_tokenizer"]) == "BertPreTokenizer"
        and _type(definition["model"]) == "WordPiece"
        and _frames_only(definition["post_processor"])
        and all(map(_is_plain_token, definition["added_tokens"]))
    )


def _type(part: dict[str, Any] | None) -> str | None:
    return None if part is None else part["type"]


def _frames_only(post_processor: dict[str, Any] | None) -> bool:
    """Whether it only puts the same tokens before and after every text."""
    if _type(post_processor) != "TemplateProcessing":
        return _type(post_processor) in (None, "BertProcessing")
    assert post_processor is not None
    texts = [part["Sequence"]["id"] for part in post_processor["single"] if "Sequence" in part]
    return texts == ["A"]


def _is_plain_token(token: dict[str, Any]) -> bool:
    """Whether the library finds it by its characters alone, none of which is whitespace."""
    ruled = any(token[rule] for rule in ("single_word", "lstrip", "rstrip", "normalized"))
    return not ruled and token["content"].split() == [token["content"]]
