"""What is kept of a text, and which text of a chat counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_predictors.text import cut, new_text

any_text = st.text(st.characters(codec=None))  # lone surrogates too


@given(any_text, st.integers(1, 40))
def test_a_cut_text_is_small_valid_and_of_the_same_ends(text, max_bytes):
    kept = cut(text, max_bytes)
    size = len(kept.encode())  # would fail on a surrogate
    assert size <= max_bytes
    valid = text.encode(errors="replace").decode()
    if len(valid.encode()) <= max_bytes:
        assert kept == valid
    else:
        assert size > max_bytes - 7  # at most 3 bytes of a character are lost on either side
        pairs = [(kept[:i], kept[i + 1 :]) for i, char in enumerate(kept) if char == "\n"]
        assert any(valid.startswith(head) and valid.endswith(tail) for head, tail in pairs)


@given(any_text, st.integers(1, 40))
def test_cutting_twice_changes_nothing(text, max_bytes):
    assert cut(cut(text, max_bytes), max_bytes) == cut(text, max_bytes)


@given(st.binary(max_size=100), st.integers(1, 40))
def test_bytes_of_any_kind_become_text(data, max_bytes):
    kept = cut(data, max_bytes)
    assert len(kept) <= max_bytes
    if len(data) <= max_bytes:
        assert kept == data.decode(errors="replace")


def test_bytes_that_are_not_utf8_are_replaced():
    assert cut(b"caf\xe9 ok", 100) == "caf\ufffd ok"
    assert cut("a\ud800b", 100) == "a?b"
    assert cut("ab日本語", 6) == "ab\n"  # neither 日 nor 語 fits into its half
    assert cut("ab日本語", 8) == "ab\n語"
    with pytest.raises(ValueError, match="at least 1"):
        cut("abc", 0)


def test_of_a_huge_text_only_the_ends_are_read():
    class Watched(str):
        def encode(self, *args, **kwargs):
            raise AssertionError("the whole text was encoded")

    text = Watched("a" * 10 + "日" * 10_000_000 + "z" * 10)
    assert cut(text, 20) == "aaaaaaaaaa\nzzzzzzzzz"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([("system", "be brief"), ("user", "2+2?")], "2+2?"),
        ([("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d")], "c\nd"),
        ([("user", "a"), ("assistant", "b"), ("developer", "c"), ("user", "d")], "d"),
        ([("user", "a"), ("assistant", "b"), ("user", ""), ("user", "c")], "c"),
        ([("user", "a"), ("assistant", "b")], "b"),
        ([("user", "a"), ("assistant", ""), ("user", "")], "a"),
        ([("system", "only this")], "only this"),
        ([("user", "")], ""),
        ([], ""),
    ],
)
def test_new_text_is_what_the_stage_adds(messages, text):
    assert new_text(messages) == text
