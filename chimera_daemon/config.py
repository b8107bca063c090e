"""The one configuration: a frozen Struct read from TOML. A default exists here and nowhere else.

Reads no environment variable and has no effect at import. Unknown keys are refused and the nearest
valid key is named.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct

from chimera_daemon.messages import Id, Probability, Seconds

Positive = Annotated[int, Meta(ge=1, le=1 << 40)]
PositiveSeconds = Annotated[float, Meta(gt=0.0, le=1e9)]

_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]\s/]+):(?P<port>\d{1,5})")
_ANY_HOST = ("*", "0.0.0.0", "[::]")


class ConfigError(ValueError):
    """The configuration cannot be used; the message says where and what to write instead."""


class PaperConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of the `paper` policy (Algorithm 1). The paper does not state their values."""

    tau: Annotated[float, Meta(ge=0.0, le=1e6)] = (
        0.5  # load slack relative to the least loaded model
    )
    delta_s: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.05  # confidence gain that justifies a model
    starvation_rounds: Positive = 200  # S: rounds passed over until the level drops by one
    service_rounds: Positive = 200  # Q: rounds in service until the level goes back up


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a model beforehand: the start of its running averages."""

    name: Id
    confidence: Probability = 0.5  # success rate to assume before outcomes are seen
    output_tokens: Annotated[float, Meta(gt=0.0, le=1e6)] = 128.0  # per stage, likewise


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One engine host that the daemon starts and watches."""

    name: Id
    model: Id  # the model's name as clients see it
    kind: Literal["vllm", "openai", "echo"] = "vllm"
    # Checkpoint: folder (relative to the TOML file) or Hugging Face id; of `openai` the base URL,
    # such as http://host:8000/v1.
    path: str | None = None
    max_inflight: Positive | None = None  # None: what the engine itself can run at once
    cpus: tuple[Annotated[int, Meta(ge=0)], ...] = ()  # pin the host to these cores
    # Passed to the engine (vLLM: options of its server; openai: RemoteOptions; echo: EchoOptions).
    args: dict[str, Any] = {}
    logprobs: bool = True  # tell a learned predictor how sure the model was; costs some speed


class PredictorConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Learned predictions, and what is written down to learn from."""

    bundle: str | None = None  # folder (relative to the TOML file); None: the prior alone
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None  # of torch; None: its own choice
    deadline_s: PositiveSeconds = 0.05  # a stage without a prediction by then takes the prior's
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 32  # stages predicted at once
    max_waiting: Positive = 1024  # stages that wait for a prediction; beyond that the prior's
    # Folder for traces of ended workflows, which hold (cut) prompts; None: nothing is written.
    record: str | None = None


class GatewayConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The OpenAI-compatible HTTP front door that `chimera up` starts."""

    listen: str = "127.0.0.1:5700"  # HOST:PORT
    processes: Annotated[int, Meta(ge=0, le=256)] = 1  # on one port; 0: no gateway
    max_connections: Positive = 4096  # per process
    # A client that does not read its stream is cut when so much waits for it, or for so long.
    max_unread_bytes: Positive = 1 << 20
    slow_reader_s: PositiveSeconds = 30.0
    body_timeout_s: PositiveSeconds = 30.0  # for a request to arrive
    keep_alive_s: PositiveSeconds = 75.0  # between requests of a connection
    drain_s: Seconds = 30.0  # after SIGTERM, for requests under way


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the daemon can be told. Times in seconds, sizes in bytes."""

    front: str = "tcp://127.0.0.1:5570"  # clients connect here
    back: str = "tcp://127.0.0.1:5571"  # engine hosts connect here
    # Processes that share the engines, each with two ports of its own, 2 further on; a workflow
    # belongs to one of them.
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    policy: str = "chimera"
    # The dial of `chimera`: the success probability worth one idle workflow latency.
    price: Annotated[float, Meta(ge=0.0, le=1000.0)] = 0.1
    # Seconds within which `chimera` is to end 95 % of workflows: it then learns the price, which
    # begins with the one above. 0: that one stays.
    p95_target_s: Seconds = 0.0
    aging_tokens_per_s: Annotated[float, Meta(gt=0.0, le=1e6)] = 10.0  # bounds starvation
    paper: PaperConfig = PaperConfig()
    predictor: PredictorConfig = PredictorConfig()
    # Bounds: over one of them a request is rejected with a reason.
    max_queued_stages: Positive = 20_000
    max_queued_bytes: Positive = 256 << 20
    max_payload_bytes: Positive = 4 << 20
    max_workflows: Positive = 100_000
    max_engines: Positive = 256
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    workflow_idle_s: PositiveSeconds = 3600.0  # then it is ended without an outcome
    no_engine_s: PositiveSeconds = 120.0  # a stage waits this long for a model without engines
    reply_keep_s: PositiveSeconds = 60.0  # answers kept for repeated requests
    reply_keep: Positive = 20_000  # and no more of them than this
    reply_keep_bytes: Positive = 64 << 20
    # Connections.
    heartbeat_s: PositiveSeconds = 0.5
    engine_timeout_s: PositiveSeconds = 5.0  # silent for so long: lost
    client_timeout_s: PositiveSeconds = 30.0  # silent for so long: its work is cancelled
    drain_s: Seconds = 30.0  # after SIGTERM, for running stages to end
    send_hwm: Positive = 4096  # messages queued towards one peer
    # Supervision of the engine hosts below.
    ready_s: PositiveSeconds = 300.0  # an engine that is not ready by then is restarted
    max_restarts: Annotated[int, Meta(ge=0)] = 5  # in a row without becoming ready; then give up
    log_dir: str | None = None  # logs of engine hosts; None: beside the daemon's own output
    engines: tuple[EngineConfig, ...] = ()
    models: tuple[ModelConfig, ...] = ()
    gateway: GatewayConfig = GatewayConfig()

    def model(self, name: str) -> ModelConfig:
        """What is configured for this model, or the defaults."""
        return next((m for m in self.models if m.name == name), ModelConfig(name=name))


def load(path: str | Path) -> Config:
    """Read a TOML file. Relative paths of checkpoints and predictor are taken from its folder.

    Raises `ConfigError`, naming file, key and what to write instead.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return _resolve(parse(text), path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(text: str) -> Config:
    """Turn TOML text into a validated `Config`; raises `ConfigError`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    _refuse_unknown_keys(table, Config, "")
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error
    check(config)
    return config


def _refuse_unknown_keys(table: dict[str, Any], struct: type[Struct], where: str) -> None:
    known = struct.__struct_fields__
    nested = _NESTED.get(struct, {})
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key `{where}{key}`; did you mean `{where}{near}`?")
        if key in nested:
            items = cast("list[Any]", value if isinstance(value, list) else [value])
            for item in items:
                if isinstance(item, dict):
                    inner = cast("dict[str, Any]", item)
                    _refuse_unknown_keys(inner, nested[key], f"{where}{key}.")


_NESTED: dict[type[Struct], dict[str, type[Struct]]] = {
    Config: {
        "paper": PaperConfig,
        "predictor": PredictorConfig,
        "gateway": GatewayConfig,
        "engines": EngineConfig,
        "models": ModelConfig,
    },
}


def check(config: Config) -> None:
    """Raise `ConfigError` where fields do not fit together."""
    for what, names in (
        ("engines", [e.name for e in config.engines]),
        ("models", [m.name for m in config.models]),
    ):
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ConfigError(f"`{what}`: the name `{min(twice)}` is used twice")
    for engine in config.engines:
        if engine.kind == "vllm" and engine.path is None:
            raise ConfigError(f"engine `{engine.name}`: `path` is missing (folder or model id)")
        if engine.kind == "openai" and not (engine.path or "").startswith(("http://", "https://")):
            raise ConfigError(
                f"engine `{engine.name}`: `path` must be the base URL, such as http://host:8000/v1"
            )
    _check_listen(config)
    if config.max_payload_bytes > config.max_queued_bytes:
        raise ConfigError("`max_payload_bytes` must not be larger than `max_queued_bytes`")
    if config.engine_timeout_s < 2 * config.heartbeat_s:
        raise ConfigError("`engine_timeout_s` must be at least twice `heartbeat_s`")
    if config.client_timeout_s < 2 * config.heartbeat_s:
        raise ConfigError("`client_timeout_s` must be at least twice `heartbeat_s`")


def listen_address(listen: str) -> tuple[str, int]:
    """Host (of IPv6 without brackets) and port of `[gateway] listen`; raises `ConfigError`."""
    match = _HOST_AND_PORT.fullmatch(listen)
    if match is None or match["host"] == "*" or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"`gateway.listen` {listen!r}: write HOST:PORT, such as 127.0.0.1:5700 (0.0.0.0:5700 "
            "for all addresses of this machine)"
        )
    return match["host"].strip("[]"), int(match["port"])


def _check_listen(config: Config) -> None:
    """Refuse ports that two would listen on, and those that there are not."""
    listen_address(config.gateway.listen)
    taken: dict[int, tuple[str, str]] = {}
    for what, host, port in _listeners(config):
        if port > 65535:
            raise ConfigError(
                f"{what} would listen on port {port}, above 65535: each worker's ports are 2 "
                "further on; write fewer `workers`, or lower ports"
            )
        other, other_host = taken.get(port, ("", ""))
        if other and (host == other_host or {host, other_host}.intersection(_ANY_HOST)):
            raise ConfigError(
                f"{what} and {other} would both listen on port {port}; write another port for "
                "one of them (each worker's are 2 further on)"
            )
        taken[port] = what, host


def _listeners(config: Config) -> Iterator[tuple[str, str, int]]:
    """Who would listen at which host and TCP port; addresses of a wrong form are left out."""
    for key in ("front", "back"):
        address: str = getattr(config, key)
        match = _HOST_AND_PORT.fullmatch(address.removeprefix("tcp://"))
        if address.startswith("tcp://") and match is not None and int(match["port"]) < 65536:
            for worker in range(config.workers):
                of = f"`{key}` of worker {worker}" if worker else f"`{key}`"
                yield of, match["host"], int(match["port"]) + 2 * worker
    if config.gateway.processes:
        match = _HOST_AND_PORT.fullmatch(config.gateway.listen)
        if match is not None:
            yield "`gateway.listen`", match["host"], int(match["port"])


def _resolve(config: Config, folder: Path) -> Config:
    """Make paths absolute; a checkpoint that looks like a folder must exist."""
    engines: list[EngineConfig] = []
    for engine in config.engines:
        path = engine.path
        if path is not None and engine.kind != "openai":
            local = (folder / Path(path).expanduser()).resolve()
            if local.exists():
                path = str(local)
            elif path.startswith((".", "/", "~")):
                raise ConfigError(f"engine `{engine.name}`: no such folder: {local}")
        engines.append(msgspec.structs.replace(engine, path=path))
    predictor = config.predictor
    for key in ("bundle", "record"):
        path = getattr(predictor, key)
        if path is not None:
            local = (folder / Path(path).expanduser()).resolve()
            predictor = msgspec.structs.replace(predictor, **{key: str(local)})
    return msgspec.structs.replace(config, engines=tuple(engines), predictor=predictor)
