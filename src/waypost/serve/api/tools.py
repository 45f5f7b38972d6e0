"""Tool calls: how checkpoints write them, how they are described, and how they are made certain.

Two ways of writing are known, and told apart by the chat template: Hermes' (also Qwen's), a JSON object between
<tool_call> and </tool_call>, with text before it if the model likes; and Llama 3's, where the whole answer is JSON
objects with name and parameters, separated by semicolons.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from waypost.core.errors import ConfigError
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api.strict import Strict
from waypost.serve.api.tool_readers import CLOSE, KEYS, OPEN, Style
from waypost.serve.sampling import Grammar

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that the model may call, as the client describes it."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object; none: no arguments.")
    strict: bool | None = Field(None, description="True needs tool_choice 'required' or a named function.")


class Tool(Strict):
    """A tool of a request; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The mapping that a chat template shows to the model."""
        function = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**function, "parameters": self.function.parameters or NO_ARGUMENTS}}


class NamedFunction(Strict):
    """The function of a request's tools that must be called."""

    name: str


class NamedTool(Strict):
    """A tool_choice that forces one function."""

    type: Literal["function"]
    function: NamedFunction


NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def style_of(tokenizer: Tokenizer) -> Style:
    """How this checkpoint writes calls; ConfigError where its chat template says nothing of tools."""
    texts = _templates(tokenizer)
    if "tools" in texts and OPEN in texts:
        return "hermes"
    if "tools" in texts and '"parameters"' in texts.replace("\\", ""):
        return "llama3"
    raise ConfigError("this checkpoint's chat template has no tools, or writes calls in a way that is not known here")


def shows_calls(tokenizer: Tokenizer) -> bool:
    """Whether this checkpoint's chat template writes down the calls of earlier turns; else they would be lost silently."""
    return "tool_calls" in _templates(tokenizer)


def _templates(tokenizer: Tokenizer) -> str:
    texts = (data for name, data in tokenizer.assets().items() if name != "tokenizer.json")
    return b"\n".join(texts).decode("utf-8", "replace")


def calls_grammar(tools: Sequence[Tool], style: Style, one: bool) -> Grammar:
    """Answers that are calls of `tools` and nothing else: one of them, or one or more."""
    bodies = [
        {
            "type": "object",
            "properties": {"name": {"const": t.function.name}, KEYS[style]: t.function.parameters or NO_ARGUMENTS},
            "required": ["name", KEYS[style]],
            "additionalProperties": False,
        }
        for t in tools
    ]
    style_of_json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    body = json.dumps({"x-guidance": style_of_json, "anyOf": bodies})
    call, separator = (f'"{OPEN}\\n" body "\\n{CLOSE}"', '"\\n"') if style == "hermes" else ("body", '"; "')
    start = "call" if one else f"call ({separator} call)*"
    return Grammar(kind="lark", text=f"start: {start}\ncall: {call}\nbody: %json {body}\n")
