"""Everything that a client can get wrong: the status, the error's form, and nothing left behind."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import run
from tests.gateway.harness import CHAT, JSON, Door, chat, request

DEEP = b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
# Body, status, code, param.
BODIES: list[tuple[bytes, int, str, str | None]] = [
    (b"", 400, "bad_request", None),
    (b"{", 400, "bad_request", None),
    (b"nonsense", 400, "bad_request", None),
    (b'{"messages": []} {}', 400, "bad_request", None),
    (b"[]", 400, "bad_request", None),
    (b"null", 400, "bad_request", None),
    (b'{"a": 1, "messages": [}', 400, "bad_request", None),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, "bad_request", None),
    (b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', 400, "bad_request", None),
    (b'{"messages": [{"role": "user", "content": NaN}]}', 400, "bad_request", None),
    (DEEP, 400, "bad_request", None),
    (chat(model=3), 400, "bad_request", "model"),
    (chat(model=["m"]), 400, "bad_request", "model"),
    (chat(stream="yes"), 400, "bad_request", "stream"),
    (chat(max_tokens="many"), 400, "bad_request", "max_tokens"),
    (chat(max_tokens=1.5), 400, "bad_request", "max_tokens"),
    (chat(max_completion_tokens={}), 400, "bad_request", "max_completion_tokens"),
    (chat(n="2"), 400, "bad_request", "n"),
    (chat(max_tokens=0), 400, "bad_request", None),  # the engine's word
    (chat(max_tokens=-5), 400, "bad_request", None),
    (chat(model="x" * 129), 404, "model_not_found", "model"),
    (chat(model="no\u0000such"), 404, "model_not_found", "model"),
    (chat(chimera=[]), 400, "bad_request", "chimera"),
    (chat(chimera={"workflow": "w"}), 400, "bad_request", "chimera"),
    (chat(chimera={"kind": "k" * 65}), 400, "bad_request", "chimera.kind"),
    (chat(chimera={"stage": -1}), 400, "bad_request", "chimera.stage"),
    (chat(chimera={"stage": 100_001}), 400, "bad_request", "chimera.stage"),
    (chat(chimera={"tries": {"left": -1}}), 400, "bad_request", "chimera.tries.left"),
    (chat(chimera={"hints": {"tokens": 1}}), 400, "bad_request", "chimera.hints"),
    (chat(chimera={"confidence": {"m": 2}}), 400, "bad_request", "chimera.confidence[...]"),
    (chat(chimera={"confidence": {f"m{i}": 1 for i in range(9999)}}), 400, "bad_request", None),
]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_bodies(tmp_path: Path, stream: bool) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            for body, status, code, param in BODIES:
                if stream and body.startswith(b'{"messages": [{"role": "user", "content": "2'):
                    fields = json.loads(body)
                    body = json.dumps({"stream": True} | fields).encode()
                answer = await door.ask(body=body)
                shown = (body[:80], answer)
                assert answer.status == status, shown
                assert answer.error["code"] == code, shown
                assert answer.error["type"] == "invalid_request_error", shown
                assert answer.error["param"] == param, shown
                assert answer.headers["x-should-retry"] == "false", shown
            assert door.gateway.relay.failures == len(BODIES)
            assert (await door.ask(body=chat())).status == 200

    run(test())


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/", 404, "not_found", None),
        ("GET", "/v1", 404, "not_found", None),
        ("POST", "/v1/embeddings", 404, "not_found", None),
        ("GET", "/v1/workflows/w", 404, "not_found", None),
        ("GET", "/v1/models/none", 404, "model_not_found", None),
        ("GET", "/v1/models/", 404, "model_not_found", None),
        ("GET", "/v1/../metrics%00", 404, "not_found", None),
        ("GET", CHAT, 405, "method_not_allowed", "POST, OPTIONS"),
        ("PUT", CHAT, 405, "method_not_allowed", "POST, OPTIONS"),
        ("DELETE", "/v1/models/m", 405, "method_not_allowed", "GET, HEAD, OPTIONS"),
        ("POST", "/health", 405, "method_not_allowed", "GET, HEAD, OPTIONS"),
        ("GET", "/v1/workflows/w/outcome", 405, "method_not_allowed", "POST, OPTIONS"),
        ("OPTIONS", "/nothing", 404, "not_found", None),
    ],
)
def test_paths_and_methods(
    tmp_path: Path, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            answer = await door.ask(path, method=method)
            assert answer.status == status
            assert answer.error["code"] == code
            assert answer.headers.get("allow") == allow

    run(test())


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"x_chimera_stage": "one"}, 400, "x-chimera-stage"),
        ({"x_chimera_stage": "-1"}, 400, "x-chimera-stage"),
        ({"x_chimera_stage": "1_0"}, 400, "x-chimera-stage"),
        ({"x_chimera_stage": "100001"}, 400, "x-chimera-stage"),
        ({"x_chimera_stage": "٣"}, 400, "x-chimera-stage"),
        ({"x_chimera_stage": ""}, 400, "x-chimera-stage"),
        ({"x_chimera_kind": "k" * 65}, 400, "x-chimera-kind"),
        ({"Content_Type": "text/plain"}, 415, None),
        ({"Content_Type": ""}, 415, None),
        ({"Content_Type": "multipart/form-data; boundary=x"}, 415, None),
        ({"Content_Encoding": "x-mine"}, 415, None),
    ],
)
def test_bad_headers(
    tmp_path: Path, headers: dict[str, str], status: int, param: str | None
) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            answer = await door.ask(body=chat(), **headers)
            assert answer.status == status
            assert answer.error["code"] == "bad_request"
            assert answer.error["param"] == param

    run(test())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("outcome", {}, "success"),
        ("outcome", {"success": 1.5}, "success"),
        ("outcome", {"success": -0.1}, "success"),
        ("outcome", {"success": "yes"}, "success"),
        ("outcome", {"success": True, "reason": "x"}, "reason"),
        ("feedback", {"stage": 0}, "verdict"),
        ("feedback", {"verdict": 1}, "stage"),
        ("feedback", {"stage": -1, "verdict": 1}, "stage"),
        ("feedback", {"stage": 0, "verdict": None}, "verdict"),
        ("feedback", {"stage": 0, "verdict": 7}, "verdict"),
    ],
)
def test_bad_outcomes_and_verdicts(
    tmp_path: Path, path: str, body: dict[str, Any], param: str
) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            answer = await door.ask(f"/v1/workflows/w/{path}", json.dumps(body).encode())
            assert answer.status == 400
            assert answer.error["param"] == param
            assert (await door.ask(f"/v1/workflows//{path}", b"{}")).status == 404

    run(test())


def test_a_body_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, daemon={"max_payload_bytes": 2000}) as door:
            fits = chat("x" * 1900)
            assert (await door.ask(body=fits)).status == 200
            line = await door.line()
            line.say(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                "Content-Length: 999999999999\r\n\r\n".encode()
            )
            answer = await line.answer()
            assert answer.status == 413
            assert answer.error["code"] == "too_large"
            assert "2000" in answer.error["message"]
            line.close()

            line = await door.line()
            line.say(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                "Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            for _ in range(3):
                line.say(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            assert (await line.answer()).status == 413
            line.close()

            bomb = gzip.compress(b" " * 1_000_000)
            assert len(bomb) < 2000
            answer = await door.ask(body=bomb, Content_Encoding="gzip")
            assert answer.status == 413
            assert (await door.ask(body=gzip.compress(fits), Content_Encoding="gzip")).status == 200
            assert (await door.ask(body=b"not gzip", Content_Encoding="gzip")).status == 400

    run(test())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nx: a\x00b\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: a\r\n" * 200 + b"\r\n", 431),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nnot hexadecimal\r\n",
            400,
        ),
    ],
)
def test_what_is_not_http_is_refused_and_cut(tmp_path: Path, data: bytes, status: int) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            line = await door.line()
            line.say(data)
            answer = await line.answer()
            assert answer.status == status
            assert answer.error["type"] == "invalid_request_error"
            assert await line.closed() == b""

    run(test())


@pytest.mark.parametrize("name", ["x-chimera-workflow-id", "x-session-id", "x-request-id"])
def test_headers_cannot_be_injected(tmp_path: Path, name: str) -> None:
    """A control character, however it is sent, does not reach the headers of the answer."""

    async def test() -> None:
        async with Door(tmp_path) as door:
            for value in (b"a\x01b", b"a\x7fb", b"\xff\xfe", "ü\u2028".encode()):
                line = await door.line()
                line.say(request(chat(), "Connection: close", "X: 1").replace(
                    b"X: 1", name.encode() + b": " + value))  # fmt: skip
                answer = await line.answer()
                assert answer.status in (200, 400)
                assert "ü" not in answer.headers.get(name, "")
                assert all(v.isascii() and v.isprintable() for v in answer.headers.values())
                line.close()
            for value in ("a\r\nx-evil: 1", "a\nx-evil: 1", "a\0b"):
                body = chat(program_id=value, chimera={"kind": value})
                answer = await door.ask(body=body)
                assert answer.status in (200, 400)
                assert "x-evil" not in answer.headers
                answer = await door.ask(body=chat(program_id=value))
                assert answer.status == 200
                assert "x-evil" not in answer.headers
                assert answer.headers["x-chimera-workflow-id"].startswith("sha256-")

    run(test())


def test_a_closed_workflow_takes_no_more_stages(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            path = "/v1/workflows/two%20words/outcome"
            workflow = {"x_session_id": "two words"}
            assert (await door.ask(body=chat(), **workflow)).status == 200
            closed = await door.ask(path, b'{"success": null}')
            assert (closed.status, closed.json["closed"]) == (200, True)
            for stream in (False, True):
                answer = await door.ask(body=chat(stream=stream), **workflow)
                assert answer.status == 409
                assert answer.error["code"] == "workflow_closed"
                assert answer.headers["x-should-retry"] == "false"
                assert answer.headers["x-chimera-workflow-id"] == "two words"

    run(test())


def test_types_of_content_with_parameters_are_taken(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            answer = await door.ask(body=chat(), Content_Type="Application/JSON; charset=utf-8")
            assert answer.status == 200
            assert JSON == {"Content-Type": "application/json"}

    run(test())
