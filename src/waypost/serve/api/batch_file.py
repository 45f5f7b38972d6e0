"""The files of a batch: requests, one JSON object a line, and answers, of which a crash may have torn the last.

An answer's id is a digest of what was asked, so that it is never taken for that of another request with the same custom_id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waypost.core.errors import ConfigError
from waypost.keep.disk import replace_file

ROUTES = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Line:
    """One request of the input, or why it is none."""

    custom_id: str
    url: str = ""
    body: Mapping[str, Any] | None = None
    problem: str | None = None


def read_lines(path: Path) -> list[Line]:
    """The requests of a file; blank lines do not count. ConfigError: no such file, none in it, or an id that stands twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a file of JSON lines") from error
    lines = [_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path}: holds no request; give a file with one JSON object a line")
    seen: set[str] = set()
    for line in lines:
        if line.custom_id in seen:
            raise ConfigError(f"{path}: the custom_id '{line.custom_id}' stands twice; give each request its own")
        seen.add(line.custom_id)
    return lines


def _line(number: int, text: str) -> Line:
    name = f"line-{number}"
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(name, problem=f"not JSON ({error})")
    if not isinstance(tree, dict):
        return Line(name, problem="not a JSON object")
    name = tree.get("custom_id", name)
    if not isinstance(name, str) or not name:
        return Line(f"line-{number}", problem="custom_id must be a text, and not empty")
    if "url" not in tree:
        body = {key: value for key, value in tree.items() if key != "custom_id"}
        return Line(name, ROUTES[0] if "messages" in body else ROUTES[1], body)
    unknown = sorted(set(tree) - {"custom_id", "method", "url", "body"})
    if unknown:
        return Line(name, problem=f"unknown field '{unknown[0]}'; a request has custom_id, method, url and body")
    if tree.get("method", "POST") != "POST" or tree["url"] not in ROUTES or not isinstance(tree.get("body"), dict):
        return Line(name, problem=f"method must be POST, url one of {', '.join(ROUTES)}, and body an object")
    return Line(name, tree["url"], tree["body"])


def take_up(path: Path, ids: Mapping[str, str]) -> set[str]:
    """The custom ids that `path` answers already, of those in `ids`, with the id that each answer must have. Cuts off a torn
    last line and drops errors, which are tried again.

    ConfigError: it is damaged elsewhere, or holds answers to other requests.
    """
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    kept: dict[str, bytes] = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            answer = json.loads(text)
            custom_id, response, given = answer["custom_id"], answer["response"], answer["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: is no answer of a batch ({error}); name another --out") from error
        if custom_id not in ids:
            raise ConfigError(f"{path}:{number}: answers '{custom_id}', which the batch does not ask; name another --out")
        if response is not None and response["status_code"] == 200:
            if given != ids[custom_id]:
                raise ConfigError(
                    f"{path}:{number}: answers '{custom_id}' as it was asked before, of another model, with another body or "
                    "other options; name another --out, or take that line out to have it asked again"
                )
            kept[custom_id] = text + b"\n"
    if b"".join(kept.values()) != raw:
        replace_file(path, b"".join(kept.values()))
    return set(kept)


def id_of(*asked: Any) -> str:
    """The id of an answer to what `asked` says: JSON values."""
    text = json.dumps(asked, sort_keys=True)
    return f"batch-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
