"""From a request to work for the engine: prompts rendered and encoded, limits checked, every default filled in.

Runs on a thread of its own kind, beside the event loop and the engine; touches nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from waypost import __version__
from waypost.core.errors import CapacityError, ConfigError
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.access import Caller
from waypost.serve.api.chat_form import ChatForm
from waypost.serve.api.errors import bad_request, context_exceeded
from waypost.serve.api.formats import format_grammar
from waypost.serve.api.logprobs import TokenBytes
from waypost.serve.api.protocol import ChatRequest, CompletionRequest
from waypost.serve.api.replies import CompletionForm, Form, Head, Prompt
from waypost.serve.api.tool_readers import READERS, Style
from waypost.serve.api.tools import NamedTool, Tool, calls_grammar, shows_calls, style_of
from waypost.serve.engine import Engine
from waypost.serve.prepare import Prepared
from waypost.serve.request import Request
from waypost.serve.sampling import Grammar, Sampling

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for /v1/completions."""


@dataclass(frozen=True)
class Work:
    """What the engine is to run. Choice c of prompt p has the index p * n + c."""

    prompts: Sequence[Prompt]
    requests: Sequence[Prepared]
    n: int

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def draws(self) -> bool:
        """Whether tokens are asked for: not where prompts are pooled or scored alone."""
        return any(request.max_tokens for request in self.requests)

    def requests_of(self, user: str, caller: Caller, priority: int, deadline_s: float | None) -> list[Prepared]:
        """The requests, with who asks, how urgently, and the seconds that are left to them."""
        rank = caller.priority + priority
        return [
            replace(r, request=replace(r.request, user=user, weight=caller.weight, priority=rank, deadline_s=deadline_s))
            for r in self.requests
        ]


@dataclass(frozen=True)
class Job(Work):
    """Work, and how the answer is written."""

    form: Form


def num_choices(request: CompletionRequest | ChatRequest) -> int:
    """Choices that a request asks for, before anything is encoded."""
    return (request.n or 1) * (len(each(request.prompt)) if isinstance(request, CompletionRequest) else 1)


def head_of(engine: Engine, model_name: str, reply_id: str, created: int) -> Head:
    """What every chunk of one answer repeats; `created` in seconds since 1970."""
    dtype = str(engine.dtype).removeprefix("torch.")
    backend = f"waypost-{__version__}-{engine.model.ops.name}-{dtype}"
    return Head(reply_id, created, model_name, backend, engine.weight_version)


def completion_job(
    request: CompletionRequest, engine: Engine, tokenizer: Tokenizer, limit: int | None, adapter: str | None = None
) -> Job:
    """Raises ApiError (400) for what the model, its context or its cache cannot honour. `limit`: of new tokens."""
    scored, alternatives = bool(request.echo) and request.logprobs is not None, _alternatives(request)
    prompts = [_prompt(given, tokenizer, bool(request.echo), scored) for given in each(request.prompt)]
    requests = []
    for prompt in prompts:
        most = _max_tokens(engine, prompt, request.max_tokens, "prompt", COMPLETION_TOKENS, limit)
        sampling = _sampling(request, most, request.logprobs, _grammar(request), alternatives)
        requests.append(_prepare(engine, prompt, sampling, adapter))
    form = CompletionForm(
        prompts, request.n or 1, TokenBytes(tokenizer.token_bytes), request.logprobs, request.return_token_ids,
        echo_scores=scored, prompt_logprobs=request.prompt_logprobs,
    )  # fmt: skip
    return Job(prompts, requests, request.n or 1, form)


def chat_job(request: ChatRequest, engine: Engine, tokenizer: Tokenizer, limit: int | None, adapter: str | None = None) -> Job:
    """As `completion_job`; what the chat template refuses is an ApiError (400) too."""
    tools = (request.tools or []) if request.tool_choice != "none" else []
    style = _style(tokenizer) if tools else None
    shown = [tool.for_template() for tool in tools] or None
    if any(message.tool_calls for message in request.messages) and not shows_calls(tokenizer):
        refused = "this checkpoint's chat template does not show calls of earlier turns; leave tool_calls out of the messages"
        raise bad_request(refused, "messages", "tools_not_supported")
    try:
        messages = [m.for_template() for m in request.messages]
        ids = tokenizer.chat(messages, tools=shown, **(request.chat_template_kwargs or {}))
    except (ConfigError, TypeError) as error:  # TypeError: a variable named as one of chat's own arguments
        raise bad_request(str(error), "messages", "template_error") from error
    prompt = Prompt(ids)
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    most = _max_tokens(engine, prompt, asked, "messages", None, limit)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    grammar = _grammar(request) if style is None else _calls(request, tools, style)
    prepared = _prepare(engine, prompt, _sampling(request, most, logprobs, grammar, request.prompt_logprobs), adapter)
    reader = READERS[style] if style is not None else None
    one_call = request.parallel_tool_calls is False
    form = ChatForm(
        prompt, TokenBytes(tokenizer.token_bytes), logprobs, request.return_token_ids, reader, one_call, request.prompt_logprobs
    )
    return Job([prompt], [prepared], request.n or 1, form)


def each(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a request, one by one."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def _alternatives(request: CompletionRequest) -> int | None:
    """For each token of the prompt; None: they are not scored."""
    asked = (request.prompt_logprobs, request.logprobs if request.echo else None)
    most = max((k for k in asked if k is not None), default=None)
    if request.max_tokens != 0 or most is not None:
        return most
    if not request.echo:
        raise bad_request("max_tokens=0 answers nothing; it needs echo, or prompt_logprobs", "max_tokens", "invalid_value")
    return 0


def _prompt(given: str | list[int], tokenizer: Tokenizer, echo: bool, scored: bool) -> Prompt:
    ids = tokenizer.encode(given, special=True) if isinstance(given, str) else given
    if not ids:
        raise bad_request("a prompt is empty; give at least one token", "prompt")
    if not echo:
        return Prompt(ids)
    if isinstance(given, str) and not scored:
        return Prompt(ids, given)
    return Prompt(ids, tokenizer.decode(ids, skip_special=False))  # scored tokens' own text: offsets count its characters


def _max_tokens(
    engine: Engine, prompt: Prompt, asked: int | None, param: str, default: int | None, limit: int | None
) -> int | None:
    """Tokens to sample at most, or None for all that there is room for; raises where what was asked cannot fit."""
    if limit is not None and (asked or 0) > limit:
        raise bad_request(f"max_tokens={asked}: this server gives at most {limit} new tokens", "max_tokens", "too_many_tokens")
    default = min((most for most in (default, limit) if most is not None), default=None)
    length = len(prompt.token_ids)
    room = engine.max_seq_len - length
    if room < (1 if asked is None else asked):
        raise context_exceeded(engine.max_seq_len, length, asked, param)
    return asked if asked is not None or default is None else min(default, room)


def _grammar(request: CompletionRequest | ChatRequest) -> Grammar | None:
    if request.structured_outputs is not None:
        return request.structured_outputs.as_grammar()
    return format_grammar(request.response_format) if isinstance(request, ChatRequest) else None


def _style(tokenizer: Tokenizer) -> Style:
    try:
        return style_of(tokenizer)
    except ConfigError as error:
        raise bad_request(str(error), "tools", "tools_not_supported") from error


def _calls(request: ChatRequest, tools: Sequence[Tool], style: Style) -> Grammar | None:
    """The grammar of an answer that must be a call; None where it may be anything."""
    if isinstance(request.tool_choice, NamedTool):
        chosen = request.tool_choice.function.name
        return calls_grammar([tool for tool in tools if tool.function.name == chosen], style, one=True)
    if request.tool_choice == "required":
        return calls_grammar(tools, style, one=request.parallel_tool_calls is False)
    return None


def _sampling(
    request: CompletionRequest | ChatRequest, max_tokens: int | None, logprobs: int | None, grammar: Grammar | None,
    prompt_logprobs: int | None,
) -> Sampling:  # fmt: skip
    fields: dict[str, Any] = {
        "temperature": request.temperature,
        "top_k": request.top_k if request.top_k is None or request.top_k > 0 else None,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": None if request.logit_bias is None else _biases(request.logit_bias),
        "seed": request.seed,
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
        "n": request.n,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "grammar": grammar,
    }
    try:
        return Sampling(**{name: value for name, value in fields.items() if value is not None})
    except ConfigError as error:
        message = str(error).removeprefix("Sampling.")
        raise bad_request(message, message.split("=")[0], "invalid_value") from error


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError as error:
        raise bad_request("logit_bias: its keys are token ids, written as strings", "logit_bias") from error


def _prepare(engine: Engine, prompt: Prompt, sampling: Sampling, adapter: str | None) -> Prepared:
    try:
        return engine.prepare(Request(prompt.token_ids, sampling, adapter=adapter))
    except ConfigError as error:
        raise bad_request(str(error)) from error
    except CapacityError as error:
        raise bad_request(str(error), "max_tokens", "capacity_exceeded") from error
