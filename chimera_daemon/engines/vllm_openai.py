"""OpenAI's two forms on a loaded vLLM: the handlers of its own server, fed without HTTP.

All that vLLM's server accepts passes through, and its answers are vLLM's. Only this file knows
vLLM's serving layer (imports in functions); attempts and their events are the business of vllm.py.
"""

import asyncio
import dataclasses
import difflib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import msgspec

from chimera_daemon.engines.backend import EngineStartError
from chimera_daemon.engines.payload import PayloadError, encode_streamed
from chimera_daemon.messages import Run, Usage

log = logging.getLogger("chimera.engine")

_MAX_REPORTED_ERRORS = 4  # of one body
_DATA, _END = "data: ", "\n\n"  # around each chunk of vLLM's streams
_DONE = "[DONE]"
_RETRYABLE = (408, 429)  # of the statuses that blame the request
_ERROR = '{"error":'  # how an object in a stream begins that is no chunk

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class ServingError(RuntimeError):
    """vLLM failed on an attempt through no fault of the request."""


class Options:
    """``args`` of an engine, divided into vLLM's engine arguments and those of its server.

    Raises `EngineStartError` that names an argument which is neither or cannot be used.
    """

    def __init__(self, engine: str, args: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs

        self._name = engine
        self._front_type: Any = BaseFrontendArgs
        of_engine = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        of_server = {field.name for field in dataclasses.fields(self._front_type)}
        for name in args:
            if name not in of_engine | of_server:
                near = difflib.get_close_matches(name.replace("-", "_"), of_engine | of_server, 1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise EngineStartError(
                    f"engine `{engine}`: vLLM knows no argument `{name}` in `args`{hint}"
                )
        self.engine = {name: value for name, value in args.items() if name in of_engine}
        server = {name: value for name, value in args.items() if name not in of_engine}
        try:
            front = self._front_type(**server)
        except (TypeError, ValueError) as error:  # pydantic's is a ValueError
            raise self._refusal(error) from error
        self._server = {name: getattr(front, name) for name in of_server}

    @property
    def text_template(self) -> dict[str, Any]:
        """What the chat template of our own text form is to be given."""
        from vllm.renderers.chat_utils import load_chat_template

        given: dict[str, Any] = dict(self._server["default_chat_template_kwargs"] or {})
        template = load_chat_template(self._server["chat_template"])
        return given if template is None else given | {"chat_template": template}

    def of_server(self, engine_args: Any, vllm_config: Any, model: str) -> Any:
        """All arguments, as vLLM's command line would have given them to its server.

        Checked as there before a model is loaded: plugins, names of parsers, the template.
        """
        from argparse import Namespace

        from vllm.entrypoints.launchers import launcher
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
        from vllm.exceptions import VLLMError
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        args: Any = Namespace(**(self._server | vars(engine_args)))
        args.structured_outputs_config = vllm_config.structured_outputs_config
        args.served_model_name = [model]
        untyped: Any = launcher
        try:
            if args.tool_parser_plugin:
                ToolParserManager.import_tool_parser(args.tool_parser_plugin)
            if args.reasoning_parser_plugin:
                ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
            validate_parsed_serve_args(args)
            untyped.validate_api_server_args(args)
        except (VLLMError, TypeError, ValueError, KeyError) as error:
            raise self._refusal(error) from error
        return args

    def _refusal(self, error: Exception) -> EngineStartError:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        return EngineStartError(f"engine `{self._name}`: vLLM refuses `args`: {message}")


class Answer(msgspec.Struct, frozen=True):
    """What an attempt came to."""

    payload: bytes
    usage: Usage
    finish_reason: str
    logprob: float | None  # of all tokens, added up


class OpenaiServing:
    """The handlers. They see the engine through a wrapper that knows whose request it is."""

    def __init__(self, state: Any, model: str) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.v1.engine.exceptions import EngineDeadError

        self._chat: Any = state.openai_serving_chat
        self._completion: Any = state.openai_serving_completion
        self._adapters: Any = state.openai_serving_models.lora_requests
        self._chat_request: Any = ChatCompletionRequest
        self._completion_request: Any = CompletionRequest
        self._error_type: Any = ErrorResponse
        self._dead_error: type[Exception] = EngineDeadError
        self._model = model

    @classmethod
    async def build(cls, llm: Any, args: Any, model: str) -> "OpenaiServing":
        """``args`` from `Options.of_server`. Costs a third of a second and some 15 MB of memory."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.exceptions import VLLMError

        state: Any = SimpleNamespace()
        engine: Any = _Engine(llm)
        try:
            await init_app_state(engine, state, args, await llm.get_supported_tasks())
        except (VLLMError, TypeError, ValueError, KeyError, OSError) as error:
            raise EngineStartError(
                f"vLLM's server cannot be set up for `{model}`: {error}"
            ) from error
        return cls(state, model)

    async def run(
        self, attempt: Run, payload: bytes, *, logprobs: bool, emit: Callable[[int, bytes], None]
    ) -> Answer:
        """Run one attempt to its end; ``emit`` gets the number of each chunk and the chunk.

        Raises `PayloadError` if the request is at fault, `ServingError` if vLLM is, and vLLM's own
        error if the engine is dead.
        """
        body = self._body(attempt, payload)
        watch = _Watch(attempt, logprobs)
        _current.set(watch)
        # What the handlers know of HTTP: headers that may say more, and where they note the usage.
        http = SimpleNamespace(headers={}, state=SimpleNamespace())
        if attempt.api == "chat":
            request = _validated(self._chat_request, body)
            result = await self._call(self._chat.create_chat_completion(request, http))
        else:
            request = _validated(self._completion_request, body)
            result = await self._call(self._completion.create_completion(request, http))
        if attempt.stream:
            answer = encode_streamed(await _relay(result, emit))
        else:
            answer = result.model_dump_json().encode()
        used = http.state.request_metadata.final_usage_info
        usage = Usage(used.prompt_tokens, used.completion_tokens or 0)
        # Beams are extended a token at a time, so that what is seen of them does not add up.
        logprob = None if body.get("use_beam_search") else watch.logprob
        return Answer(answer, usage, watch.finish_reason, logprob)

    def _body(self, attempt: Run, payload: bytes) -> dict[str, Any]:
        try:
            body = _decode(payload)
        except msgspec.DecodeError as error:
            raise PayloadError(f"payload is not a JSON object: {error}") from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise PayloadError(f"payload is not JSON in UTF-8: {error}") from error
        for name, value in body.items():
            # vLLM's engine core cannot be told of them, and would keep what it could not start.
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                raise PayloadError(f"`{name}` does not fit into 64 bits")
        # The scheduler has chosen, whatever name is in there; that of an adapter stays.
        model = body.get("model")
        if not isinstance(model, str) or model not in self._adapters:
            body["model"] = self._model
        body["stream"] = attempt.stream
        return body

    async def _call(self, handler: Awaitable[Any]) -> Any:
        try:
            result = await handler
        except self._dead_error:
            raise
        except Exception as error:
            result = self._chat.create_error_response(error)
            if result.error.code >= 500:
                log.exception("vLLM's server failed on a request")
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # the handlers turn it into an answer
        if isinstance(result, self._error_type):
            _fail(result.error.code, result.error.message)
        return result


class _Watch:
    """Whose request it is, and what is seen of its outputs."""

    def __init__(self, attempt: Run, logprobs: bool) -> None:
        self.request_id = str(attempt.attempt_id)
        self.priority = attempt.priority
        self.finish_reason = "stop"
        self._logprobs = logprobs
        self._cumulative: dict[tuple[int, int], float] = {}  # by prompt and choice
        self._prompts = 0

    @property
    def logprob(self) -> float | None:
        """Of all tokens of all choices so far."""
        return sum(self._cumulative.values()) if self._cumulative else None

    async def outputs(self, llm: Any, *request: Any, **options: Any) -> AsyncGenerator[Any]:
        prompt, self._prompts = self._prompts, self._prompts + 1
        async with aclosing(llm.generate(*request, **options)) as outputs:
            async for output in outputs:
                for part in output.outputs:
                    # Of several choices the one that was cut short counts.
                    if part.finish_reason is not None and self.finish_reason != "length":
                        self.finish_reason = part.finish_reason
                    if part.cumulative_logprob is not None:
                        self._cumulative[prompt, part.index] = part.cumulative_logprob
                yield output

    def adjust(self, sampling: Any) -> None:
        """Ask for the sampled tokens' own; the handlers do not show what the body did not ask."""
        if self._logprobs and sampling.logprobs is None:
            sampling.logprobs = 0
            sampling.flat_logprobs = True


_current: ContextVar[_Watch] = ContextVar("_current")


class _Engine:
    """vLLM's engine as its handlers see it: each request runs as part of the current attempt."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any]:
        watch = _current.get()
        watch.adjust(sampling_params)
        options["priority"] = watch.priority
        return watch.outputs(self._llm, prompt, sampling_params, watch.request_id, **options)


async def _relay(stream: Any, emit: Callable[[int, bytes], None]) -> int:
    """Pass a stream's chunks on; returns their number."""
    chunks = 0
    async with aclosing(stream):
        async for event in stream:
            data: str = event[len(_DATA) : -len(_END)]
            if data.startswith(_ERROR):
                error = _decode(data)["error"]
                _fail(error["code"], error["message"])
            if data != _DONE:
                emit(chunks, data.encode())
                chunks += 1
    return chunks


def _fail(status: int, message: str) -> None:
    if 400 <= status < 500 and status not in _RETRYABLE:
        raise PayloadError(f"vLLM refused it: {message}")
    raise ServingError(message or "vLLM failed without a reason; its log may have one")


def _validated(request_type: Any, body: dict[str, Any]) -> Any:
    from pydantic import ValidationError
    from vllm.exceptions import VLLMClientError

    try:
        return request_type.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        shown = [
            f"`{'.'.join(map(str, e['loc'])) or 'body'}`: {e['msg']}"
            for e in found[:_MAX_REPORTED_ERRORS]
        ]
        if len(found) > len(shown):
            shown.append(f"and {len(found) - len(shown)} more")
        raise PayloadError(f"vLLM refused it: {'; '.join(shown)}") from error
    except VLLMClientError as error:
        raise PayloadError(f"vLLM refused it: {error}") from error
    except Exception as error:  # its validators trip over some values of a wrong type
        raise PayloadError(
            f"vLLM cannot read it; a field is of a wrong type: {type(error).__name__}: {error}"
        ) from error
