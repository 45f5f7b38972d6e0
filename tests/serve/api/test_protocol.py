"""Requests as they are read: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypost.serve.api.errors import ApiError
from waypost.serve.api.protocol import SHAPES, WHY_NOT, ChatRequest, CompletionRequest, parse

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look"}}
JSON_OBJECT = {"type": "json_object"}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "look", "strict": True}}


def named(function: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function}}


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}


def read(body: dict[str, Any]) -> ChatRequest | CompletionRequest:
    kind = ChatRequest if "messages" in body else CompletionRequest
    return parse(kind, json.dumps(body).encode())


def refusal(body: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value.error


def test_every_reason_belongs_to_a_field() -> None:
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert {*WHY_NOT, *SHAPES} <= fields
    assert not {*WHY_NOT} & {*SHAPES}


NEUTRAL: dict[str, Any] = {
    "audio": None, "function_call": "none", "functions": [], "modalities": ["text"], "prediction": None,
    "reasoning_effort": None, "service_tier": "auto", "store": False, "verbosity": None,
    "web_search_options": None, "best_of": 1, "suffix": "",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "audio": {"voice": "x"}, "function_call": "auto", "functions": [{}], "modalities": ["audio"], "prediction": {},
    "reasoning_effort": "low", "service_tier": "flex", "store": True, "verbosity": "low",
    "web_search_options": {}, "best_of": 3, "suffix": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(WHY_NOT))
def test_what_cannot_be_honoured_is_refused_with_the_reason_and_its_neutral_value_is_not(field: str) -> None:
    base = CHAT if field in ChatRequest.model_fields else TEXT
    assert read({**base, field: NEUTRAL[field]}).model_dump()[field] == NEUTRAL[field]
    error = refusal({**base, field: REFUSED[field]})
    assert WHY_NOT[field] in error["message"]
    assert error["param"].split(".")[0] == field


@pytest.mark.parametrize(
    "field", ["user", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "metadata", "store", "stream"]
)
def test_harmless_fields_are_accepted(field: str) -> None:
    values = {"metadata": {"a": "b"}, "store": False, "stream": False, "parallel_tool_calls": True}
    read({**CHAT, field: values.get(field, "x")})


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({**TEXT, "max_token": 3}, "max_token", "Did you mean 'max_tokens'?"),
        ({**TEXT, "": 3}, "", "Unknown field ''"),
        ({**TEXT, "two words": 3}, "two words", "Unknown field"),
        ({"prompt": "x"}, "model", "missing"),
        ({"model": "m", "prompt": 5}, "prompt", "a list of token ids"),
        ({"model": "m", "prompt": ["a", 5]}, "prompt.1", "a list of token ids"),
        ({"model": "m", "prompt": ""}, "prompt", "empty"),
        ({"model": "m", "prompt": []}, "prompt", "empty"),
        ({**TEXT, "temperature": "0.5"}, "temperature", "valid number"),
        ({**TEXT, "max_tokens": 1.5}, "max_tokens", "integer"),
        ({**TEXT, "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({**TEXT, "n": True}, "n", "valid integer"),
        ({**TEXT, "logprobs": True}, "logprobs", "number of alternatives"),
        ({**TEXT, "stop": [""] * 17}, "stop", "at most 16"),
        ({**TEXT, "seed": 2**63}, "seed", "less than"),
        ({**TEXT, "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({**TEXT, "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "Unknown field"),
        ({**TEXT, "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({**CHAT, "logprobs": 3}, "logprobs", "true or false"),
        ({**CHAT, "tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({**CHAT, "tools": [TOOL, TOOL]}, "tools", "two functions are named 'look'"),
        ({**CHAT, "tools": [{**TOOL, "type": "x"}]}, "tools.0.type", "function"),
        ({**CHAT, "tools": [STRICT]}, "tools", "strict is certain only where"),
        ({**CHAT, "tools": [TOOL], "tool_choice": named("lock")}, "tool_choice", "Did you mean 'look'?"),
        ({**CHAT, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "beside tools"),
        ({**CHAT, "response_format": {"type": "json"}}, "response_format", "json_object"),
        ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({**CHAT, "response_format": {"type": "text", "more": 1}}, "response_format.more", "Unknown field"),
        (
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
            "pattern",
        ),
        ({**TEXT, "structured_outputs": {}}, "structured_outputs", "give one of"),
        ({**TEXT, "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one of"),
        ({**TEXT, "structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "empty text"),
        ({**TEXT, "structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "Unknown field"),
        ({**CHAT, "structured_outputs": {"regex": "a"}, "response_format": JSON_OBJECT}, "structured_outputs", "both"),
        ({**CHAT, "messages": []}, "messages", "at least 1 item"),
        ({**CHAT, "messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({**CHAT, "messages": [{"content": "x"}]}, "messages.0.role", "missing"),
        (
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({**CHAT, "messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "Unknown field"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(body: dict[str, Any], param: str, says: str) -> None:
    error = refusal(body)
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_must_be_finite(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, f'{{"model": "m", "prompt": "x", "temperature": {text}}}'.encode())
    assert caught.value.error["param"] == "temperature"


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_no_bytes_are_a_request_by_accident(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        with pytest.raises(ApiError):
            parse(kind, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(ChatRequest.model_fields)), JSON)
def test_any_value_of_any_field_is_read_or_refused_by_name(field: str, value: Any) -> None:
    with suppress_refusal() as refused:
        read({**CHAT, field: value})
    for error in refused:
        assert error.status == 400
        assert error.error["param"] is not None
        assert error.error["message"]


@contextmanager
def suppress_refusal() -> Iterator[list[ApiError]]:
    """Yields a list that holds the refusal afterwards, if there was one; any other exception goes through."""
    refused: list[ApiError] = []
    try:
        yield refused
    except ApiError as error:
        refused.append(error)
