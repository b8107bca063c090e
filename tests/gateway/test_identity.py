"""Where workflow ids are looked for, their form, and the count of stages."""

from typing import Any

import pytest
from multidict import CIMultiDict

from chimera_daemon.gateway.identity import (
    Sections,
    StageCounter,
    find_identity,
    identity_of,
    is_printable,
)

EVERYWHERE: dict[str, Any] = {
    "program_id": "in-program",
    "agent_hint": {"session_id": "in-hint"},
    "nvext": {"agent_hints": {"program_id": "in-nvext"}},
    "vllm_xargs": {"agentic_context": '{"session_id": "in-xargs"}'},
}
HEADERS = ["x-chimera-workflow-id", "x-session-id", "x-session-token", "x-dynamo-session-id"]


def test_the_first_id_counts() -> None:
    """Every place is taken away in turn, the first one first."""
    headers = CIMultiDict({name.title(): f"in-{name}" for name in HEADERS})
    sections = dict(EVERYWHERE)
    own: str | None = "in-extension"
    found: list[str] = []

    def look() -> None:
        identity = find_identity(headers, own, Sections(**sections))
        assert identity is not None
        found.append(identity.workflow_id)

    look()
    del headers["x-chimera-workflow-id"]
    look()
    own = None
    for name in HEADERS[1:]:
        look()
        del headers[name]
    for name in list(sections):
        look()
        del sections[name]
    assert found == [
        *["in-x-chimera-workflow-id", "in-extension", "in-x-session-id", "in-x-session-token"],
        *["in-x-dynamo-session-id", "in-program", "in-hint", "in-nvext", "in-xargs"],
    ]
    assert find_identity(headers, own, Sections(**sections)) is None


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"program_id": 17}, "17"),
        ({"program_id": True}, None),
        ({"program_id": ""}, None),
        ({"program_id": ["a"]}, None),
        ({"agent_hint": "plain"}, "plain"),
        ({"agent_hint": {"session_id": ""}}, None),
        ({"agent_hint": ["session_id"]}, None),
        ({"nvext": "agent_hints"}, None),
        ({"nvext": {"agent_hints": {"priority": 5}}}, None),
        ({"nvext": {"agent_hints": {"session_id": "s", "program_id": "p"}}}, "s"),
        ({"vllm_xargs": {"agentic_context": {"workflow_id": "w"}}}, "w"),
        ({"vllm_xargs": {"agentic_context": '{"program_id": 4}'}}, "4"),
        ({"vllm_xargs": {"agentic_context": "{broken"}}, "{broken"),
        ({"vllm_xargs": {"agentic_context": '{"n": ' + "[" * 5000}}, "a digest"),
        ({"vllm_xargs": None}, None),
    ],
)
def test_whatever_is_in_a_section_does_no_harm(
    section: dict[str, Any], expected: str | None
) -> None:
    identity = find_identity({}, None, Sections(**section))
    if expected == "a digest":
        assert identity is not None
        assert identity.workflow_id.startswith("sha256-")
    else:
        assert (identity and identity.workflow_id) == expected


@pytest.mark.parametrize("raw", ["w", "a/b:c@d", "x" * 128, "{}\"'`<>"])
def test_a_plain_id_is_kept(raw: str) -> None:
    assert identity_of(raw) == (identity := identity_of(raw))
    assert (identity.workflow_id, identity.echo) == (raw, raw)


@pytest.mark.parametrize("raw", ["x" * 129, "two words", "a" * 1024])
def test_a_long_or_odd_id_is_digested_and_given_back_as_it_came(raw: str) -> None:
    identity = identity_of(raw)
    assert identity.workflow_id.startswith("sha256-")
    assert len(identity.workflow_id) < 128
    assert identity.echo == raw
    assert identity == identity_of(raw)
    assert identity.workflow_id != identity_of(raw + "!").workflow_id


@pytest.mark.parametrize(
    "raw", ["a\r\nset-cookie: b", "a\0", "ü", "\ud800", " a", "a\t", "x" * 1025, "\x7f"]
)
def test_what_cannot_stand_in_a_header_is_not_given_back(raw: str) -> None:
    identity = identity_of(raw)
    assert identity.echo == identity.workflow_id
    assert is_printable(identity.echo)


def test_stages_are_counted_per_workflow() -> None:
    counter = StageCounter(max_workflows=2)
    assert [counter.take("a"), counter.take("a"), counter.take("b"), counter.take("a")] == [
        *(0, 1, 0, 2)
    ]
    assert counter.take("a", 10) == 10
    assert counter.take("a", 4) == 4  # a repeated stage does not turn the count back
    assert counter.take("a") == 11
    counter.take("c")  # pushes out `b`, which is the oldest
    assert len(counter) == 2
    assert counter.take("b") == 0
    counter.forget("b")
    counter.forget("b")
    assert counter.take("b") == 0
    assert counter.take("z", 100_000) == 100_000
    assert counter.take("z") == 100_000
