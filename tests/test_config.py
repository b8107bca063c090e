"""The configuration file: what is refused, and that the message says what to write instead."""

from pathlib import Path

import msgspec
import pytest

from chimera_daemon.config import (
    Config,
    ConfigError,
    EngineConfig,
    ModelConfig,
    PredictorConfig,
    listen_address,
    load,
    parse,
)

ENGINE = '[[engines]]\nname = "e"\nmodel = "m"\n'


def test_an_empty_file_gives_the_defaults() -> None:
    assert parse("") == Config()


def test_values_are_read_into_frozen_structs() -> None:
    config = parse(
        'policy = "paper"\nprice = 1\n[paper]\ntau = 0.25\n'
        '[[engines]]\nname = "e"\nmodel = "m"\nkind = "echo"\ncpus = [0, 1]\nargs = {x = 1}\n'
        '[[models]]\nname = "m"\nconfidence = 0.75\n'
    )
    assert (config.policy, config.price, config.paper.tau) == ("paper", 1.0, 0.25)
    assert config.paper.delta_s == Config().paper.delta_s
    assert config.engines == (EngineConfig("e", "m", "echo", cpus=(0, 1), args={"x": 1}),)
    assert config.model("m").confidence == 0.75
    assert config.model("other") == ModelConfig("other")
    with pytest.raises(AttributeError):
        config.price = 2.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("pirce = 1", "pirce", "price"),
        ("max_attempt = 1", "max_attempt", "max_attempts"),
        ("[paper]\nTau = 1", "paper.Tau", "paper.tau"),
        (ENGINE + 'max_in_flight = 3\nkind = "echo"', "engines.max_in_flight", "engines.max_in"),
        ('[[models]]\nname = "m"\nconfidense = 1', "models.confidense", "models.confidence"),
        ("[Paper]", "Paper", "paper"),
        ("[predictor]\nbundel = 'b'", "predictor.bundel", "predictor.bundle"),
        ("[gateway]\nlisten_on = 'b'", "gateway.listen_on", "gateway.listen"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(
    text: str, unknown: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert f"unknown key `{unknown}`" in str(error.value)
    assert f"did you mean `{nearest}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('price = "cheap"', "price"),
        ("price = -0.1", "price"),
        ("p95_target_s = -1", "p95_target_s"),
        ("p95_target_s = nan", "p95_target_s"),
        ("p95_target_s = '30 s'", "p95_target_s"),
        ("price = nan", "price"),
        ("price = inf", "price"),
        ("front = 5570", "front"),
        ("max_attempts = 0", "max_attempts"),
        ("max_attempts = 101", "max_attempts"),
        ("max_attempts = 1.5", "max_attempts"),
        ("max_attempts = true", "max_attempts"),
        ("max_queued_stages = 0", "max_queued_stages"),
        ("heartbeat_s = 0", "heartbeat_s"),
        ("heartbeat_s = inf", "heartbeat_s"),
        ("drain_s = -1", "drain_s"),
        ("aging_tokens_per_s = 0", "aging_tokens_per_s"),
        ("paper = 3", "paper"),
        ("[paper]\ndelta_s = 1.5", "paper.delta_s"),
        ("[paper]\nstarvation_rounds = 0", "paper.starvation_rounds"),
        ("predictor = 'b'", "predictor"),
        ("[predictor]\nbundle = 3", "predictor.bundle"),
        ("[predictor]\ndevice = 'tpu'", "predictor.device"),
        ("[predictor]\ndeadline_s = 0", "predictor.deadline_s"),
        ("[predictor]\nmax_batch = 0", "predictor.max_batch"),
        ("[predictor]\nmax_waiting = 0", "predictor.max_waiting"),
        ("[predictor]\nthreads = 0", "predictor.threads"),
        ("workers = 0", "workers"),
        ("workers = 65", "workers"),
        ("gateway = 5700", "gateway"),
        ("[gateway]\nlisten = 5700", "gateway.listen"),
        ("[gateway]\nprocesses = -1", "gateway.processes"),
        ("[gateway]\nprocesses = 257", "gateway.processes"),
        ("[gateway]\nslow_reader_s = 0", "gateway.slow_reader_s"),
        ("engines = 3", "engines"),
        (ENGINE + 'kind = "echo"\nlogprobs = 1', "logprobs"),
        ("engines = [3]", "engines"),
        ("[engines]\nname = 'e'", "engines"),
        ('[[engines]]\nname = "e"', "engines"),
        ('[[engines]]\nname = ""\nmodel = "m"', "name"),
        (f'[[engines]]\nname = "{"e" * 129}"\nmodel = "m"', "name"),
        (ENGINE + 'kind = "magic"', "kind"),
        (ENGINE + "cpus = [-1]", "cpus"),
        ('[[models]]\nname = "m"\nconfidence = 1.01', "confidence"),
        ('[[models]]\nname = "m"\noutput_tokens = 0', "output_tokens"),
    ],
)
def test_a_wrong_type_or_a_value_out_of_range_is_refused_by_key(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert key in str(error.value)


@pytest.mark.parametrize("text", ["price =", "price = 1\nprice = 2", "[", "\0"])
def test_what_is_not_toml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse(text)


def test_names_are_used_once() -> None:
    with pytest.raises(ConfigError, match="`engines`: the name `e` is used twice"):
        parse((ENGINE + 'kind = "echo"\n') * 2)
    with pytest.raises(ConfigError, match="`models`: the name `m` is used twice"):
        parse('[[models]]\nname = "m"\n' * 2)


def test_a_vllm_engine_needs_a_path_and_an_echo_engine_none() -> None:
    with pytest.raises(ConfigError, match="engine `e`: `path` is missing"):
        parse(ENGINE)
    assert parse(ENGINE + 'kind = "echo"').engines[0].path is None


@pytest.mark.parametrize("path", ["", "path = '127.0.0.1:8000'", "path = 'ftp://host/v1'"])
def test_an_engine_elsewhere_needs_a_url(path: str) -> None:
    with pytest.raises(ConfigError, match="engine `e`: `path` must be the base URL, such as http"):
        parse(f'{ENGINE}kind = "openai"\n{path}')
    url = "http://127.0.0.1:8000/v1"
    assert parse(f'{ENGINE}kind = "openai"\npath = "{url}"').engines[0].path == url


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:5700", "127.0.0.1", 5700),
        ("0.0.0.0:1", "0.0.0.0", 1),
        ("localhost:65535", "localhost", 65535),
        ("[::1]:80", "::1", 80),
    ],
)
def test_where_the_gateway_listens(listen: str, host: str, port: int) -> None:
    assert listen_address(listen) == (host, port)
    assert parse(f'[gateway]\nlisten = "{listen}"').gateway.listen == listen


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "5700",
        ":5700",
        "*:5700",
        "host:",
        "host:0",
        "host:65536",
        "h:1:2",
        "::1:80",
        "http://h:1",
    ],
)
def test_where_no_gateway_can_listen(listen: str) -> None:
    with pytest.raises(ConfigError, match="`gateway.listen` .*: write HOST:PORT, such as"):
        parse(f'[gateway]\nlisten = "{listen}"')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Each worker's ports are 2 further on.
        ("workers = 2\nback = 'tcp://127.0.0.1:5572'", "`back` and `front` of worker 1 .* 5572"),
        ("workers = 9\nfront = 'tcp://*:6000'\nback = 'tcp://10.0.0.1:6016'", "port 6016"),
        ("workers = 2\nback = 'tcp://127.0.0.1:65534'", "`back` of worker 1 .* above 65535"),
        ("[gateway]\nlisten = '127.0.0.1:5571'", "`gateway.listen` and `back` .* 5571"),
        ("[gateway]\nlisten = '0.0.0.0:5570'", "`gateway.listen` and `front` .* 5570"),
        (
            "workers = 6\n[gateway]\nlisten = '127.0.0.1:5580'",
            "`gateway.listen` and `front` of worker 5 .* 5580; write another port",
        ),
        ("front = 'tcp://127.0.0.1:7'\nback = 'tcp://127.0.0.1:7'", "`back` and `front` .* port 7"),
    ],
)
def test_no_two_listen_on_one_port(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "workers = 64",  # the defaults leave room for all
        "workers = 64\n[gateway]\nprocesses = 0",
        "workers = 2\nfront = 'tcp://127.0.0.1:6000'\nback = 'tcp://127.0.0.1:6004'",
        "workers = 2\nfront = 'tcp://10.0.0.1:6000'\nback = 'tcp://10.0.0.2:6002'",
        "workers = 64\nfront = 'ipc:///f'\nback = 'ipc:///b'",
        "[gateway]\nlisten = '127.0.0.1:5571'\nprocesses = 0",
    ],
)
def test_ports_that_do_not_meet(text: str) -> None:
    parse(text)


@pytest.mark.parametrize("key", ["engine_timeout_s", "client_timeout_s"])
def test_a_timeout_is_at_least_two_heartbeats(key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` must be at least twice `heartbeat_s`"):
        parse(f"heartbeat_s = 2.0\n{key} = 3.9")
    parse(f"heartbeat_s = 2.0\n{key} = 4.0")


# Files.


def write(folder: Path, text: str) -> Path:
    """A configuration file in this folder."""
    path = folder / "chimera.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_are_taken_from_the_file_and_made_absolute(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "m").mkdir(parents=True)
    for path in ("checkpoints/m", "./checkpoints/m", str(tmp_path / "checkpoints" / "m")):
        config = load(write(tmp_path, f'{ENGINE}path = "{path}"'))
        assert config.engines[0].path == str((tmp_path / "checkpoints" / "m").resolve())


def test_paths_of_the_predictor_are_taken_from_the_file_too(tmp_path: Path) -> None:
    config = load(write(tmp_path, '[predictor]\nbundle = "b"\nrecord = "../traces"'))
    assert config.predictor.bundle == str(tmp_path.resolve() / "b")
    assert config.predictor.record == str(tmp_path.resolve().parent / "traces")
    assert load(write(tmp_path, "")).predictor == PredictorConfig()


def test_what_is_no_folder_is_left_as_an_id_of_hugging_face(tmp_path: Path) -> None:
    config = load(write(tmp_path, ENGINE + 'path = "Qwen/Qwen2.5-1.5B-Instruct"'))
    assert config.engines[0].path == "Qwen/Qwen2.5-1.5B-Instruct"


@pytest.mark.parametrize("path", ["./missing", "../missing", "/missing/folder", "~/missing-folder"])
def test_what_looks_like_a_folder_must_exist(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="engine `e`: no such folder: /.*missing"):
        load(write(tmp_path, f'{ENGINE}path = "{path}"'))


def test_errors_name_the_file(tmp_path: Path) -> None:
    for bad in (tmp_path / "none.toml", tmp_path, write(tmp_path, "pirce = 1")):
        with pytest.raises(ConfigError) as error:
            load(bad)
        assert str(error.value).startswith(f"{bad}: ")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"policy = '\xe9'")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(latin)


def test_every_default_is_a_legal_value() -> None:
    assert msgspec.convert(msgspec.to_builtins(Config()), Config) == Config()
