"""Which workflow and stage a request belongs to, from what agent frameworks already send.

Owns the order in which ids are looked for, their form on the wire, and the count of stages. An id
goes back to its sender in a header, so nothing unprintable may leave this file.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

WORKFLOW_HEADER = "x-chimera-workflow-id"
# Ours first, then what others use: sticky-session routers and Dynamo.
_LATER_HEADERS = ("x-session-id", "x-session-token", "x-dynamo-session-id")
_NAMES = ("workflow_id", "session_id", "program_id", "trajectory_id")  # inside of sections
_MAX_WORKFLOWS = 32_768

_PLAIN = re.compile(r"[\x21-\x7e]{1,128}")  # what goes over the wire as it is,
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,1024}")  # and into a header


class Identity(Struct, frozen=True, gc=False):
    """``workflow_id`` as the daemon gets it; ``echo`` is the same in the client's own words."""

    workflow_id: str
    echo: str


class Sections(Struct, frozen=True, gc=False):
    """The parts of a body that may hold an id, whatever is in them."""

    program_id: Any = None
    agent_hint: Any = None
    nvext: Any = None
    vllm_xargs: Any = None


_NO_SECTIONS = Sections()


def is_printable(text: str) -> bool:
    """Whether the text may stand in a header: ASCII without control characters, and not long."""
    return _PRINTABLE.fullmatch(text) is not None and text.strip() == text


def identity_of(raw: str) -> Identity:
    """An id in its form on the wire: as it is, or its digest if it is long or has odd characters.

    The same id always gives the same form.
    """
    if _PLAIN.fullmatch(raw):
        return Identity(raw, raw)
    digest = hashlib.sha256(raw.encode("utf-8", "surrogatepass")).hexdigest()[:40]
    workflow_id = f"sha256-{digest}"
    return Identity(workflow_id, raw if is_printable(raw) else workflow_id)


def find_identity(
    headers: Mapping[str, str], own: str | None, sections: Sections
) -> Identity | None:
    """The first id there is; ``own`` is the one in the ``chimera`` section of the body."""
    raw = headers.get(WORKFLOW_HEADER) or own or _in_headers(headers) or _in_body(sections)
    return identity_of(raw) if raw else None


def _in_headers(headers: Mapping[str, str]) -> str | None:
    for name in _LATER_HEADERS:
        raw = headers.get(name)
        if raw:
            return raw
    return None


def _in_body(sections: Sections) -> str | None:
    if sections == _NO_SECTIONS:
        return None
    return (
        _text(sections.program_id)
        or _named(sections.agent_hint)
        or _named(_member(sections.nvext, "agent_hints"))
        or _named(_member(sections.vllm_xargs, "agentic_context"))
    )


def _member(section: Any, name: str) -> Any:
    return section.get(name) if isinstance(section, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def _named(section: Any) -> str | None:
    """The id inside a section, which vLLM's arguments may hold as JSON in a string."""
    if isinstance(section, str) and section.startswith("{"):
        try:
            section = msgspec.json.decode(section)
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            return section
    if isinstance(section, str):
        return section or None
    for name in _NAMES:
        text = _text(_member(section, name))
        if text:
            return text
    return None


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None


class StageCounter:
    """Numbers the stages of workflows whose client does not.

    Counts what passes through this process, for the latest workflows. With several gateways, or
    after a restart, a number may come twice; that does no harm, as numbers only tell a predictor
    how far a workflow has come and to which stage a verdict belongs.
    """

    def __init__(self, max_workflows: int = _MAX_WORKFLOWS) -> None:
        self._next: OrderedDict[str, int] = OrderedDict()
        self._max = max_workflows

    def __len__(self) -> int:
        return len(self._next)

    def take(self, workflow_id: str, stage: int | None = None) -> int:
        """The number of the workflow's next stage; ``stage`` if the client numbers them itself."""
        known = self._next.pop(workflow_id, 0)
        number = known if stage is None else stage
        self._next[workflow_id] = min(max(known, number + 1), 100_000)
        if len(self._next) > self._max:
            self._next.popitem(last=False)
        return number

    def forget(self, workflow_id: str) -> None:
        """The workflow has ended."""
        self._next.pop(workflow_id, None)
