"""`chimera demo`: its options, and what a user sees of it. Imports nothing heavy until it runs."""

import argparse
import logging
import math
import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from chimera_daemon import config as configuration
from chimera_daemon import policy

if TYPE_CHECKING:
    from chimera_bench.experiment import Plan
    from chimera_bench.variants import Variant

_EXIT_FAILED = 1
_EXIT_TERMINATED = 143
_TESTBED = Path(__file__).parent / "testbed" / "testbed.toml"

# One run takes a little longer than its arrivals: the last ones still have to be answered.
_ARRIVALS_S = 8.0
_CALIBRATION_S = 12.0
_LOAD = 2.0
_QUICK_ARRIVALS_S = 6.0
_QUICK_CALIBRATION_S = 6.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera demo`."""
    parser.add_argument(
        "--policies",
        metavar="A,B,...",
        help=f"of: {', '.join(policy.NAMES)}; with knobs as chimera:price=0.3 or "
        "paper:tau=0.5/1,delta_s=0.1, where each of 0.5/1 is a row; those that look at predictions "
        "also as chimera:prior, without the learned ones (default: chimera, chimera:prior, paper, "
        "least_loaded and static for the first and the last model; with --chaos: chimera)",
    )
    parser.add_argument(
        "--workflows",
        type=int,
        metavar="N",
        help=f"workflows per policy, load and seed (default: what arrives in {_ARRIVALS_S:g} s)",
    )
    _add_load(parser)
    parser.add_argument(
        "--engines",
        metavar="A,B,...",
        help="engines of the configuration to use (default: all, but no more than cores, if there "
        "is no GPU)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="TOML", help="engines and models (default: the testbed)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for rows, plot and logs (default: runs/demo-TIME)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.md",
        help="also write a Markdown page, with its picture beside it",
    )
    parser.add_argument(
        "--chaos",
        action="store_true",
        help="kill the busiest engine host with SIGKILL under load, and show what became of it all",
    )
    parser.add_argument("--quick", action="store_true", help="a short run; wide intervals")


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load",
        type=float,
        nargs="+",
        default=[_LOAD],
        metavar="X",
        help="arrival rates, each as a share of the capacity that one calibration finds under "
        "uniform routing; engines that share the work better take more "
        f"(default: {_LOAD:g})",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="arrival rate in workflows/s instead",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="S",
        help="of tasks, shapes, arrivals and tool gaps (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="K",
        help="run all policies with seed S, then with S+1 in reverse order, and so on, so that "
        "slow changes of the machine favour none (default: 2; with --quick or --chaos: 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 if nothing was lost and no engine failed (other than by ``--chaos``)."""
    try:
        import matplotlib  # noqa: F401
        import numpy  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise configuration.ConfigError(
            f"{error}; the demo needs: pip install 'chimera-daemon[bench]'"
        ) from error
    from chimera_bench.cluster import ClusterError
    from chimera_bench.experiment import Terminated, conduct

    # The demo says by itself what goes on; its client may only say what went wrong.
    for name in ("chimera", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    chosen = plan(arguments)
    try:
        return 0 if conduct(chosen) else _EXIT_FAILED
    except ClusterError as error:
        print(f"chimera demo: {error}\nlogs: {chosen.out / 'logs'}")
        return _EXIT_FAILED
    except Terminated:
        return _EXIT_TERMINATED


def plan(arguments: argparse.Namespace) -> "Plan":
    """Options as one checked plan; raises `ConfigError`."""
    from chimera_bench.experiment import Plan

    _refuse_bad_numbers(arguments)
    _refuse_bad_report(arguments.report)
    config = _config(arguments.config or _TESTBED, arguments.engines)
    seeds = arguments.seeds or (1 if arguments.quick or arguments.chaos else 2)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Plan(
        config=config,
        variants=_variants(arguments.policies, arguments.chaos, config),
        out=arguments.out or Path("runs") / f"demo-{now}",
        loads=tuple(arguments.load),
        rate_per_s=arguments.rate,
        workflows=arguments.workflows,
        arrivals_s=_QUICK_ARRIVALS_S if arguments.quick else _ARRIVALS_S,
        calibration_s=_QUICK_CALIBRATION_S if arguments.quick else _CALIBRATION_S,
        seeds=tuple(range(arguments.seed, arguments.seed + seeds)),
        chaos=arguments.chaos,
        report=arguments.report,
        command=command_line(arguments),
    )


def command_line(arguments: argparse.Namespace) -> str:
    """What to type for these options; those that are as they are by default are left out."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["chimera", "demo"]
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(arguments, name)
        if value != default:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *(str(each) for each in values)]
    return shlex.join(words)


def _refuse_bad_numbers(arguments: argparse.Namespace) -> None:
    loads = arguments.load
    given = [("load", load) for load in loads]
    given += [(name, getattr(arguments, name)) for name in ("workflows", "rate", "seeds")]
    for name, value in given:
        if value is not None and not 0 < value < math.inf:
            raise configuration.ConfigError(f"--{name} must be positive and finite, not {value}")
    twice = [load for load in loads if loads.count(load) > 1]
    if twice:
        raise configuration.ConfigError(
            f"--load: {twice[0]:g} is there twice; for more runs of it use --seeds"
        )
    if arguments.rate is not None and len(loads) > 1:
        raise configuration.ConfigError(
            "--rate is one arrival rate; with several loads leave it out"
        )


def _refuse_bad_report(path: Path | None) -> None:
    """Before the engines start, and not after an hour of work."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise configuration.ConfigError(f"--report: make the folder {path.parent} first")
    if path.suffix != ".md":
        raise configuration.ConfigError(f"--report: the name must end in .md, not {path.name!r}")


def _config(path: Path, names: str | None) -> configuration.Config:
    config = configuration.load(path)
    if names is not None:
        wanted = [name.strip() for name in names.split(",")]
        known = {engine.name: engine for engine in config.engines}
        for name in wanted:
            if name not in known:
                raise configuration.ConfigError(
                    f"--engines: no engine `{name}` in {path}; there are: {', '.join(known)}"
                )
        engines = tuple(known[name] for name in dict.fromkeys(wanted))
        config = msgspec.structs.replace(config, engines=engines)
    if not config.engines:
        raise configuration.ConfigError(f"{path}: the demo needs engines that it can start")
    cores = _cores(config)
    engines = config.engines if names is not None else fitting(config.engines, cores)
    return msgspec.structs.replace(config, engines=fair(engines, cores))


def fitting(
    engines: tuple[configuration.EngineConfig, ...], cores: tuple[int, ...]
) -> tuple[configuration.EngineConfig, ...]:
    """As many engines as there are ``cores``, from the first to the last; all if that is unknown.

    Engines that share cores slow each other down, which no engine on hardware of its own does.
    """
    most = len(cores)
    if most < 2 or most >= len(engines):
        return engines
    return tuple(engines[i * (len(engines) - 1) // (most - 1)] for i in range(most))


def fair(
    engines: tuple[configuration.EngineConfig, ...], cores: tuple[int, ...]
) -> tuple[configuration.EngineConfig, ...]:
    """The engines as a comparison needs them; what the configuration says itself is kept.

    All policies run the same tasks on the same engines: a prefix that is still in a cache would
    favour whoever comes later, so there is none. Where there are ``cores`` for it, every engine
    gets its own (vLLM would give each of them all), and the remainder goes to the last ones.
    """
    shares: list[tuple[int, ...]] = [()] * len(engines)
    if len(cores) >= len(engines) and not any(engine.cpus for engine in engines):
        cuts = [len(cores) * i // len(engines) for i in range(len(engines) + 1)]
        shares = [cores[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return tuple(
        msgspec.structs.replace(
            engine,
            cpus=engine.cpus or share,
            args={"enable_prefix_caching": False, **engine.args},
        )
        if engine.kind == "vllm"
        else engine
        for engine, share in zip(engines, shares, strict=True)
    )


def _cores(config: configuration.Config) -> tuple[int, ...]:
    """Cores to share out; none where engines need none of their own: echo, or on a GPU."""
    from chimera_bench import machine

    alone = all(engine.kind == "vllm" for engine in config.engines)
    return machine.cores() if alone and not machine.gpus() else ()


def _variants(
    names: str | None, chaos: bool, config: configuration.Config
) -> "tuple[Variant, ...]":
    from chimera_bench.variants import split, variants

    models = list(dict.fromkeys(engine.model for engine in config.engines))
    if names is not None:
        chosen = split(names)
    elif chaos:
        chosen = ["chimera"]
    else:
        learned = config.predictor.bundle is not None
        chosen = ["chimera", *(["chimera:prior"] if learned else []), "paper", "least_loaded"]
        chosen += [f"static:{models[0]}", f"static:{models[-1]}"]
    if not chosen:
        raise configuration.ConfigError("--policies: name at least one")
    rows = [row for name in chosen for row in variants(name, config)]
    return tuple({row.name: row for row in rows}.values())
