"""Policies: pure functions that place a stage on a model and give it its rank in the queue.

Nothing here changes state. The core owns the views below, keeps them current; policies read them.
Ranks do not depend on the current time: with linear aging, ``work - aging * (now - arrival)``
orders stages exactly like ``work + aging * arrival``, so a heap stays valid as time goes by.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter

from msgspec import Struct

from chimera_daemon.config import Config
from chimera_daemon.messages import Candidate, ModelPrediction, Prediction, Stage

# How far the same tasks are hard for all models: 0, not at all; 1, a stronger one can do whatever a
# weaker one can. Found on a half of MINT: .75 to .79 for four pairs of models, .28 to .55 for four.
_COMMON_DIFFICULTY = 0.7
_QUANTUM_TOKENS = 128  # of `mlfq`: output tokens at its first level, about one stage
_BOOST_ROUNDS = 200  # of `mlfq`: passed over so often, a stage runs before all that were not


class Congestion(Struct, frozen=True, gc=False):
    """What a view comes down to for a stage that would join: terms of F and X below."""

    present: float  # attempts at work or waiting, per engine
    prefill_s_per_token: float
    tpot_s: float  # seconds per output token of a stage in the batch
    wait_s: float  # until a stage that comes now starts
    delay_s_per_token: float  # that each output token of such a stage costs the others


class ModelView(Struct):
    """Congestion of one model: all its ready engines and its queue together."""

    name: str
    engines: int = 0
    slots: int = 0  # attempts that its engines take at once
    running: int = 0
    running_tokens: float = 0.0  # output tokens that running attempts still owe
    waiting: int = 0
    waiting_tokens: float = 0.0  # output tokens that waiting stages will need
    waiting_prompt: int = 0  # prompt tokens of waiting stages
    context_tokens: int = 0  # prompt and output that each of its engines can hold
    claims: int = 0  # requests in flight, those at draining engines included
    claimed_tokens: float = 0.0  # paper: predicted workflow tokens of requests in flight
    foreign: int = 0  # requests at its engines beyond ours, those of other workers among them
    peers_waiting: int = 0  # stages that wait for it at other workers
    peers_waiting_tokens: float = 0.0
    # Cost model, slot-weighted mean over the engines; see `Profile`.
    step_s: float = 0.0
    step_per_seq_s: float = 0.0
    prefill_s_per_token: float = 0.0
    slots_each: float = 1.0  # per engine
    full_s_per_token: float = 0.0  # engine seconds per output token with all slots at work
    # Seconds that finished stages took over those that the profile says, running average: prefills
    # of others, a shared machine, a profile measured on better days.
    slowdown: float = 1.0
    congestion: Congestion | None = None  # of this view, if it has not changed since


class WorkflowView(Struct):
    """What is known of the workflow of a stage."""

    workflow_id: str
    kind: str
    model: str | None = None  # that ran its last stage (`paper`: that it is bound to)
    engine: str | None = None
    context_tokens: int = 0  # prompt and output of its last stage: in that engine's prefix cache
    output_tokens: int = 0  # that its finished stages wrote


class ClusterView(Struct):
    """What is the same for every candidate."""

    idle_latency_s: float = 1.0  # of a typical workflow on the fastest model; scales the price
    arrivals: int = 0
    price: float | None = None  # learned; None: as configured


class Choice(Struct, frozen=True, gc=False):
    """Where a stage goes. An empty ``model`` means that no candidate has an engine, or, if it is
    ``declined``, that an optional stage is not worth what it costs on any."""

    model: str
    reason: str
    candidates: tuple[Candidate, ...] = ()
    declined: bool = False


Choose = Callable[[Stage, Prediction, WorkflowView, Sequence[ModelView], ClusterView], Choice]
Rank = Callable[[Stage, ModelPrediction, WorkflowView, float], float]


class Policy(Struct, frozen=True):
    """``choose`` places a stage among models with engines; ``rank`` orders a model's queue.

    ``rank(stage, prediction of the chosen model, workflow, arrival time)``: lower runs first. With
    ``starvation_rounds`` the queue also ages by rounds, as in the paper: no new stage that comes so
    many rounds (stages started) after another passes it.
    """

    name: str
    choose: Choose
    rank: Rank
    starvation_rounds: int | None = None
    service_rounds: int = 1
    spares_prefix: bool = False  # a queue weighs ranks against prefixes cached at other engines
    has_price: bool = False  # that can be learned


def remaining_given(prediction: ModelPrediction, produced: int, max_tokens: int) -> float:
    """Expected output tokens still to come of a stage that has produced this many.

    The predicted distribution is taken as uniform between its quantiles, and beyond the highest up
    to half as much again; all of it that lies beyond ``max_tokens`` ends there. A stage that
    outlived all that is expected to run as long again, within ``max_tokens``.

    The core asks this for every attempt in every heartbeat, so the sums over the four parts of the
    distribution are written out: what is left of the part that ``produced`` lies in, then all later
    ones, each with its share and its middle (times two).
    """
    if produced <= 0:
        return min(prediction.stage_tokens_mean, float(max_tokens))
    low, middle, high = prediction.stage_tokens
    top = 1.5 * high
    if top > max_tokens:
        top = float(max_tokens)
        low, middle, high = min(low, top), min(middle, top), min(high, top)
    if produced < low:
        share = 0.1 * (low - produced) / low
        mass = share + 0.9
        twice = share * (produced + low) + 0.4 * (low + 2.0 * middle + high) + 0.1 * (high + top)
    elif produced < middle:
        share = 0.4 * (middle - produced) / (middle - low)
        mass = share + 0.5
        twice = share * (produced + middle) + 0.4 * (middle + high) + 0.1 * (high + top)
    elif produced < high:
        share = 0.4 * (high - produced) / (high - middle)
        mass = share + 0.1
        twice = share * (produced + high) + 0.1 * (high + top)
    elif produced < top:
        mass, twice = 1.0, float(produced + top)
    else:
        return float(max(1, min(produced, max_tokens - produced)))
    return max(1.0, 0.5 * twice / mass - produced)


def idle_latency_s(stage: Stage, prediction: ModelPrediction, view: ModelView) -> float:
    """Seconds that the rest of the workflow takes on an idle engine of this model."""
    decode = prediction.remaining_tokens_mean * (view.step_s + view.step_per_seq_s)
    return stage.prompt_tokens * view.prefill_s_per_token + decode


def congestion(view: ModelView) -> Congestion:
    """The terms of F and X that depend on the view alone, all per engine of the model.

    The core computes them once for all stages that see the same view.
    """
    engines, slots, slowdown = view.engines, view.slots_each, view.slowdown
    running = (view.running + view.foreign) / engines
    waiting = (view.waiting + view.peers_waiting) / engines
    present = running + waiting
    batch = present + 1.0 if present + 1.0 < slots else slots
    step = view.step_s + view.step_per_seq_s * batch
    prefill = view.prefill_s_per_token
    wait = view.waiting_prompt / engines * prefill
    if present >= slots:
        tokens = view.waiting_tokens + view.peers_waiting_tokens
        wait += tokens / engines * view.full_s_per_token
    delay = view.full_s_per_token * waiting + view.step_per_seq_s * running
    return Congestion(
        present, slowdown * prefill, slowdown * step, slowdown * wait, slowdown * delay
    )


def finish_and_delay_s(
    stage: Stage, prediction: ModelPrediction, workflow: WorkflowView, view: ModelView
) -> tuple[float, float]:
    """(F, X): seconds until the workflow is done on this model, and seconds it costs the others.

    ``F = prefill(P) + R tpot + S W`` and ``X = prefill n + R step(B)/B waiting + R dstep running``
    with P prompt tokens not yet in the prefix cache, R mean tokens and S stages still to come, n
    attempts at work or waiting, B slots, all per engine of the model, times its slowdown.
    """
    terms = view.congestion or congestion(view)
    prompt = stage.prompt_tokens
    if workflow.model == view.name:
        prompt = max(prompt - workflow.context_tokens, 0)
    prefill = prompt * terms.prefill_s_per_token
    tokens = prediction.remaining_tokens_mean
    wait = (1.0 + prediction.remaining_stages) * terms.wait_s
    finish = prefill + tokens * terms.tpot_s + wait
    return finish, prefill * terms.present + tokens * terms.delay_s_per_token


def after_failure(confidence: float, failed: float) -> float:
    """Confidence in a model at a task that another one has failed, of confidence ``failed`` before.

    Were tasks hard for all models alike, the model solves its share q of them, those of the other
    one (share f) among them: (q - f) / (1 - f). Did they fail independently: q. Between the two.
    """
    nested = max(0.0, confidence - failed) / (1.0 - failed) if failed < 1.0 else 0.0
    return confidence + _COMMON_DIFFICULTY * (nested - confidence)


def _chimera(config: Config) -> Policy:
    """Ours: see `choose`. The fewest expected tokens of the rest of the workflow run first.

    Starvation: what comes (W + E) / `aging_tokens_per_s` after a stage of W such tokens never
    passes it, with E the tokens that its prefix is worth, if that is cached at another engine.
    """
    configured, aging = config.price, config.aging_tokens_per_s

    def choose(
        stage: Stage,
        prediction: Prediction,
        workflow: WorkflowView,
        models: Sequence[ModelView],
        cluster: ClusterView,
    ) -> Choice:
        """Argmax of q - price * (F + X) / idle latency: success against seconds, joined.

        A model that takes a run over is credited with no more than the one that has it: nobody has
        seen how such runs end, so only time is a reason. Where earlier tries of the task have
        failed, confidence is what is left of it after that; where the client would try again, a
        score includes what that would bring. An optional stage that is worth less than nothing is
        declined.
        """
        price = configured if cluster.price is None else cluster.price
        price_per_s = price / cluster.idle_latency_s
        best, best_score = "", float("-inf")
        candidates: list[Candidate] = []
        predictions, other = prediction.models, prediction.other
        tries = stage.tries
        failed: tuple[str, ...] = ()
        present, beaten = 1.0, 0.0
        if tries is not None and tries.failed:
            failed = tries.failed
            beaten = max(prediction.of(name).confidence for name in failed)
        if workflow.model is not None:
            present = after_failure(prediction.of(workflow.model).confidence, beaten)
        for view in models:
            name = view.name
            predicted = predictions.get(name, other)
            finish, delay = finish_and_delay_s(stage, predicted, workflow, view)
            q = predicted.confidence
            if failed:
                q = 0.0 if name in failed else after_failure(q, beaten)
            if q > present:
                q = present
            score = q - price_per_s * (finish + delay)
            tokens = view.running_tokens + view.waiting_tokens
            candidates.append(Candidate(name, score, q, finish, tokens))
            if score > best_score or not best:
                best, best_score = name, score
        if tries is not None and tries.left and workflow.model is None:
            candidates = [_with_next_try(c, candidates) for c in candidates]
            best, best_score = max(((c.model, c.score) for c in candidates), key=itemgetter(1))
        if stage.optional and best_score < 0.0:
            return Choice("", f"the best score is {best_score:.3f}", tuple(candidates), True)
        return Choice(best, "score", tuple(candidates))

    def rank(
        stage: Stage, prediction: ModelPrediction, workflow: WorkflowView, arrived_s: float
    ) -> float:
        return prediction.remaining_tokens_mean + aging * arrived_s

    return Policy("chimera", choose, rank, spares_prefix=True, has_price=True)


def _with_next_try(first: Candidate, candidates: Sequence[Candidate]) -> Candidate:
    """With what it brings to try another model if this one fails, as things are now."""
    q = first.confidence
    more = 0.0
    for other in candidates:
        if other.model != first.model:
            cost = other.confidence - other.score
            more = max(more, after_failure(other.confidence, q) - cost)
    return Candidate(
        first.model, first.score + (1.0 - q) * more, q, first.finish_s, first.waiting_tokens
    )


def _paper(config: Config) -> Policy:
    """Algorithm 1 of arXiv 2603.22206. Starvation: bounded by ``starvation_rounds``."""
    tau, gain = config.paper.tau, config.paper.delta_s

    def load_s(view: ModelView) -> float:
        return view.claimed_tokens * view.full_s_per_token / view.engines

    def choose(
        stage: Stage,
        prediction: Prediction,
        workflow: WorkflowView,
        models: Sequence[ModelView],
        cluster: ClusterView,
    ) -> Choice:
        """Its choice of the model. Several engines of a model count as one larger one."""
        candidates: list[Candidate] = []
        for view in models:
            q = prediction.of(view.name).confidence
            candidates.append(Candidate(view.name, q, q, load_s(view), view.claimed_tokens))
        seen = tuple(candidates)
        if workflow.model is not None and any(v.name == workflow.model for v in models):
            return Choice(workflow.model, "bound", seen)
        fast = min(candidates, key=lambda c: c.finish_s)
        for candidate in sorted(candidates, key=lambda c: -c.confidence):
            if (
                candidate.finish_s <= (1.0 + tau) * fast.finish_s
                and candidate.confidence >= fast.confidence + gain
            ):
                return Choice(candidate.model, "confident", seen)
        return Choice(fast.model, "fastest", seen)

    paper = config.paper
    return Policy("paper", choose, _shortest_job, paper.starvation_rounds, paper.service_rounds)


def _to_least_loaded(
    stage: Stage,
    prediction: Prediction,
    workflow: WorkflowView,
    models: Sequence[ModelView],
    cluster: ClusterView,
) -> Choice:
    """Fewest requests running and waiting per engine, as vLLM's own data-parallel balancer."""
    view = min(
        models, key=lambda v: (v.running + v.waiting + v.foreign + v.peers_waiting) / v.engines
    )
    return Choice(view.name, "least loaded")


def _first_come(
    stage: Stage, prediction: ModelPrediction, workflow: WorkflowView, arrived_s: float
) -> float:
    """Ties break by arrival. Starvation: none, nothing is passed over."""
    return 0.0


def _shortest_stage(
    stage: Stage, prediction: ModelPrediction, workflow: WorkflowView, arrived_s: float
) -> float:
    return prediction.stage_tokens[1]


def _shortest_job(
    stage: Stage, prediction: ModelPrediction, workflow: WorkflowView, arrived_s: float
) -> float:
    return prediction.remaining_tokens[1]


def _feedback_level(
    stage: Stage, prediction: ModelPrediction, workflow: WorkflowView, arrived_s: float
) -> float:
    """0 below one quantum, 1 below two, 2 below four, and so on."""
    return float((workflow.output_tokens // _QUANTUM_TOKENS).bit_length())


def _least_loaded(config: Config) -> Policy:
    return Policy("least_loaded", _to_least_loaded, _first_come)


def _mlfq(config: Config) -> Policy:
    """Multi-level feedback queue: workflows that got the fewest output tokens first, in levels.

    Service is counted per workflow, as in Autellix (arXiv 2502.13965), when a stage finishes; the
    level of a stage is that of when it came. Starvation: bounded by ``_BOOST_ROUNDS``.
    """
    return Policy("mlfq", _to_least_loaded, _feedback_level, _BOOST_ROUNDS)


def _ltr(config: Config) -> Policy:
    """Learning to rank (arXiv 2408.15792): fewest predicted median tokens of the stage first.

    Starvation: nothing bounds it. While shorter stages come, a long one waits.
    """
    return Policy("ltr", _to_least_loaded, _shortest_stage)


def _stjf(config: Config) -> Policy:
    """Shortest total job first: fewest predicted median tokens of the rest of the workflow.

    With the truth as prediction it is the reference of arXiv 2603.22206. Starvation: nothing bounds
    it. While shorter workflows come, a long one waits.
    """
    return Policy("stjf", _to_least_loaded, _shortest_job)


def _router_only(config: Config) -> Policy:
    def choose(
        stage: Stage,
        prediction: Prediction,
        workflow: WorkflowView,
        models: Sequence[ModelView],
        cluster: ClusterView,
    ) -> Choice:
        """Highest confidence, whatever the load."""
        view = max(models, key=lambda v: prediction.of(v.name).confidence)
        return Choice(view.name, "most confident")

    return Policy("router_only", choose, _first_come)


def _round_robin(config: Config) -> Policy:
    def choose(
        stage: Stage,
        prediction: Prediction,
        workflow: WorkflowView,
        models: Sequence[ModelView],
        cluster: ClusterView,
    ) -> Choice:
        """Models in turn, each as often as it has engines."""
        turn = cluster.arrivals % sum(v.engines for v in models)
        for view in models:
            turn -= view.engines
            if turn < 0:
                return Choice(view.name, "turn")
        raise AssertionError("a turn is less than the number of engines")

    return Policy("round_robin", choose, _first_come)


def _static(model: str) -> Policy:
    def choose(
        stage: Stage,
        prediction: Prediction,
        workflow: WorkflowView,
        models: Sequence[ModelView],
        cluster: ClusterView,
    ) -> Choice:
        """Always the same model; waits for its engine rather than take another."""
        return Choice(model if any(v.name == model for v in models) else "", "static")

    return Policy(f"static:{model}", choose, _first_come)


_POLICIES: dict[str, Callable[[Config], Policy]] = {
    "chimera": _chimera,
    "paper": _paper,
    "mlfq": _mlfq,
    "ltr": _ltr,
    "stjf": _stjf,
    "router_only": _router_only,
    "least_loaded": _least_loaded,
    "round_robin": _round_robin,
}
NAMES = (*_POLICIES, "static:MODEL")
PREDICTIVE = ("chimera", "paper", "ltr", "stjf", "router_only")  # look at predictions


def make_policy(config: Config) -> Policy:
    """The policy that the configuration names; raises `ValueError` with the names there are."""
    name = config.policy
    if name.startswith("static:") and len(name) > len("static:"):
        return _static(name.removeprefix("static:"))
    if name not in _POLICIES:
        raise ValueError(f"no policy {name!r}; there are: {', '.join(NAMES)}")
    return _POLICIES[name](config)
