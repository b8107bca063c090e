"""Token ids of texts: special ones, head and tail, what is refused."""

import pytest

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer as LibraryTokenizer  # noqa: E402
from tokenizers import models, pre_tokenizers, processors  # noqa: E402

from chimera_predictors.tokenizer import BYTES_PER_TOKEN, Tokenizer  # noqa: E402

CLS, SEP, UNKNOWN = 0, 1, 2


def definition(framed=True):
    """A tokenizer.json that knows the words w3, w4, ... w999 by their numbers."""
    words = {f"w{i}": i for i in range(3, 1000)}
    model = models.WordLevel({"[CLS]": CLS, "[SEP]": SEP, "[UNK]": UNKNOWN} | words, "[UNK]")
    tokenizer = LibraryTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    tokenizer.enable_truncation(5)  # as checkpoints have it; ours must win
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str()


def words(*numbers):
    return " ".join(f"w{i}" for i in numbers)


def test_tokens_keep_head_and_tail_between_the_special_ones():
    tokenizer = Tokenizer(definition(), max_tokens=7)
    packed = tokenizer.encode([words(*range(3, 40)), words(3, 4), words(*range(3, 8)), "", "?"])
    texts = [ids.tolist() for ids in _split(packed)]
    assert texts == [
        [CLS, 3, 4, 5, 38, 39, SEP],
        [CLS, 3, 4, SEP],
        [CLS, 3, 4, 5, 6, 7, SEP],
        [CLS, SEP],
        [CLS, UNKNOWN, SEP],
    ]
    assert packed.ids.dtype == packed.lengths.dtype == "int32"


def test_a_tokenizer_without_special_tokens():
    tokenizer = Tokenizer(definition(framed=False), max_tokens=4)
    packed = tokenizer.encode([words(*range(3, 40)), ""])
    assert [ids.tolist() for ids in _split(packed)] == [[3, 4, 38, 39], [0]]


def test_no_texts_give_no_tokens():
    packed = Tokenizer(definition(), max_tokens=4).encode([])
    assert len(packed.ids) == len(packed.lengths) == 0


def test_a_text_is_cut_by_bytes_before_it_is_tokenised():
    tokenizer = Tokenizer(definition(), max_tokens=6)
    assert tokenizer.max_bytes == 6 * BYTES_PER_TOKEN
    packed = tokenizer.encode([words(3, 4) + " x" * 5_000_000 + " \udcff " + words(5, 6)])
    assert packed.ids.tolist() == [CLS, 3, 4, 5, 6, SEP]


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        Tokenizer("{}", max_tokens=8)
    with pytest.raises(ValueError, match="max_tokens is 2; with 2 special tokens"):
        Tokenizer(definition(), max_tokens=2)


def _split(packed):
    ends = packed.lengths.cumsum()
    return [packed.ids[end - n : end] for n, end in zip(packed.lengths, ends, strict=True)]
