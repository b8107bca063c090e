"""The measurements of `chimera bench kernels`: is it right, how fast is it, which tiles are best.

Everything is compared with the fp32 reference before anything is timed. Knows cases and clocks; no
command line, no table and no file.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chimera_bench import kernel_cases, kernel_served
from chimera_bench.gpu_timing import Timer, captured, percentile, walls_us
from chimera_bench.kernel_cases import TEXT_TOKENS, Call, EncoderCase, HeadsCase
from chimera_bench.kernel_served import Served
from chimera_bench.roofline import Ceilings, Cost, Shape, encoder_cost, floor_us
from chimera_kernels import encoder as encoders
from chimera_kernels.encoder import TritonEncoder
from chimera_kernels.persistent import PersistentEncoder

Row = dict[str, Any]

# ‖out - reference‖ / ‖reference‖ that is still right: of bf16 operands, and of fp32 heads.
ENCODER_BOUND, HEADS_BOUND = 1e-2, 1e-4
# Others keep the residual stream in bf16; beyond this they compute something else.
_OTHERS_BOUND = 5e-2
_RANKED = 0.999
_RANKED_STAGES = 256
_PERSISTENT_TOKENS = 512
_HIDDEN_BYTES = 4  # the residual stream is fp32
_MOST_PASSES, _FEWEST_PASSES, _PASSED_STAGES = 1000, 100, 20_000
_PASS_WARM_UPS = 20
_ALWAYS_BY_READER = 1 << 30
_SWEPT_TOKENS = (64, 128, 256, 512)

GOALS_US = {
    "minilm:1x128": 80.0,
    "minilm:32x128": 350.0,
    "minilm:64x256": 1300.0,
    "bert-base:1x128": 300.0,
}
TEXT_GOALS_US = {32: (1000.0, 2000.0)}  # by stages: p50 and p99


class Plan(NamedTuple):
    """What to measure."""

    device: str
    shapes: tuple[Shape, ...]
    stages: tuple[int, ...]
    parts: tuple[str, ...]
    contestants: tuple[str, ...]
    encoder: str
    bundle: Path | None
    testbed: Path
    seed: int
    seconds: float
    deadline: float  # on the monotonic clock


class Contestant(NamedTuple):
    """Somebody who computes a case; `make` may compile or capture."""

    name: str
    make: Callable[[], Call]
    compiles: bool = False


class Job(NamedTuple):
    """One row to come."""

    part: str
    case: EncoderCase | HeadsCase
    contestant: Contestant
    facts: Row


class Cases(NamedTuple):
    """All that is checked, and then timed."""

    encoders: list[EncoderCase]
    ours: list[list[tuple[str, TritonEncoder, Call]]]  # of each encoder case
    heads: list[HeadsCase]
    served: list[Served]


def prepare(plan: Plan) -> Cases:
    """Weights, inputs and memory of everything. Raises BundleError."""
    torch.manual_seed(plan.seed)
    subjects = {
        model: kernel_cases.subject(model, plan.encoder, plan.device)
        for model in dict.fromkeys(shape.model for shape in plan.shapes)
        if "encoder" in plan.parts
    }
    cases = [
        EncoderCase(shape, subjects[shape.model], plan.seed, plan.device)
        for shape in plan.shapes
        if subjects
    ]
    made: list[Served] = []
    if {"pass", "text"} & set(plan.parts):
        made = list(_served(plan))
    heads: list[HeadsCase] = []
    if "heads" in plan.parts:
        weights = kernel_cases.random_heads(kernel_cases.MINT)
        if plan.bundle is not None:
            weights = kernel_served.head_weights(plan.bundle)
        heads = [HeadsCase(weights, stages, plan.device) for stages in plan.stages]
    return Cases(cases, [list(_ours(case, plan)) for case in cases], heads, made)


def _served(plan: Plan) -> Iterator[Served]:
    if plan.bundle is not None:
        yield kernel_served.served(plan.bundle, plan.device)
        return
    yield kernel_served.shaped(plan.encoder, plan.testbed, plan.device)
    yield kernel_served.served(plan.testbed, plan.device)


def _ours(case: EncoderCase, plan: Plan) -> Iterator[tuple[str, TritonEncoder, Call]]:
    kinds = {"layered": TritonEncoder, "persistent": PersistentEncoder}
    for name, kind in kinds.items():
        fits = kind is TritonEncoder or kernel_cases.persists(case.shape, _PERSISTENT_TOKENS)
        if name in plan.contestants and fits:
            yield name, *case.ours(kind)


def gate(cases: Cases, plan: Plan) -> Iterator[Row]:
    """One row for each thing that is timed: its error on fresh inputs, and whether it is right."""
    for case, ours in zip(cases.encoders, cases.ours, strict=True):
        for name, encoder, call in ours:
            case.renew()
            kernel_cases.poison(encoder)
            yield _checked(str(case.shape), name, partial(case.error, call), ENCODER_BOUND)
    for case in cases.heads:
        case.renew()
        case.out.fill_(float("nan"))
        yield _checked(_shape(case), "heads", partial(case.error, case.ours), HEADS_BOUND)
    for made in cases.served:
        yield _checked_ranking(made, plan)


def _checked(shape: str, name: str, error: Callable[[], float], bound: float) -> Row:
    row: Row = {"part": "gate", "shape": shape, "contestant": name}
    try:
        row["error"] = error()
    except Exception as failure:  # whatever a launch raises: the other rows help to find out why
        return row | {"right": False, "skipped": _said(failure)}
    return row | {"right": row["error"] <= bound}


def _checked_ranking(made: Served, plan: Plan) -> Row:
    texts = kernel_served.prompts(made.encoder.tokenizer, TEXT_TOKENS, plan.seed + 1)
    asked = kernel_served.queries(texts, min(_RANKED_STAGES, max(plan.stages)))
    found = kernel_served.agreement(made, asked)
    row = _checked(f"{len(asked)} stages", made.name, lambda: found.error, ENCODER_BOUND)
    right = row["right"] and found.ranked >= _RANKED
    return row | {"right": right, "ranked": found.ranked, "identical": found.identical}


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".strip().splitlines()[0]


def measure(cases: Cases, plan: Plan, ceilings: Ceilings) -> Iterator[Row]:
    """Rows, one by one: first ours and what is quick, then what torch.compile has to tune for long.

    What would begin to compile after `plan.deadline` is left out, and its row says so.
    """
    timer = Timer(plan.seconds)
    jobs = [*_encoder_jobs(cases, plan), *_heads_jobs(cases, plan)]
    for job in jobs:
        if not job.contestant.compiles:
            yield _row(job, timer, ceilings)
    for made, stages in itertools.product(cases.served, plan.stages):
        yield from _served_rows(made, stages, plan)
    for job in jobs:
        if job.contestant.compiles:
            if time.monotonic() > plan.deadline:
                yield _facts(job) | {"skipped": "the deadline was over"}
            else:
                yield _row(job, timer, ceilings)


def _encoder_jobs(cases: Cases, plan: Plan) -> Iterator[Job]:
    for case, ours in zip(cases.encoders, cases.ours, strict=True):
        cost = encoder_cost(case.shape.sizes, case.lengths)
        facts = {"weights": case.subject.source, "dtype": "bf16"} | _cost(cost)
        facts |= {"sequences": len(case.lengths), "tokens": case.tokens}
        goal = {"goal_us": GOALS_US.get(str(case.shape))}
        for name, _, call in ours:
            yield Job("encoder", case, Contestant(name, _same(call)), facts)
            graph = Contestant(f"{name}, graph", _capture(_same(call)))
            yield Job("encoder", case, graph, facts | goal)
        for other in _others(lambda case=case: case.transformers("sdpa"), plan):
            yield Job("encoder", case, other, facts)
        if "eager" in plan.contestants:
            eager = Contestant("transformers", lambda case=case: case.transformers("eager"))
            yield Job("encoder", case, eager, facts)
        if "sdpa" in plan.contestants:
            sdpa = Contestant("transformers, sdpa", lambda case=case: case.transformers("sdpa"))
            yield Job("encoder", case, sdpa, facts)


def _heads_jobs(cases: Cases, plan: Plan) -> Iterator[Job]:
    for case in cases.heads:
        cost = Cost(*case.heads.cost(case.tokens, case.stages, case.stages, _HIDDEN_BYTES))
        facts = {"dtype": "fp32", "stages": case.stages, "tokens": case.tokens} | _cost(cost)
        for contestant in (
            Contestant("heads", _same(case.ours)),
            Contestant("heads, graph", _capture(_same(case.ours))),
            Contestant("reference", _same(case.plain)),
            *_others(_same(case.plain), plan),
        ):
            yield Job("heads", case, contestant, facts)


def _others(make: Callable[[], Call], plan: Plan) -> Iterator[Contestant]:
    """torch.compile with its own graphs, and tuned likewise in a graph like ours."""
    if "compile" not in plan.contestants:
        return

    def with_mode(mode: str) -> Callable[[], Call]:
        return lambda: kernel_cases.compiled(make(), mode)

    yield Contestant(
        "compile, own graph", _capture(with_mode("max-autotune-no-cudagraphs")), compiles=True
    )
    yield Contestant("compile", with_mode("max-autotune"), compiles=True)


def _same(call: Call) -> Callable[[], Call]:
    return lambda: call


def _capture(make: Callable[[], Call]) -> Callable[[], Call]:
    return lambda: captured(make())


def _cost(cost: Cost) -> Row:
    return {"bytes": cost.bytes, "flops": cost.flops}


def _facts(job: Job) -> Row:
    name = job.contestant.name
    return {"part": job.part, "shape": _shape(job.case), "contestant": name} | job.facts


def _shape(case: EncoderCase | HeadsCase) -> str:
    return f"{case.stages} stages" if isinstance(case, HeadsCase) else str(case.shape)


def _row(job: Job, timer: Timer, ceilings: Ceilings) -> Row:
    """Error and times of one contestant; of one that fails or is wrong, why it has no times."""
    row = _facts(job)
    try:
        call = job.contestant.make()
        row["error"] = job.case.error(call)
        if not row["error"] <= _OTHERS_BOUND:
            return row | {"skipped": "computes something else"}
        times = timer.times(call, job.case.load)
    except Exception as error:  # of any library; the others are still worth their rows
        return row | {"skipped": _said(error)}
    floor = floor_us(Cost(row["bytes"], row["flops"]), ceilings)
    return row | times._asdict() | {"floor_us": floor, "of_floor": floor / times.p50_us}


def _served_rows(made: Served, stages: int, plan: Plan) -> Iterator[Row]:
    """Host to host: the pass from token ids, the predictor from texts, and the tokeniser alone."""
    count = max(_FEWEST_PASSES, min(_MOST_PASSES, _PASSED_STAGES // stages)) + _PASS_WARM_UPS
    facts = {"shape": f"{stages} stages", "contestant": made.name, "stages": stages}
    if "text" in plan.parts:
        seed = plan.seed + 1000 + stages
        texts = kernel_served.prompts(made.encoder.tokenizer, TEXT_TOKENS, seed)
        asked = [kernel_served.queries(texts, stages) for _ in range(count)]
        row = {"part": "text"} | facts | _walls(made.fused.table, asked)
        goals = TEXT_GOALS_US.get(stages) if made.is_minilm else None
        if goals is not None:
            row |= {"goal_us": goals[0], "goal_p99_us": goals[1]}
        yield row
        # Others again: the words of texts are remembered, and then known ones would be timed.
        tokenised = [list(itertools.islice(texts, stages)) for _ in range(count)]
        yield {"part": "tokeniser"} | facts | _walls(made.encoder.tokenizer.encode, tokenised)
    if "pass" in plan.parts:
        batches = list(kernel_served.batches(made, stages, count, plan.seed))
        yield {"part": "pass"} | facts | _walls(made.whole_pass.run, batches)


def _walls(work: Callable[[Any], object], inputs: Sequence[Any]) -> Row:
    walls = walls_us(work, inputs)[_PASS_WARM_UPS:]
    p50, p99 = (percentile(walls, share) for share in (0.5, 0.99))
    return {"p50_us": p50, "p99_us": p99, "runs": len(walls)}


def sweep(cases: Cases, plan: Plan) -> Iterator[Row]:
    """Times of the layered encoder with other tiles, one linear's at a time, and other limits.

    Rows have what was set, the shape, the error and the median; `setting` is "" for the defaults.
    """
    timer = Timer(plan.seconds)
    for case in cases.encoders:
        yield _tried(case, timer, "", "", TritonEncoder)
        model = case.shape.sizes
        rope = model.family != "bert"
        widths = {model.width, model.inner, (3 * model.width) // 2 if rope else 3 * model.width}
        for places, tile in itertools.product(sorted(widths), encoders._TILES):
            with _tile(places, tile):
                yield _tried(case, timer, f"{places} wide", str(tuple(tile)), TritonEncoder)
        for limit in (0, _ALWAYS_BY_READER):
            with _replaced("_NORM_BY_READER_TOKENS", limit):
                said = "by reader" if limit else "by a launch"
                yield _tried(case, timer, "norm", said, TritonEncoder)
        if kernel_cases.persists(case.shape, _SWEPT_TOKENS[-1]):
            yield _tried(case, timer, "kernel", "persistent", PersistentEncoder)


def sweep_shapes(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """These, and of each BERT among them small batches, to find where the persistent one loses."""
    small = [
        Shape(model, -(-tokens // 128), min(tokens, 128), min(tokens, 128))
        for model in dict.fromkeys(s.model for s in shapes if s.sizes.family == "bert")
        for tokens in _SWEPT_TOKENS
    ]
    wanted = [s for s in [*shapes, *small] if s.longest <= s.sizes.longest]
    return tuple(dict.fromkeys(wanted))


def _tried(
    case: EncoderCase, timer: Timer, what: str, setting: str, kind: type[TritonEncoder]
) -> Row:
    row: Row = {"part": "sweep", "shape": str(case.shape), "contestant": what, "setting": setting}
    try:
        _, call = case.ours(kind)
        graph = captured(call)
        row["error"] = case.error(graph)
        if not row["error"] <= ENCODER_BOUND:
            return row | {"skipped": "wrong"}
        return row | {"p50_us": timer.times(graph, case.load).p50_us}
    except Exception as error:  # a tile that does not fit, say
        return row | {"skipped": _said(error)}


@contextlib.contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    before = getattr(encoders, name)
    setattr(encoders, name, value)
    try:
        yield
    finally:
        setattr(encoders, name, before)


def _tile(places: int, tile: encoders.Tile) -> contextlib.AbstractContextManager[None]:
    """Linears that have so many places take this tile."""
    usual = encoders.tile_for

    def chosen(tokens: int, wide: int, *more: Any) -> encoders.Tile:
        return tile if wide == places else usual(tokens, wide, *more)

    return _replaced("tile_for", chosen)
