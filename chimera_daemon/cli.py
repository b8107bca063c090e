"""The command `chimera`: reads arguments, hands over to the part that does the work."""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from chimera_daemon import __version__, config, policy, processes, wire

EXIT_USAGE = 2
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and not arguments.unavailable:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    log_as = arguments.log_as.format_map(vars(arguments))
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format=f"%(asctime)s %(levelname).1s {log_as}%(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        return arguments.run(arguments)
    except config.ConfigError as error:
        print(f"chimera: {error}", file=sys.stderr)
        return EXIT_USAGE
    except ImportError as error:
        if arguments.extra is None or _is_ours(error):
            raise
        print(f"chimera: {_with_advice(error, arguments.extra)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chimera",
        description="Schedules multi-agent LLM workflows over heterogeneous vLLM engines.",
    )
    parser.add_argument("--version", action="version", version=f"chimera {__version__}")
    parser.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="what is written to standard error (default: info)",
    )
    parser.set_defaults(unavailable=False, extra=None, log_as="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    _add_daemon(commands)
    _add_gateway(commands)
    _add_engine(commands)
    _add_worker(commands)
    _add_status(commands)
    _add_learning(commands)
    _add_demo(commands)
    _add_simulate(commands)
    _add_tune(commands)
    _add_measure(commands)
    _add_bench(commands)
    return parser


def _is_ours(error: ImportError) -> bool:
    """Whether a module of the project lacks something: a fault, which no extra heals."""
    package = (error.name or "").partition(".")[0]
    return package.startswith("chimera_") and not isinstance(error, ModuleNotFoundError)


def _with_advice(error: ImportError, extra: str) -> str:
    """The message, which may itself say what to install."""
    if "pip install" in str(error):
        return str(error)
    return f"{error}; this command needs: pip install 'chimera-daemon[{extra}]'"


# One pair of functions per command: what it takes, what it does.


def _add_up(commands: Any) -> None:
    parser = commands.add_parser(
        "up",
        help="start daemon, gateway and engines of a TOML file (without one: the testbed)",
        description="Start the daemon, the OpenAI gateway and all engines of a TOML file and keep "
        "them alive until SIGTERM or Ctrl-C, which drain first. Without a file: the testbed of "
        "tiny models.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; see docs/architecture.md")
    _daemon_options(parser)
    parser.set_defaults(run=_up, engines=True)


def _add_daemon(commands: Any) -> None:
    parser = commands.add_parser(
        "daemon",
        help="start the daemon alone; engines and gateways join by themselves",
        description="Start the daemon alone. Engine hosts and gateways that were started elsewhere "
        "(`chimera engine`, `chimera gateway`) join it.",
    )
    parser.add_argument("config", nargs="?", type=Path,
                        help="TOML file; its engines and gateway are ignored")  # fmt: skip
    _daemon_options(parser)
    parser.set_defaults(run=_up, engines=False)


def _daemon_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", help=f"one of: {', '.join(policy.NAMES)}")
    parser.add_argument("--front", help="address for clients, tcp://HOST:PORT or ipc://PATH")
    parser.add_argument("--back", help="address for engine hosts, likewise")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER",
                        help="trained bundle to predict with; SIGHUP loads it again")  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="FOLDER",
                        help="write a trace of each ended workflow, prompts included, "
                        "to train on")  # fmt: skip
    parser.add_argument(
        "--keep-engines",
        action="store_true",
        help="leave the engines running on exit; the next daemon takes them over",
    )


def _up(arguments: argparse.Namespace) -> int:
    from chimera_daemon.serve import serve

    if arguments.config is not None:
        chosen = config.load(arguments.config)
    elif arguments.engines:
        chosen = _testbed_config()
    else:
        chosen = config.Config()
    given = {
        name: value
        for name in ("policy", "front", "back")
        if (value := getattr(arguments, name)) is not None
    }
    if not arguments.engines:
        given["engines"] = ()
        given["gateway"] = msgspec.structs.replace(chosen.gateway, processes=0)
    paths = {
        name: str(path.absolute())
        for name in ("bundle", "record")
        if (path := getattr(arguments, name)) is not None
    }
    predictor = msgspec.structs.replace(chosen.predictor, **paths)
    chosen = msgspec.structs.replace(chosen, predictor=predictor, **given)
    config.check(chosen)
    try:
        policy.make_policy(chosen)
    except ValueError as error:
        raise config.ConfigError(str(error)) from error
    return serve(chosen, keep_engines=arguments.keep_engines)


def _testbed_config() -> config.Config:
    testbed = _bench_module("testbed")
    return config.load(Path(testbed.__file__).with_name("testbed.toml"))


def _add_gateway(commands: Any) -> None:
    defaults = config.Config()
    parser = commands.add_parser(
        "gateway",
        help="start an OpenAI-compatible HTTP front door of a daemon that runs",
        description="Serve the OpenAI API over HTTP as a client of a daemon, until SIGTERM. "
        "`chimera up` starts this by itself, as [gateway] of its TOML file says.",
    )
    parser.add_argument("--listen", metavar="HOST:PORT",
                        help=f"default: {defaults.gateway.listen}")  # fmt: skip
    parser.add_argument("--connect", default=defaults.front, metavar="ADDRESS",
                        help="the daemon's front address (default: %(default)s)")  # fmt: skip
    parser.add_argument("--processes", type=int, metavar="N",
                        help="gateways on this one port (default: 1)")  # fmt: skip
    parser.add_argument("--spec", help="all of it as one JSON object, like the table `gateway`")
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=_gateway, extra="gateway")


def _gateway(arguments: argparse.Namespace) -> int:
    gateway = _gateway_config(arguments)
    try:
        address = wire.check_address(arguments.connect)
    except ValueError as error:
        raise config.ConfigError(f"--connect: {error}") from error
    if arguments.parent is None and gateway.processes > 1:
        from chimera_daemon.serve import serve_gateways

        return serve_gateways(gateway, address)
    from chimera_daemon.gateway import run_gateway

    if arguments.parent is not None:
        processes.die_with(arguments.parent)
    return run_gateway(gateway, address, reuse_port=gateway.processes > 1)


def _gateway_config(arguments: argparse.Namespace) -> config.GatewayConfig:
    given = {
        name: value
        for name in ("listen", "processes")
        if (value := getattr(arguments, name)) is not None
    }
    try:
        gateway = msgspec.convert(_spec(arguments.spec or "{}"), config.GatewayConfig)
        gateway = msgspec.convert(msgspec.structs.asdict(gateway) | given, config.GatewayConfig)
    except msgspec.ValidationError as error:
        raise config.ConfigError(f"gateway: {error}") from error
    if gateway.processes == 0:
        raise config.ConfigError("--processes: write how many gateways to start, 1 or more")
    config.listen_address(gateway.listen)
    return gateway


def _add_worker(commands: Any) -> None:
    """Not listed in the help: the daemon itself calls it."""
    parser = commands.add_parser(
        "worker",
        description="One of the other workers of a daemon with `workers` above 1, which starts "
        "them by itself.",
    )
    parser.add_argument("--index", type=int, required=True, help="which worker: 1 or more")
    parser.add_argument("--spec", required=True, help="the configuration as JSON")
    parser.add_argument("--board", help="path of the congestion board")
    parser.add_argument("--parent", type=int, required=True,
                        help="process id of the daemon, with which this one ends")  # fmt: skip
    parser.set_defaults(run=_worker, log_as="worker {index} ")


def _worker(arguments: argparse.Namespace) -> int:
    from chimera_daemon.serve import serve

    processes.die_with(arguments.parent)
    try:
        chosen = msgspec.convert(_spec(arguments.spec), config.Config)
    except msgspec.ValidationError as error:
        raise config.ConfigError(f"worker: {error}") from error
    if not 0 < arguments.index < chosen.workers:
        raise config.ConfigError(f"--index {arguments.index}: there are {chosen.workers} workers")
    return serve(chosen, worker=arguments.index, board=arguments.board)


def _spec(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise config.ConfigError(f"--spec is not JSON: {error}") from error


def _add_engine(commands: Any) -> None:
    parser = commands.add_parser(
        "engine",
        help="start one engine host that joins a daemon",
        description="Host one engine: loads the model, warms up, measures itself, joins the daemon "
        "and stays until SIGTERM. It keeps looking for a daemon that is gone.",
    )
    parser.add_argument("--connect", default=config.Config().back, metavar="ADDRESS",
                        help="the daemon's back address (default: %(default)s)")  # fmt: skip
    parser.add_argument("--model", help="the model's name as clients see it")
    parser.add_argument("--path", help="checkpoint folder or Hugging Face id")
    parser.add_argument("--url", help="of --kind openai: the server, such as http://HOST:8000/v1")
    parser.add_argument("--name", help="unique name of this engine (default: the model's name)")
    parser.add_argument("--kind", choices=("vllm", "openai", "echo"), default="vllm",
                        help="openai: pass on to a server that speaks OpenAI's API "
                        "(default: vllm)")  # fmt: skip
    parser.add_argument("--max-inflight", type=int, help="default: what the engine can run at once")
    parser.add_argument("--cpus", type=_cores, default=[], metavar="CORES",
                        help="cores to stay on, such as 0,1")  # fmt: skip
    parser.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE",
                        help="engine argument, value as JSON")  # fmt: skip
    parser.add_argument("--no-logprobs", action="store_true",
                        help="do not ask for log-probabilities of the answers")  # fmt: skip
    parser.add_argument("--orphan-s", type=_seconds, metavar="SECONDS",
                        help="end after so many seconds without a daemon")  # fmt: skip
    parser.add_argument("--spec", help="all of it as one JSON object, like a table of `engines`")
    parser.set_defaults(run=_engine)


def _engine(arguments: argparse.Namespace) -> int:
    from chimera_daemon.engines.host import run_host

    engine = _engine_config(arguments)
    try:
        address = wire.check_address(arguments.connect)
    except ValueError as error:
        raise config.ConfigError(f"--connect: {error}") from error
    return run_host(engine, address, orphan_s=arguments.orphan_s)


def _engine_config(arguments: argparse.Namespace) -> config.EngineConfig:
    if arguments.spec is not None:
        table = _spec(arguments.spec)
    elif arguments.model is None:
        raise config.ConfigError("say which model to serve: --model NAME --path PATH")
    elif arguments.url is not None and (arguments.kind != "openai" or arguments.path is not None):
        raise config.ConfigError("--url is for --kind openai, which takes no --path")
    else:
        table = {
            "name": arguments.name or arguments.model,
            "model": arguments.model,
            "kind": arguments.kind,
            "path": arguments.url or arguments.path,
            "max_inflight": arguments.max_inflight,
            "cpus": arguments.cpus,
            "logprobs": not arguments.no_logprobs,
            "args": dict(_key_value(pair) for pair in arguments.arg),
        }
    try:
        engine = msgspec.convert(table, config.EngineConfig)
    except msgspec.ValidationError as error:
        raise config.ConfigError(f"engine: {error}") from error
    if engine.kind == "vllm" and engine.path is None:
        raise config.ConfigError("say where the model is: --path FOLDER or --path MODEL_ID")
    if engine.kind == "openai" and engine.path is None:
        raise config.ConfigError("say where the server is: --url http://HOST:PORT/v1")
    config.check(config.Config(engines=(engine,)))
    return engine


def _cores(text: str) -> list[int]:
    try:
        return [int(core) for core in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers, such as 0,1") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of seconds above 0")
    return seconds


def _key_value(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise config.ConfigError(f"--arg {pair!r}: write KEY=VALUE")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value  # a bare word is a string


def _add_status(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show engines, queues, workflows and counters of a running daemon",
        description="Ask a running daemon for its state.",
    )
    parser.add_argument("--address", default=config.Config().front,
                        help="the daemon's front address (default: %(default)s)")  # fmt: skip
    parser.add_argument("--watch", type=_seconds, metavar="SECONDS",
                        help="ask again and again")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the snapshot as JSON")
    parser.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    from chimera_daemon.client import ChimeraError, connect_sync
    from chimera_daemon.status import render

    try:
        with connect_sync(arguments.address) as client:
            while True:
                status = client.status()
                if arguments.json:
                    print(msgspec.json.encode(status).decode(), flush=True)
                else:
                    clear = "\x1b[2J\x1b[H" if arguments.watch and sys.stdout.isatty() else ""
                    print(clear + render(status), flush=True)
                if not arguments.watch:
                    return 0
                time.sleep(arguments.watch)
    except ChimeraError as error:
        print(f"chimera: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ValueError as error:  # the address
        raise config.ConfigError(str(error)) from error


def _add_learning(commands: Any) -> None:
    """Commands of `chimera_predictors`: they import what they need when they run."""
    for name, text in (
        ("train", "train a bundle of predictors on traces"),
        ("eval", "measure how good a bundle's predictions are, or cross-validate on traces"),
        ("traces", "look at a trace folder, or make one from a public release"),
    ):
        try:
            module = importlib.import_module(f"chimera_predictors.{name}_cli")
        except ImportError as error:
            _refuse(commands.add_parser(name, help=text), _with_advice(error, "train"))
        else:
            module.add(commands)
            commands.choices[name].set_defaults(extra="train")


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="run real workflows on the testbed under several policies and compare them",
        description="Start the testbed's engines, run the same seeded workflows under each policy, "
        "check every answer, print a table and write JSON rows and a plot.",
    )
    _bench_command(parser, "demo")


def _add_simulate(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate",
        help="replay traces on a simulated cluster under several policies and compare them",
        description="Replay the workflows of trace folders through the scheduler core on a "
        "simulated cluster, under every policy at every load, and show latency and success with "
        "intervals: as a table, JSON rows, a picture, a page.",
    )
    _bench_command(parser, "simulate")
    parser.set_defaults(extra="train")


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="choose a policy's knob for a goal, by simulation on your own traces",
        description="Replay half of the tasks of trace folders under many values of a policy's "
        "knob, take the one that serves the goal best, and show on the other half what it does.",
    )
    _bench_command(parser, "tune")
    parser.set_defaults(extra="train")


def _add_measure(commands: Any) -> None:
    parser = commands.add_parser(
        "measure",
        help="measure a running engine's costs, as a profile for the simulator",
        description="Send batches to the engine of a running daemon that serves a model, which "
        "must have no other work, and print what its steps cost as a table for "
        "`chimera simulate --cluster`.",
    )
    _bench_command(parser, "measure")


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure overhead and speed on this machine")
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    for name, module, text in (
        ("overhead", "overhead", "client, daemon and echo engines: round trips and stages/s"),
        ("soak", "soak", "many streams for a long time, and clients that go away"),
        ("core", "core_speed", "events per second of the scheduler core"),
        ("kernels", "kernels", "the GPU kernels of prediction against torch.compile"),
        ("calibration", "calibration", "the simulator against a real engine on the same work"),
        ("traces", "traces", "run the testbed and write its runs down, to train predictors on"),
    ):
        child = benches.add_parser(name, help=text, description=text)
        _bench_command(child, module)


def _bench_command(parser: argparse.ArgumentParser, name: str) -> None:
    """Take options and action from a part of `chimera_bench`, or say what to install."""
    try:
        module = _bench_module(name)
    except config.ConfigError as error:
        _refuse(parser, str(error))
        return
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def _refuse(parser: argparse.ArgumentParser, why: str) -> None:
    """Make it a command that takes any options and only says why it cannot be used."""

    def refuse(arguments: argparse.Namespace) -> int:
        raise config.ConfigError(why)

    parser.set_defaults(run=refuse, unavailable=True)


def _bench_module(name: str) -> Any:
    """A part of `chimera_bench`, which an installation may lack."""
    try:
        return importlib.import_module(f"chimera_bench.{name}")
    except ImportError as error:
        raise config.ConfigError(_with_advice(error, "bench")) from error
