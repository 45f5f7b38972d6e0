"""What the server accepts: OpenAI's requests, strictly, with a few further sampling fields.

A field that is listed here is honoured. Where only a neutral value can be honoured (`store: false`, `functions: []`), the
type says so and `WHY_NOT` explains it; any other field is an error with the nearest known name. Fields of which OpenAI
says that they do not change an answer (`user`, `metadata`, `safety_identifier`, `prompt_cache_key`) are accepted and
change nothing but whose turn it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from waypost.core.errors import nearest
from waypost.serve.api.errors import bad_request, of_validation
from waypost.serve.api.formats import ResponseFormat, StructuredOutputs
from waypost.serve.api.messages import Message
from waypost.serve.api.strict import Strict
from waypost.serve.api.tools import NamedTool, Tool

WHY_NOT = {
    "audio": "Waypost serves text only",
    "best_of": "every choice that is sampled is returned; use n",
    "function_call": "it is the older name of tool_choice; use that",
    "functions": "it is the older name of tools; use that",
    "modalities": "Waypost serves text only",
    "prediction": "predicted outputs are not served",
    "reasoning_effort": "the model decides how long it thinks; bound it with max_tokens",
    "service_tier": "there is one tier; leave it out, or say 'auto' or 'default'",
    "store": "nothing is stored; leave it out, or say false",
    "suffix": "the model completes to the right only",
    "verbosity": "the model decides how much it says; bound it with max_tokens",
    "web_search_options": "the server does not search the web",
}
"""Field -> why most of its values are refused."""

SHAPES = {
    "logprobs": "give the number of alternatives, 0 to 20, for completions; true or false for chat",
    "prompt": "give a text, a list of token ids, or a list of either",
    "stop": "give a text, or a list of at most 16 texts",
}
"""Field -> what it may be, where the types alone do not read well."""


class StreamOptions(Strict):
    """What a stream sends besides the text."""

    include_usage: bool = Field(False, description="Send one more chunk, without choices, that holds the usage.")
    include_obfuscation: Literal[False] | None = None


class _Sampled(Strict):
    """The fields that both endpoints share."""

    model: str = Field(description="The served name, as listed by /v1/models.")
    temperature: float | None = Field(None, ge=0.0, description="0 takes the likeliest token. Default 1.")
    top_p: float | None = Field(None, gt=0.0, le=1.0, description="Keep the likeliest tokens of this total probability.")
    top_k: int | None = Field(None, description="Keep this many of the likeliest tokens; 0 or -1 keeps all. (Extra.)", ge=-1)
    min_p: float | None = Field(
        None, ge=0.0, le=1.0, description="Keep tokens at least this likely, relative to the likeliest. (Extra.)"
    )
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100.0, description="1 is none. Counts the prompt too. (Extra.)")
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(
        None, description="Token id (as a string) to a number that is added to its logit."
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed and request give the same tokens, whatever runs beside it.",
    )
    stop: str | Annotated[list[str], Field(max_length=16)] | None = Field(
        None, description="End where one of these would appear; it is not returned."
    )
    stop_token_ids: list[int] | None = Field(None, description="End at one of these tokens. (Extra.)")
    min_tokens: int | None = Field(None, ge=0, description="Tokens before the answer may end. (Extra.)")
    ignore_eos: bool = Field(False, description="Go on past the end-of-text token. (Extra.)")
    n: int | None = Field(None, ge=1, le=128, description="Choices for each prompt.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(
        False, description="Also return prompt_token_ids, and each choice's token_ids and weight_versions. (Extra.)"
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the prompt, with this many alternatives a token. (Extra.)"
    )
    structured_outputs: StructuredOutputs | None = Field(None, description="What the answer must match. (Extra.)")
    deadline_s: float | None = Field(
        None, gt=0.0, description="Seconds until the request ends unfinished (504), from its arrival. (Extra.)"
    )
    priority: int = Field(
        0, ge=0, le=2**31, description="Higher numbers wait for lower ones; added to the API key's own. (Extra.)"
    )
    user: str | None = Field(None, description="Without API keys, users take turns under this name. Never changes an answer.")
    metadata: dict[str, str] | None = Field(None, description="Accepted; changes nothing.")
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(_Sampled):
    """POST /v1/completions: text goes on from a prompt as it stands."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, token ids, or a list of either; each prompt gives n choices."
    )
    max_tokens: int | None = Field(
        None, ge=0, description="Default 16, or what the context has room for; 0, with echo, only scores the prompt."
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="Log-probabilities, with this many alternatives a token.")
    echo: bool | None = Field(None, description="Begin the text, and its log-probabilities, with the prompt.")
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ChatRequest(_Sampled):
    """POST /v1/chat/completions: the messages are rendered by the checkpoint's chat template."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, description="Default: what the context has room for.")
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives a token; needs logprobs.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes nothing.")
    response_format: ResponseFormat | None = Field(None, description="text, json_object or json_schema.")
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the chat template, such as enable_thinking. (Extra.)"
    )
    tools: list[Tool] | None = Field(None, description="Functions that the model may call, if its chat template knows how.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="none: no tool is shown to the model. required, or a function: the answer is a call."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: only the first call of an answer is taken.")
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    prediction: None = None
    audio: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


R = TypeVar("R", bound=Strict)


def parse(kind: type[R], body: bytes) -> R:
    """The request that `body` holds; raises ApiError (400) naming the field that is wrong and what is allowed."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error, kind.model_fields, WHY_NOT, {**SHAPES, **kind.allowed}) from error
    if isinstance(request, _Sampled) and request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if isinstance(request, _Sampled) and request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs does not stream; leave stream out, or use echo with logprobs", "prompt_logprobs")
    if isinstance(request, _Sampled) and request.structured_outputs is not None:
        request.structured_outputs.as_grammar()
    if isinstance(request, ChatRequest):
        _check_chat(request)
    elif isinstance(request, CompletionRequest) and not request.prompt:
        raise bad_request("prompt is empty; give at least one token", "prompt")
    return request


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    for index, message in enumerate(request.messages):
        if message.content is None and not message.tool_calls:
            raise bad_request("content is missing; give a text", f"messages.{index}.content")
    _check_tools(request)
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise bad_request("give max_completion_tokens or max_tokens, not both", "max_tokens")


def _check_tools(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or ()]
    chosen = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
    twice = next((name for name in names if names.count(name) > 1), None)
    constrained = request.structured_outputs is not None or getattr(request.response_format, "type", "text") != "text"
    if twice is not None:
        raise bad_request(f"tools: two functions are named '{twice}'", "tools")
    if request.tool_choice not in (None, "none") and not names:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if chosen is not None and chosen not in names:
        raise bad_request(f"tool_choice: no function named '{chosen}'.{nearest(chosen, names)}", "tool_choice")
    if request.structured_outputs is not None and getattr(request.response_format, "type", "text") != "text":
        raise bad_request("give response_format or structured_outputs, not both", "structured_outputs")
    if names and request.tool_choice != "none":
        if constrained:
            why = "beside tools the answer cannot be bound to a format: leave one out, or say tool_choice: 'none'"
            raise bad_request(why, "response_format")
        if request.tool_choice in (None, "auto") and any(tool.function.strict for tool in request.tools or ()):
            why = "strict is certain only where a call is: say tool_choice: 'required' or name the function, or leave it out"
            raise bad_request(why, "tools")
