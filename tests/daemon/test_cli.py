"""The command line: clear messages and exit codes, never a traceback."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from chimera_daemon import cli, config, processes
from chimera_daemon.cli import main
from tests.daemon.harness import World, run

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "predictors", "bench"))
LEARNING = ["train", "eval", "traces"]
SIMULATING = ["simulate", "tune", "measure"]
COMMANDS = ["up", "daemon", "gateway", "engine", "status", *LEARNING, "demo", "bench", *SIMULATING]


def chimera(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Run it as a process of its own, to its end."""
    program = f"{prelude}\nimport sys\nfrom chimera_daemon.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PATH},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def engine(*arguments: str) -> config.EngineConfig:
    """What the options of `chimera engine` amount to."""
    return cli._engine_config(cli._parser().parse_args(["engine", *arguments]))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command line that cannot be used."""
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    output = capsys.readouterr()
    assert not output.out
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(f"    {command} " in output for command in COMMANDS)
    assert "    worker " not in output


def test_engine_options() -> None:
    assert engine("--model", "m", "--kind", "echo") == config.EngineConfig("m", "m", "echo")
    full = engine(
        *("--model", "m", "--name", "e", "--path", "org/m", "--max-inflight", "3"),
        *("--cpus", "0,2", "--arg", "a=1", "--arg", "b=[1,2]", "--arg", "c=true"),
        *("--arg", "dtype=bfloat16", "--arg", 'quoted="x=y"', "--arg", "empty=", "--no-logprobs"),
    )
    args = {"a": 1, "b": [1, 2], "c": True, "dtype": "bfloat16", "quoted": "x=y", "empty": ""}
    assert full == config.EngineConfig("e", "m", "vllm", "org/m", 3, (0, 2), args, False)


def test_engine_of_a_remote_server() -> None:
    url = "http://127.0.0.1:8000/v1"
    remote = engine("--kind", "openai", "--url", url, "--model", "m", "--arg", "slots=3")
    assert remote == config.EngineConfig("m", "m", "openai", url, args={"slots": 3})


def test_engine_spec() -> None:
    spec = {"name": "e", "model": "m", "kind": "echo", "args": {"slots": 3}}
    assert engine("--spec", json.dumps(spec)) == config.EngineConfig(
        "e", "m", "echo", args={"slots": 3}
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--model"),
        (["--model", "m"], "--path"),
        (["--model", "m", "--kind", "echo", "--arg", "novalue"], "KEY=VALUE"),
        (["--model", "m", "--kind", "echo", "--max-inflight", "0"], "max_inflight"),
        (["--model", "m", "--kind", "echo", "--max-inflight", "x"], "--max-inflight"),
        (["--model", "m", "--kind", "echo", "--cpus", "first"], "0,1"),
        (["--model", "m", "--kind", "echo", "--cpus=-1"], "cpus"),
        (["--model", "m", "--kind", "tensorflow"], "tensorflow"),
        (["--model", "m", "--kind", "openai"], "--url http://HOST:PORT/v1"),
        (["--model", "m", "--kind", "openai", "--url", "localhost:8000"], "http://host:8000/v1"),
        (["--model", "m", "--kind", "openai", "--url", "http://h/v1", "--path", "p"], "no --path"),
        (["--model", "m", "--url", "http://h/v1"], "--url is for --kind openai"),
        (["--model", "m" * 200, "--kind", "echo"], "length <= 128"),
        (["--model", "m", "--kind", "echo", "--orphan-s", "-1"], "--orphan-s"),
        (["--model", "m", "--kind", "echo", "--connect", "localhost:5571"], "tcp://HOST:PORT"),
        (["--spec", "{no json"], "JSON"),
        (["--spec", "[]"], "engine"),
        (["--spec", '{"name":"e","model":"m","kind":"echo","speed":1}'], "speed"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_engine_options(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "engine", *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", "5700"], "write HOST:PORT, such as 127.0.0.1:5700"),
        (["--connect", "localhost:5570"], "tcp://HOST:PORT"),
        (["--processes", "0"], "1 or more"),
        (["--processes", "two"], "--processes"),
        (["--processes", "1000"], "processes"),
        (["--spec", "{no json"], "JSON"),
        (["--spec", "[]"], "gateway: "),
        (["--spec", '{"listn":"127.0.0.1:5700"}'], "listn"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_gateway_options(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "gateway", *arguments)


def test_gateway_options() -> None:
    spec = json.dumps({"listen": "127.0.0.1:1", "max_connections": 7})
    arguments = ["gateway", "--spec", spec, "--listen", "0.0.0.0:80", "--processes", "2"]
    assert cli._gateway_config(cli._parser().parse_args(arguments)) == config.GatewayConfig(
        "0.0.0.0:80", 2, max_connections=7
    )
    assert cli._gateway_config(cli._parser().parse_args(["gateway"])) == config.GatewayConfig()


def test_gateway_of_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = chimera("gateway", "--listen", listen, "--connect", f"ipc://{tmp_path}/f")
    assert ended.returncode == 3
    assert f"cannot listen on {listen}: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_gateway_without_aiohttp(tmp_path: Path) -> None:
    ended = chimera("gateway", prelude="import sys; sys.modules['aiohttp'] = None")
    assert ended.returncode == 3
    assert "pip install 'chimera-daemon[gateway]'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("index", "spec", "says"),
    [
        ("2", '{"workers": 2}', "there are 2 workers"),
        ("0", '{"workers": 2}', "--index 0"),
        ("1", '{"wrkers": 2}', "worker: "),
        ("1", "{no json", "JSON"),
    ],
)
def test_bad_worker_options(
    index: str, spec: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(processes, "die_with", lambda parent: None)
    arguments = ["--index", index, "--spec", spec, "--parent", str(os.getppid())]
    assert says in refused(capsys, "worker", *arguments)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "max_quued_stages = 1",
            "`max_quued_stages`; did you mean `max_queued_stages`?",
        ),
        ("[paper]\ntao = 1", "unknown key `paper.tao`; did you mean `paper.tau`?"),
        ('[[engines]]\nmodle = "m"', "unknown key `engines.modle`; did you mean `engines.model`?"),
        ("policy = 7", "policy"),
        ("heartbeat_s = -1", "heartbeat_s"),
        ("max_attempts = 0", "max_attempts"),
        ("send_hwm = 1e99", "send_hwm"),
        ("price = nan", "price"),
        ("heartbeat_s = 10", "engine_timeout_s"),
        ('policy = "nonsense"', "there are: chimera, paper"),
        ('[[engines]]\nname = "e"\nmodel = "m"\npath = "./none"', "no such folder"),
        ('[[engines]]\nname = "e"\nmodel = "m"', "path"),
        ('[[engines]]\nname = "e"\nmodel = "m"\nkind = "echo"\n' * 2, "twice"),
        ("this is no toml", "TOML"),
    ],
)
def test_bad_configuration(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    message = refused(capsys, "up", str(path))
    assert says in message
    if "policy =" not in text or "7" in text:
        assert str(path) in message


def test_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in refused(capsys, "up", str(tmp_path / "none.toml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(capsys, "up", str(tmp_path / "binary"))


@pytest.mark.parametrize("command", ["up", "daemon"])
def test_unknown_policy(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.touch()
    message = refused(capsys, command, str(path), "--policy", "nonsense")
    assert "no policy 'nonsense'; there are: chimera, paper" in message


def test_address_in_use(tmp_path: Path) -> None:
    """Of tcp and of ipc: exit code 3 and what to do; whoever has the address is not disturbed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        front = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        ended = chimera("daemon", "--front", front, "--back", f"ipc://{tmp_path}/x")
    assert ended.returncode == 3
    assert f"cannot listen on {front}: Address already in use" in ended.stderr
    assert "`front`" in ended.stderr
    assert "Traceback" not in ended.stderr

    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join()
            back = f"ipc://{tmp_path}/y"
            ended = await _in_thread("daemon", "--front", world.config.front, "--back", back)
            assert ended.returncode == 3
            assert "is in use" in ended.stderr
            ended = await _in_thread("daemon", "--front", back, "--back", world.config.back)
            assert ended.returncode == 3
            await world.serves()

    run(test())


async def _in_thread(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(chimera, *arguments)


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:99999", "tcp://no.such.host:1"])
def test_address_that_cannot_be(tmp_path: Path, address: str) -> None:
    ended = chimera("daemon", "--front", address, "--back", f"ipc://{tmp_path}/b")
    assert ended.returncode == 3
    assert address in ended.stderr
    assert "Traceback" not in ended.stderr


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with World(tmp_path) as world:
            await world.join("e", "m")
            await world.serves()
            for options in ([], ["--json"]):
                arguments = ["status", "--address", world.config.front, *options]
                assert await asyncio.to_thread(main, arguments) == 0

    run(test())
    table, _, snapshot = capsys.readouterr().out.partition('{"daemon_id"')
    assert "policy chimera" in table
    assert "completed 1" in table
    status = json.loads('{"daemon_id"' + snapshot)
    assert status["core"]["engines"][0]["engine"] == "e"


def test_status_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chimera_daemon import client

    before = threading.active_count()
    connect = client.connect_sync
    monkeypatch.setattr(client, "connect_sync", lambda a: connect(a, timeout_s=0.1))
    assert main(["status", "--address", f"ipc://{tmp_path}/none"]) == 1
    message = capsys.readouterr().err
    assert "no Chimera daemon answers" in message
    assert "chimera up" in message
    assert threading.active_count() == before


@pytest.mark.parametrize("arguments", [["--address", "here"], ["--watch", "0"], ["--watch", "x"]])
def test_bad_status_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments[1] in refused(capsys, "status", *arguments)


@pytest.mark.parametrize("command", [["up"], ["demo"], ["bench", "core"], ["bench", "overhead"]])
def test_without_bench(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "chimera_bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "chimera_bench", None)
    assert "pip install 'chimera-daemon[bench]'" in refused(capsys, *command)


@pytest.mark.parametrize("command", LEARNING)
def test_without_predictors(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"chimera_predictors.{command}_cli", None)
    message = refused(capsys, command, "--any", "option")
    assert "pip install 'chimera-daemon[train]'" in message


def test_without_what_learning_needs(tmp_path: Path) -> None:
    """One line, with the extra to install; what the libraries lack is no fault of the project."""
    for missing, arguments in (
        ("numpy", ["traces", "info", str(tmp_path)]),
        ("torch", ["eval", "--traces", str(tmp_path), "--bundle", str(tmp_path)]),
        ("rich", ["eval", "--traces", str(tmp_path), "--folds", "3"]),
    ):
        log = '{"workflow_id": "w", "stages": [{"model": "m"}]}'
        (tmp_path / "a.jsonl").write_text(log)
        ended = chimera(*arguments, prelude=f"import sys; sys.modules[{missing!r}] = None")
        assert ended.returncode == 2
        assert "Traceback" not in ended.stderr
        last = ended.stderr.splitlines()[-1]
        assert last.startswith("chimera: ")
        assert missing in last
        assert last.count("pip install 'chimera-daemon[") == 1


def test_a_fault_of_ours_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(arguments: object) -> int:
        from chimera_predictors.records import no_such_thing  # type: ignore[attr-defined]

        return no_such_thing

    from chimera_predictors import traces_cli

    monkeypatch.setattr(traces_cli, "_info", fault)
    with pytest.raises(ImportError, match="no_such_thing"):
        main(["traces", "info", "x"])


def test_help_is_light() -> None:
    """Of what is heavy or optional, nothing is imported before a command runs."""
    check = "import atexit; atexit.register(lambda: print(sorted(HEAVY & set(sys.modules))))"
    heavy = "{'numpy', 'torch', 'rich', 'matplotlib', 'pyarrow', 'sklearn', 'transformers'}"
    ended = chimera("--help", prelude=f"import sys; HEAVY = {heavy}; {check}")
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "[]"


def test_without_vllm(tmp_path: Path) -> None:
    """The engine host says what to install, and that a restart is of no use (exit code 3)."""
    arguments = ("--model", "m", "--path", "org/model", "--connect", f"ipc://{tmp_path}/b")
    ended = chimera("engine", *arguments, prelude="import sys; sys.modules['vllm'] = None")
    assert ended.returncode == 3
    assert "pip install 'chimera-daemon[vllm]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_bad_echo_options(tmp_path: Path) -> None:
    arguments = ("--model", "m", "--kind", "echo", "--connect", f"ipc://{tmp_path}/b")
    ended = chimera("engine", *arguments, "--arg", "speed=1")
    assert ended.returncode == 3
    assert "speed" in ended.stderr
    assert "step_s" in ended.stderr  # what there is instead
    assert "Traceback" not in ended.stderr
