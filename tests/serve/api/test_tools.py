"""Tool calls and bound formats: read back from any pieces, certain where they are demanded, in the client's own types."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_cases import MODEL, Live, make_live
from hypothesis import given
from hypothesis import strategies as st

from waypost.core.errors import ConfigError
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.tool_readers import PYTHON_TAG, READERS, Style
from waypost.serve.api.tools import style_of
from waypost.testing.tiny import tiny_assets, tiny_checkpoint

HI: Any = [{"role": "user", "content": "Hi"}]
TEMPLATES: dict[Style, str] = {
    "hermes": """{%- if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}<tool_call>{"name", "arguments"}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments.place }}{% endfor %}<|im_end|>
{%- endfor %}<|im_start|>""",
    "llama3": """{%- if tools %}Answer with {"name": function name, "parameters": arguments}{{ tools | length }}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}<|im_start|>""",
}
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["here", "there"]}, "far": {"type": "boolean"}},
            "required": ["place", "far"],
            "additionalProperties": False,
        },
    },
}
WAIT = {"type": "function", "function": {"name": "wait"}}


def make_checkpoint(folder: Path, style: Style) -> str:
    path = tiny_checkpoint(folder / MODEL)
    (path / "chat_template.jinja").write_text(TEMPLATES[style])
    (path / "waypost.json").unlink()  # as a plain folder: the template is not what the manifest says
    return str(path)


@pytest.fixture(scope="module", params=["hermes", "llama3"])
def tooled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with make_live(make_checkpoint(tmp_path_factory.mktemp("tools"), request.param)) as live:
        yield live


# Reading


Call = tuple[str, str]


def read(style: Style, texts: list[str]) -> tuple[str, list[Call]]:
    """-> the text shown, and (name, arguments) of every call, put together from what came piece by piece."""
    reader = READERS[style]()
    shown, calls = "", []
    for text, found in [*map(reader.push, texts), reader.flush()]:
        shown += text
        for piece in found:
            if piece.name is not None:
                calls.append((piece.name, ""))
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return shown, calls


ONE, TWO = ("look", '{"place": "here"}'), ("wait", "{}")
TIGHT = ("look", '{"place":"here"}')
NESTED = '{"a": "}\\"</tool_call>{", "b": [{"c": {}}, "]"]}'
CASES: list[tuple[Style, str, str, list[Call]]] = [
    ("hermes", "plain text, 1 < 2\n", "plain text, 1 < 2\n", []),
    ("hermes", '<tool_call>\n{"name": "look", "arguments": {"place": "here"}}\n</tool_call>', "", [ONE]),
    ("hermes", 'Let me see.\n\n<tool_call>{"name":"look","arguments":{"place":"here"}}</tool_call>\n', "Let me see.", [TIGHT]),
    (
        "hermes",
        '<tool_call>{"name": "look", "arguments": {"place": "here"}}</tool_call>\n'
        '<tool_call>{"name": "wait", "arguments": {}}</tool_call>',
        "",
        [ONE, TWO],
    ),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"place": "here"}}', "", [ONE]),
    ("hermes", '<tool_call>{"arguments": {"place": "here"}, "name": "look"}</tool_call>', "", [ONE]),
    ("hermes", '<tool_call>{"arguments": {"place": "here"}, "name": "look"}', "", [ONE]),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"place": "he', "", [("look", '{"place": "he')]),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"place": "here"}</tool_call> a } b', " a } b", [ONE]),
    ("hermes", '<tool_call>{"name": "a", "arguments": ' + NESTED + "}</tool_call>", "", [("a", NESTED)]),
    (
        "hermes",
        '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
        [],
    ),
    ("hermes", "<tool_call>not json</tool_call> then", "<tool_call>not json</tool_call> then", []),
    ("hermes", '<tool_call>{"name": "lo', '<tool_call>{"name": "lo', []),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("llama3", "plain text", "plain text", []),
    ("llama3", "", "", []),
    ("llama3", '{"name": "look", "parameters": {"place": "here"}}', "", [ONE]),
    ("llama3", PYTHON_TAG + '{"name": "look", "parameters": {"place": "here"}}', "", [ONE]),
    ("llama3", '{"name": "look", "arguments": {"place": "here"}}; {"name": "wait", "parameters": {}}', "", [ONE, TWO]),
    ("llama3", '{"name": "look", "parameters": {"place": "he', "", [("look", '{"place": "he')]),
    ("llama3", '{"parameters": {}, "name": "wait"}; {"name": "wait", "parameters": {}}', "", [TWO, TWO]),
    ("llama3", '{"name": "wait", "parameters": {}}; {"parameters": {}, "name": "wait"}', "", [TWO, TWO]),
    ("llama3", '{"name": "a", "parameters": ' + NESTED + ', "id": "}"}', "", [("a", NESTED)]),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", '{"name": "wait", "parameters": {}} and then', " and then", [TWO]),
    ("llama3", '{"parameters": {}, "name": "wait"} and then', '{"parameters": {}, "name": "wait"} and then', []),
    ("llama3", "[" * 3000, "[" * 3000, []),
    ("llama3", '{"a":' * 3000, '{"a":' * 3000, []),
]


@pytest.mark.parametrize(("style", "text", "shown", "calls"), CASES)
def test_calls_are_found_and_what_is_none_stays_text(style: Style, text: str, shown: str, calls: list[Call]) -> None:
    assert read(style, [text]) == (shown, calls)
    assert read(style, list(text)) == (shown, calls)


@given(st.sampled_from([case for case in CASES if len(case[1]) < 1000]), st.lists(st.integers(0, 200), max_size=6))
def test_pieces_do_not_matter(case: tuple[Style, str, str, list[Call]], cuts: list[int]) -> None:
    style, text, shown, calls = case
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read(style, [text[a:b] for a, b in itertools.pairwise(bounds)]) == (shown, calls)


def test_the_way_of_writing_is_in_the_template() -> None:
    for style, template in TEMPLATES.items():
        assert style_of(Tokenizer.from_assets({**tiny_assets(), "chat_template.jinja": template.encode()})) == style
    with pytest.raises(ConfigError, match="no tools"):
        style_of(Tokenizer.from_assets(tiny_assets()))


# Answering


def check_call(call: Any) -> None:
    assert call.type == "function"
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "look":
        assert set(arguments) == {"place", "far"}
        assert arguments["place"] in ("here", "there")
    else:
        assert (call.function.name, arguments) == ("wait", {})


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_a_call(tooled: Live, seed: int) -> None:
    with tooled.client() as client:
        ask: Any = {"model": MODEL, "messages": HI, "seed": seed, "tools": [LOOK, WAIT], "tool_choice": "required"}
        got = client.chat.completions.create(**ask, parallel_tool_calls=False).choices[0]
        assert (got.finish_reason, got.message.content) == ("tool_calls", None)
        assert got.message.tool_calls is not None
        assert len(got.message.tool_calls) == 1
        check_call(got.message.tool_calls[0])
        many = client.chat.completions.create(**ask, max_tokens=150).choices[0]
        for call in many.message.tool_calls or []:
            check_call(call)


def test_a_named_function_is_the_one_that_is_called_and_streams_alike(tooled: Live) -> None:
    choice: Any = {"type": "function", "function": {"name": "look"}}
    ask: Any = {"model": MODEL, "messages": HI, "seed": 1, "tools": [WAIT, LOOK], "tool_choice": choice, "n": 2}
    with tooled.client() as client:
        whole = client.chat.completions.create(**ask)
        streamed: dict[int, Any] = {}
        pieces = Counter[int]()
        ends = {}
        for chunk in client.chat.completions.create(**ask, stream=True):
            (part,) = chunk.choices
            assert not part.delta.content
            for call in part.delta.tool_calls or []:
                assert call.index == 0
                if part.index not in streamed:
                    assert (call.type, call.function.arguments) == ("function", "")
                    streamed[part.index] = call
                else:
                    assert (call.id, call.type, call.function.name) == (None, None, None)
                    streamed[part.index].function.arguments += call.function.arguments
                    pieces[part.index] += 1
            ends[part.index] = part.finish_reason or ends.get(part.index)
    assert ends == {0: "tool_calls", 1: "tool_calls"}
    assert min(pieces.values()) > 3, "arguments come as they are written"
    for one in whole.choices:
        assert one.message.tool_calls is not None
        check_call(one.message.tool_calls[0])
        assert one.message.tool_calls[0].function.name == "look"
        assert streamed[one.index].function.arguments == one.message.tool_calls[0].function.arguments


def test_the_clients_own_accumulator_puts_parallel_calls_together(tooled: Live) -> None:
    ask: Any = {"model": MODEL, "messages": HI, "seed": 4, "tools": [LOOK, WAIT], "tool_choice": "required", "max_tokens": 150}
    with tooled.client() as client:
        whole = client.chat.completions.create(**ask).choices[0]
        deltas: dict[int, list[str]] = {}
        with client.chat.completions.stream(**ask) as stream:
            for event in stream:
                if event.type == "tool_calls.function.arguments.delta":
                    deltas.setdefault(event.index, []).append(event.arguments_delta)
            try:
                final = stream.get_final_completion().choices[0].message.tool_calls or []
            except openai.LengthFinishReasonError as cut:
                final = cut.completion.choices[0].message.tool_calls or []
    assert whole.message.tool_calls is not None
    assert [(c.function.name, c.function.arguments) for c in final] == [
        (c.function.name, c.function.arguments) for c in whole.message.tool_calls
    ]
    assert ["".join(deltas[i]).strip() for i in sorted(deltas)] == [c.function.arguments for c in final][: len(deltas)]
    assert len({call.id for call in final}) == len(final)


def test_a_call_that_is_cut_off_has_what_it_has(tooled: Live) -> None:
    """As OpenAI does: the reason is length, and the arguments are no JSON yet."""
    choice: Any = {"type": "function", "function": {"name": "look"}}
    ask: Any = {"model": MODEL, "messages": HI, "seed": 1, "tools": [LOOK], "tool_choice": choice}
    with tooled.client() as client:
        full = client.chat.completions.create(**ask, logprobs=True).choices[0]
        assert full.logprobs is not None
        assert full.message.tool_calls is not None
        cut = client.chat.completions.create(**ask, max_tokens=len(full.logprobs.content or ()) - 24).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.content is None
    assert cut.message.tool_calls is not None
    part, arguments = cut.message.tool_calls[0].function.arguments, full.message.tool_calls[0].function.arguments
    assert arguments.startswith(part)
    assert len(part) < len(arguments)


def test_tools_are_shown_unless_none_may_be_called(tooled: Live) -> None:
    def prompt(**more: Any) -> str:
        body = {"model": MODEL, "messages": HI, "max_tokens": 1, "return_token_ids": True, **more}
        return tooled.tokenizer.decode(tooled.post("/v1/chat/completions", body).json()["prompt_token_ids"])

    bare = prompt()
    assert prompt(tools=[]) == prompt(tools=[WAIT], tool_choice="none") == bare
    assert prompt(tools=[WAIT]) == prompt(tools=[WAIT], tool_choice="auto") != bare


def test_a_whole_round_of_calling_is_rendered(tmp_path: Path) -> None:
    with make_live(make_checkpoint(tmp_path, "hermes")) as live:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "here"}'}}
        messages = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "a tree", "tool_call_id": "c1"},
        ]
        body = {"model": MODEL, "messages": messages, "max_tokens": 1, "return_token_ids": True}
        ids = live.post("/v1/chat/completions", body).json()["prompt_token_ids"]
        assert "<tool_call>look here" in live.tokenizer.decode(ids), "the template gets the arguments as an object"


def test_calls_that_the_template_would_leave_out_are_refused(tmp_path: Path) -> None:
    with make_live(make_checkpoint(tmp_path, "llama3")) as live:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
        answer = live.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "tools_not_supported"
        assert answer.json()["error"]["param"] == "messages"


# Formats


def test_json_comes_as_asked(client: openai.OpenAI) -> None:
    schema = LOOK["function"]["parameters"]  # type: ignore[index]
    for stream in (False, True):
        ask: Any = {
            "model": MODEL, "messages": HI, "seed": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        }  # fmt: skip
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**ask, stream=True))
        else:
            got = client.chat.completions.create(**ask).choices[0]
            assert got.finish_reason == "stop"
            text = got.message.content or ""
        assert set(json.loads(text)) == {"place", "far"}
    object_only: Any = {"type": "json_object"}
    got = client.chat.completions.create(
        model=MODEL, messages=HI, seed=1, max_tokens=100, temperature=5, response_format=object_only
    ).choices[0]
    assert (got.message.content or "").startswith("{")
    if got.finish_reason == "stop":
        assert isinstance(json.loads(got.message.content or ""), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[ab]{3}!"}, r"[ab]{3}!"),
        ({"choice": ["a.c (x)", "one\u00e9 two", "-\n"]}, "a\\.c \\(x\\)|one\u00e9 two|-\n"),
        ({"grammar": 'start: "q" /[0-9]{2}/'}, r"q\d\d"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 5}}, r"[345]"),
    ],
)
def test_every_kind_of_structure_holds_on_both_routes(live: Live, asked: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        more = {"model": MODEL, "seed": seed, "structured_outputs": asked, "max_tokens": 40}
        text = live.post("/v1/completions", {**more, "prompt": "x"}).json()["choices"][0]["text"]
        assert re.fullmatch(pattern, text)
        chat = live.post("/v1/chat/completions", {**more, "messages": HI}).json()["choices"][0]["message"]["content"]
        assert re.fullmatch(pattern, chat)
