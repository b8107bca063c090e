"""What an echo engine reads and answers in OpenAI's two forms; knows no clock and no events.

Bodies are read for what shapes the answer, and any other field passes: this stands in for servers
that each know others. The answers' words need no escaping, so that the bytes are put together here.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from chimera_daemon.engines.payload import PayloadError, encode_streamed
from chimera_daemon.messages import Api, Usage

CHARACTERS_PER_TOKEN = 4  # of a prompt; output is counted in words
MAX_CHOICES = 1024  # of one answer

Positive = Annotated[int, Meta(ge=1)]
ChoiceCount = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]


class _StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class _Part(Struct, frozen=True):
    type: str
    text: str = ""  # of parts that have any


class _Message(Struct, frozen=True):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | tuple[_Part, ...] | None = None


class _Function(Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]


class _Tool(Struct, frozen=True):
    function: _Function


class _ChatBody(Struct, frozen=True):
    messages: Annotated[tuple[_Message, ...], Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: ChoiceCount | None = None
    stream_options: _StreamOptions | None = None
    tools: tuple[_Tool, ...] | None = None
    tool_choice: str | _Tool | None = None


class _CompletionsBody(Struct, frozen=True):
    prompt: str | Annotated[tuple[str | int | tuple[int, ...], ...], Meta(min_length=1)]
    max_tokens: Positive | None = 16  # OpenAI's default for this form
    n: ChoiceCount | None = None
    stream_options: _StreamOptions | None = None


_decode_chat = msgspec.json.Decoder(_ChatBody).decode
_decode_completions = msgspec.json.Decoder(_CompletionsBody).decode
_encode = msgspec.json.Encoder().encode


class Reply:
    """One answer to be: what its body asks for, and its bytes. All its choices say the same."""

    __slots__ = (
        *("prompt_tokens", "longest_prompt", "max_tokens", "choices", "tool"),
        *("_chat", "_include_usage", "_head", "_chunks"),
    )

    def __init__(
        self,
        prompt_tokens: list[int],
        body: _ChatBody | _CompletionsBody,
        head: str,
    ) -> None:
        self.prompt_tokens = sum(prompt_tokens)
        self.longest_prompt = max(prompt_tokens)
        self.max_tokens = body.max_tokens
        self.choices = len(prompt_tokens) * (body.n or 1)
        self.tool: str | None = None  # the name, in quotes, of the function to call
        options = body.stream_options
        self._include_usage = options is not None and options.include_usage
        self._chat = isinstance(body, _ChatBody)
        self._head = head
        self._chunks = 0  # made so far
        if isinstance(body, _ChatBody):
            if body.max_completion_tokens is not None:
                self.max_tokens = body.max_completion_tokens
            name = _tool_to_call(body)
            self.tool = None if name is None else _encode(name).decode()
        if self.choices > MAX_CHOICES:
            raise PayloadError(
                f"`prompt` and `n` ask for {self.choices} choices; at most {MAX_CHOICES} are given"
            )

    @property
    def chunks(self) -> int:
        """How many have been made: the offset of the next one."""
        return self._chunks

    def chunk(self, choice: int, text: str, finish_reason: str | None) -> bytes:
        """The next words of a choice; ``finish_reason`` with the last of them."""
        first = self._chunks < self.choices
        self._chunks += 1
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        kind = "text_completion"
        delta = f'"text":"{text}"'
        if self._chat:
            kind = "chat.completion.chunk"
            role = '"role":"assistant",' if first else ""
            delta = f'"delta":{{{role}{self._said(text, index=True)}}}'
        return (
            f'{{"object":"{kind}",{self._head},"choices":[{{"index":{choice},{delta},'
            f'"logprobs":null,"finish_reason":{reason}}}]}}'
        ).encode()

    def usage_chunk(self, usage: Usage) -> bytes | None:
        """The last chunk, for those who asked for it."""
        if not self._include_usage:
            return None
        self._chunks += 1
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return f'{{"object":"{kind}",{self._head},"choices":[],{_usage(usage)}}}'.encode()

    def answer(self, text: str, finish_reason: str, usage: Usage) -> bytes:
        """The whole response object."""
        kind = "text_completion"
        said = f'"text":"{text}"'
        if self._chat:
            kind = "chat.completion"
            said = f'"message":{{"role":"assistant",{self._said(text, index=False)}}}'
        rest = f'{said},"logprobs":null,"finish_reason":"{finish_reason}"}}'
        choices = ",".join([f'{{"index":{i},{rest}' for i in range(self.choices)])
        return (
            f'{{"object":"{kind}",{self._head},"choices":[{choices}],{_usage(usage)}}}'
        ).encode()

    def end_of_stream(self) -> bytes:
        """Payload of the answer to a stream."""
        return encode_streamed(self._chunks)

    def _said(self, text: str, *, index: bool) -> str:
        if self.tool is None:
            return f'"content":"{text}"'
        number = '"index":0,' if index else ""
        return (
            f'"content":null,"tool_calls":[{{{number}"id":"call_0","type":"function",'
            f'"function":{{"name":{self.tool},"arguments":"{{}}"}}}}]'
        )


def read(api: Api, payload: bytes, model: str, digest: int) -> Reply:
    """Decode and validate. ``model`` is a JSON string, ``digest`` makes the answer's id.

    Raises `PayloadError`, which names the field.
    """
    body: _ChatBody | _CompletionsBody
    try:
        body = _decode_chat(payload) if api == "chat" else _decode_completions(payload)
    except msgspec.DecodeError as error:  # ValidationError included: its message has the path
        raise PayloadError(f"payload is not a usable JSON body of `{api}`: {error}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise PayloadError(f"payload is not JSON in UTF-8: {error}") from error
    if isinstance(body, _ChatBody):
        tokens = [sum([_characters(m) for m in body.messages]) // CHARACTERS_PER_TOKEN + 1]
        prefix = "chatcmpl"
    else:
        tokens = _prompt_tokens(body.prompt)
        prefix = "cmpl"
    return Reply(tokens, body, f'"id":"{prefix}-{digest:08x}","created":0,"model":{model}')


def quoted(name: str) -> str:
    """As a JSON string."""
    return _encode(name).decode()


def _characters(message: _Message) -> int:
    content = message.content
    if content is None:
        return 0
    if isinstance(content, str):
        return len(content)
    return sum([len(part.text) for part in content])


def _prompt_tokens(prompt: str | tuple[str | int | tuple[int, ...], ...]) -> list[int]:
    """Of each prompt; a list of numbers is one."""
    if isinstance(prompt, str):
        return [len(prompt) // CHARACTERS_PER_TOKEN + 1]
    if isinstance(prompt[0], int) and all(isinstance(part, int) for part in prompt):
        return [len(prompt)]
    tokens: list[int] = []
    for part in prompt:
        if isinstance(part, int) or type(part) is not type(prompt[0]):
            raise PayloadError("`prompt` must be a text, token ids, or a list of only one of these")
        per_token = CHARACTERS_PER_TOKEN if isinstance(part, str) else 1
        tokens.append(len(part) // per_token + 1)
    return tokens


def _tool_to_call(body: _ChatBody) -> str | None:
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools or ()]
    if isinstance(choice, _Tool):
        if choice.function.name not in names:
            raise PayloadError(
                f"`tool_choice` names `{choice.function.name}`, which is none of `tools`"
            )
        return choice.function.name
    if choice == "required":
        if not names:
            raise PayloadError('`tool_choice` is "required", so that `tools` must not be empty')
        return names[0]
    if choice not in (None, "auto", "none"):
        raise PayloadError(f'`tool_choice` is "{choice}"; write auto, none, required or a tool')
    return None


def _usage(usage: Usage) -> str:
    prompt, output = usage.prompt_tokens, usage.output_tokens
    return (
        f'"usage":{{"prompt_tokens":{prompt},"completion_tokens":{output},'
        f'"total_tokens":{prompt + output}}}'
    )
