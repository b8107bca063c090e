"""Runs attempts on vLLM's `AsyncLLM`, in this process; vllm_openai.py has OpenAI's two forms.

vLLM is imported when the engine starts, by these two files only. Works with stock vLLM on a GPU and
with its CPU build. Nothing of vLLM is changed, and the one thing that is not public in it
(`progress`) is only read.
"""

import asyncio
import copy
import logging
import math
import os
import random
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines.backend import BackendInfo, EngineStartError, Events
from chimera_daemon.engines.lifeline import Lifeline
from chimera_daemon.engines.payload import (
    ChatBody,
    PayloadError,
    decode_body,
    encode_completion,
    encode_delta,
)
from chimera_daemon.engines.profiling import measure
from chimera_daemon.engines.rate import Rate
from chimera_daemon.engines.vllm_openai import OpenaiServing, Options, ServingError
from chimera_daemon.messages import (
    EngineChunk,
    EngineFailed,
    EngineFinished,
    EngineStats,
    ErrorCode,
    Run,
    Usage,
)

log = logging.getLogger("chimera.engine")

_NOT_INSTALLED = (
    "vLLM is not installed: pip install 'chimera-daemon[vllm]' (GPU), or on a CPU-only machine use "
    "the lock file requirements/cpu.lock"
)
# Of a CPU engine, unless configured: vLLM by itself would take most of the machine's memory.
_CPU_KV_CACHE_BYTES = 512 << 20
_WATCH_S = 0.25  # between looks whether the engine is alive
# A longer payload is tokenised on a thread: the loop has other attempts to serve meanwhile.
_TOKENISE_INLINE_BYTES = 16 << 10
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "frequency_penalty",
)


class VllmBackend:
    """See the head of this file. ``engine.args`` are the options of vLLM's server but for HTTP."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine = engine
        self._llm: Any = None
        self._vllm: _Vllm
        self._serving: OpenaiServing
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._statistics = _Statistics()
        self._rate = Rate()
        self._watcher: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    # Start and end.

    async def start(self, events: Events) -> BackendInfo:
        """Load the model, warm up and measure. Blocks the loop while vLLM loads."""
        began = time.monotonic()
        self._events = events
        self._check_path()
        self._vllm = _Vllm()
        options = Options(self._engine.name, self._engine.args)
        with _environment_kept():
            self._llm, server_args = self._load(options)
        config = self._llm.vllm_config
        self._context_tokens: int = config.model_config.max_model_len
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._sampling: dict[str, Any] = config.model_config.get_diff_sampling_param()
        self._sampling.pop("max_tokens", None)
        max_inflight: int = config.scheduler_config.max_num_seqs
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._template = options.text_template
        self._check_chat_template()
        self._tokenizer_of_thread: Any = copy.deepcopy(self._tokenizer)  # it is not thread-safe
        await self._llm.collective_rpc("chimera_follow_host", args=(os.getpid(),))
        self._serving = await OpenaiServing.build(self._llm, server_args, self._engine.model)
        loaded = time.monotonic()
        if self._engine.logprobs:
            await self._generate_random(1, 2, 2, logprobs=0)  # vLLM compiles something for them
        profile = await measure(
            self._generate_random, context_tokens=self._context_tokens, max_inflight=max_inflight
        )
        await self._llm.reset_prefix_cache()
        self._statistics.output_tokens = 0
        log.info(
            "%s: loaded in %.1f s, warm after %.1f s more; decode step %.2f ms + %.3f ms per "
            "sequence, prefill %.3f ms per token",
            self._engine.name,
            loaded - began,
            time.monotonic() - loaded,
            profile.step_s * 1e3,
            profile.step_per_seq_s * 1e3,
            profile.prefill_s_per_token * 1e3,
        )
        self._watcher = asyncio.ensure_future(self._watch())
        return BackendInfo(max_inflight, self._context_tokens, profile)

    async def close(self) -> None:
        """Cancel everything and end vLLM's process."""
        if self._watcher is not None:
            self._watcher.cancel()
        tasks, self._tasks = tuple(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)
        # Gone before the interpreter is taken apart: its destructor fails then.
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown(timeout=0.0)

    def _check_path(self) -> None:
        path = self._engine.path
        if path is None:
            raise EngineStartError(
                f"engine `{self._engine.name}`: `path` is missing; give a folder or a model id"
            )
        folder = Path(path).expanduser()
        if path.startswith(("/", ".", "~")) and not (folder / "config.json").is_file():
            raise EngineStartError(
                f"engine `{self._engine.name}`: there is no model at {path} (no config.json); "
                "`path` must be a folder in Hugging Face format or a model id"
            )

    def _load(self, options: Options) -> tuple[Any, Any]:
        """The engine, and the arguments of vLLM's server for it."""
        arguments: dict[str, Any] = {
            "model": self._engine.path,
            "scheduling_policy": "priority",
            "enable_prefix_caching": True,
            "disable_log_stats": True,  # vLLM's own log and Prometheus; ours is `_Statistics`
            "worker_extension_cls": f"{Lifeline.__module__}.{Lifeline.__qualname__}",
        }
        if self._vllm.on_cpu:
            arguments.update(_cpu_arguments(options.engine))
        arguments.update(options.engine)
        try:
            parsed = self._vllm.engine_args(**arguments)
            config = parsed.create_engine_config(self._vllm.usage_context)
        except (self._vllm.client_error, TypeError, ValueError, KeyError, OSError) as error:
            raise EngineStartError(
                f"engine `{self._engine.name}`: vLLM refuses model {self._engine.path} with `args` "
                f"{self._engine.args}: {error}"
            ) from error
        server_args = options.of_server(parsed, config, self._engine.model)
        llm = self._vllm.async_llm.from_vllm_config(
            config, disable_log_stats=True, stat_loggers=[self._statistics.factory]
        )
        return llm, server_args

    def _check_chat_template(self) -> None:
        try:
            self._tokenise(self._tokenizer, [{"role": "user", "content": "hello"}])
        except Exception as error:  # a template is a program: it may raise anything
            raise EngineStartError(
                f"engine `{self._engine.name}`: the chat template of {self._engine.path} cannot be "
                f"used; put a chat_template.jinja beside the model: {error}"
            ) from error

    async def _generate_random(
        self, sequences: int, prompt: int, output: int, logprobs: int | None = None
    ) -> None:
        """A batch whose prompts share nothing, so that the prefix cache cannot help."""

        async def one() -> None:
            tokens = random.choices(range(self._vocabulary), k=prompt)
            sampling = self._vllm.sampling_params(
                max_tokens=output,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs,
                output_kind=self._vllm.kinds.FINAL_ONLY,
            )
            name = f"warm-up-{random.getrandbits(64)}"
            async for _ in self._llm.generate({"prompt_token_ids": tokens}, sampling, name):
                pass

        await asyncio.gather(*[one() for _ in range(sequences)])

    async def _watch(self) -> None:
        """vLLM tells running requests of its death, but an idle engine dies unheard."""
        while not self._llm.errored:
            await asyncio.sleep(_WATCH_S)
        for attempt_id in tuple(self._tasks):
            self._lost(attempt_id)
        self._events.died("vLLM's engine core has died; its log says why")

    # Attempts.

    def submit(self, attempt: Run, payload: bytes) -> None:
        """Start a task; whatever happens in it ends in one event."""
        task = asyncio.ensure_future(self._attempt(attempt, payload))
        self._tasks[attempt.attempt_id] = task

    def cancel(self, attempt_id: int) -> None:
        """vLLM aborts a request whose consumer is cancelled."""
        task = self._tasks.pop(attempt_id, None)
        if task is not None:
            task.cancel()

    async def _attempt(self, attempt: Run, payload: bytes) -> None:
        attempt_id = attempt.attempt_id
        try:
            if attempt.api == "text":
                body = decode_body(payload)
                tokens = await self._prompt(body, len(payload))
                sampling = self._sampling_params(attempt, body, len(tokens))
                await self._generate(attempt, tokens, sampling)
            else:
                await self._serve(attempt, payload)
        except PayloadError as error:
            self._fail(attempt_id, "bad_request", str(error), retryable=False)
        except self._vllm.dead_error:
            self._lost(attempt_id)
        except ServingError as error:
            if self._llm.errored:
                self._lost(attempt_id)
            else:
                self._fail(attempt_id, "engine_error", str(error), retryable=True)
        except (self._vllm.client_error, ValueError) as error:
            self._fail(attempt_id, "bad_request", f"vLLM refused it: {error}", retryable=False)
        except Exception as error:
            log.exception("%s: attempt %d failed", self._engine.name, attempt_id)
            self._fail(
                attempt_id, "engine_error", f"{type(error).__name__}: {error}", retryable=True
            )
        finally:
            # Cancelled or not: the entry may belong to a later attempt of the same name by now.
            if self._tasks.get(attempt_id) is asyncio.current_task():
                del self._tasks[attempt_id]

    async def _generate(self, attempt: Run, tokens: list[int], sampling: Any) -> None:
        attempt_id = attempt.attempt_id
        offset = 0
        text = ""
        output_tokens = 0
        finish_reason = "stop"
        logprob: float | None = None  # of all tokens so far, added up
        async for output in self._llm.generate(
            {"prompt_token_ids": tokens},
            sampling,
            str(attempt_id),
            priority=attempt.priority,
        ):
            part = output.outputs[0]
            text += part.text
            output_tokens += len(part.token_ids)
            finish_reason = part.finish_reason or finish_reason
            logprob = part.cumulative_logprob
            if attempt.stream and part.text:
                self._events.emit(EngineChunk(attempt_id, offset), encode_delta(part.text))
                offset += len(part.text)
        usage = Usage(len(tokens), output_tokens)
        mean = _mean_logprob(logprob, output_tokens)
        finished = EngineFinished(attempt_id, usage, finish_reason, mean)
        self._events.emit(finished, encode_completion(text))

    async def _serve(self, attempt: Run, payload: bytes) -> None:
        attempt_id = attempt.attempt_id

        def emit(offset: int, chunk: bytes) -> None:
            self._events.emit(EngineChunk(attempt_id, offset), chunk)

        logprobs = attempt.logprobs and self._engine.logprobs
        answer = await self._serving.run(attempt, payload, logprobs=logprobs, emit=emit)
        mean = _mean_logprob(answer.logprob, answer.usage.output_tokens)
        finished = EngineFinished(attempt_id, answer.usage, answer.finish_reason, mean)
        self._events.emit(finished, answer.payload)

    async def _prompt(self, body: ChatBody, payload_bytes: int) -> list[int]:
        """Tokens of the conversation with the header of the answer."""
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        try:
            if payload_bytes <= _TOKENISE_INLINE_BYTES:
                return self._tokenise(self._tokenizer, messages)
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._tokenise, self._tokenizer_of_thread, messages
            )
        except Exception as error:  # templates raise on roles that they do not know
            raise PayloadError(f"`messages` do not fit the chat template: {error}") from error

    def _tokenise(self, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        return list(
            tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._template,
            )
        )

    def _sampling_params(self, attempt: Run, body: ChatBody, prompt_tokens: int) -> Any:
        """``max_tokens`` is cut to what the context leaves after the prompt."""
        room = self._context_tokens - prompt_tokens
        if room < 1:
            raise PayloadError(
                f"the prompt has {prompt_tokens} tokens and leaves no room for an answer in a "
                f"context of {self._context_tokens}"
            )
        given = {name: getattr(body, name) for name in _SAMPLING_FIELDS}
        settings = self._sampling | {k: v for k, v in given.items() if v is not None}
        kinds = self._vllm.kinds
        return self._vllm.sampling_params(
            **settings,
            stop=body.stops,
            ignore_eos=body.ignore_eos,
            # 0: the sampled token's own; flat: no object per token is made of them.
            logprobs=0 if attempt.logprobs and self._engine.logprobs else None,
            flat_logprobs=True,
            max_tokens=min(attempt.max_tokens, room),
            output_kind=kinds.DELTA if attempt.stream else kinds.FINAL_ONLY,
        )

    def _fail(self, attempt_id: int, code: ErrorCode, message: str, *, retryable: bool) -> None:
        self._events.emit(EngineFailed(attempt_id, code, message[:4096], retryable))

    def _lost(self, attempt_id: int) -> None:
        self._fail(attempt_id, "engine_lost", "vLLM's engine core has died", retryable=True)

    # Heartbeat.

    def stats(self) -> EngineStats:
        """As vLLM's scheduler reported it with its last step."""
        seen = self._statistics
        return EngineStats(
            running=seen.running,
            waiting=seen.waiting,
            kv_use=min(1.0, max(0.0, seen.kv_use)),
            tokens_per_s=self._rate.read(time.monotonic(), seen.output_tokens),
            output_tokens=seen.output_tokens,
        )

    def progress(self) -> dict[int, int]:
        """Read from vLLM's detokeniser: without a stream there is no output until the end."""
        states: dict[str, Any] = getattr(self._llm.output_processor, "request_states", {})
        found: dict[int, int] = {}
        for state in states.values():
            name: str = state.external_req_id
            attempt_id = int(name) if name.isdecimal() else -1
            # vLLM may still know of one that has ended.
            if attempt_id in self._tasks and state.detokenizer is not None:
                # An attempt in one of OpenAI's forms may be several of vLLM's requests.
                tokens = state.detokenizer.num_output_tokens()
                found[attempt_id] = found.get(attempt_id, 0) + tokens
        return found


class _Statistics:
    """What vLLM's scheduler says after each step."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self.kv_use = 0.0
        self.output_tokens = 0

    def factory(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """Makes vLLM's stat logger, which writes in here."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        target = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                if scheduler_stats is not None:
                    target.running = scheduler_stats.num_running_reqs
                    target.waiting = scheduler_stats.num_waiting_reqs
                    target.kv_use = scheduler_stats.kv_cache_usage
                if iteration_stats is not None:
                    target.output_tokens += iteration_stats.num_generation_tokens

            def log_engine_initialized(self) -> None: ...

        return Logger(vllm_config, engine_index)


class _Vllm:
    """The names of vLLM that are used; making one imports vLLM (some seconds)."""

    def __init__(self) -> None:
        try:
            from vllm import AsyncEngineArgs, SamplingParams
            from vllm.exceptions import VLLMClientError
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.engine.exceptions import EngineDeadError
        except ImportError as error:
            if error.name == "vllm":
                raise EngineStartError(_NOT_INSTALLED) from error
            raise EngineStartError(f"vLLM is installed but cannot be imported: {error}") from error
        self.engine_args: Any = AsyncEngineArgs
        self.async_llm: Any = AsyncLLM
        self.sampling_params: Any = SamplingParams
        self.kinds: Any = RequestOutputKind
        self.usage_context: Any = UsageContext.ENGINE_CONTEXT
        self.client_error: type[Exception] = VLLMClientError
        self.dead_error: type[Exception] = EngineDeadError
        self.on_cpu: bool = current_platform.is_cpu()


def _mean_logprob(total: float | None, tokens: int) -> float | None:
    """Per token, as messages carry it: None where it is unknown or not finite."""
    if total is None or tokens < 1 or not math.isfinite(total):
        return None
    return min(0.0, max(total / tokens, -1e6))


def _cpu_arguments(configured: dict[str, Any]) -> dict[str, Any]:
    """Defaults where there is no GPU; sets what vLLM and OpenMP read from the environment."""
    arguments: dict[str, Any] = {}
    if "gpu_memory_utilization" not in configured and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        arguments["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    parallel = ("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend")
    if not any(name in configured for name in parallel):
        # One process with scheduler and model instead of two: half the start-up time, a third less
        # memory, and a step of a small model takes a third of the time. vLLM would make it two for
        # the binding of OpenMP threads, which the host's own affinity does as well.
        arguments["distributed_executor_backend"] = "uni"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # As vLLM does: one core is left to the process that streams.
        threads = max(1, len(os.sched_getaffinity(0)) - 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return arguments


@contextmanager
def _environment_kept() -> Generator[None]:
    """vLLM's child inherits what is set inside; this process is left as it was."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
