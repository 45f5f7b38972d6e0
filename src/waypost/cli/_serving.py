"""What `waypost serve` checks before it promises anything, and measures for its targets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from waypost.cli._story import Story
from waypost.core.errors import ConfigError
from waypost.keep import disk

if TYPE_CHECKING:
    from waypost.serve.api.access import Callers
    from waypost.serve.engine import Engine


def callers_of(api_key: str | None, api_keys: Path | None) -> Callers | None:
    """Who may use the server; None: everybody."""
    from waypost.serve.api.access import Caller, Callers

    if api_key is None and os.environ.get("WAYPOST_API_KEY") == "":  # an option that is empty there counts as not given
        raise ConfigError("WAYPOST_API_KEY is empty, and the server would be open to everybody; give it a key, or unset it")
    if api_key is not None and api_keys is not None:
        raise ConfigError("give --api-key or --api-keys, not both; put the key into the file")
    given = None if api_key is None else Callers([Caller(name="default", key=api_key)])
    return given if api_keys is None else Callers.read(api_keys)


def check_names(name: str | None, cors: Sequence[str]) -> None:
    """ConfigError for a model's name that no request can give, and for web pages that no browser names so."""
    if name is not None and not name.strip():
        raise ConfigError("--name is empty; requests name the model by it, so give a name, or leave it out for the folder's")
    for origin in cors:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", origin):
            raise ConfigError(f"--cors {origin!r}: must be * or an origin as browsers name it, e.g. https://chat.example:8443")


def check_asked(checkpoint: Path, scheduling: str | None, *targets_s: float | None) -> None:
    """ConfigError for what can be seen to be wrong before anything is loaded."""
    if scheduling is not None and any(target is not None for target in targets_s):
        raise ConfigError("--scheduling and the targets of time choose one policy each; leave --scheduling out, or the targets")
    if not checkpoint.exists() and disk.moved_aside(checkpoint) is None:
        raise ConfigError(f"{checkpoint}: there is no such folder; give a checkpoint, or make one with waypost import")


def check_room(engine: Engine) -> None:
    """ConfigError where the cache cannot hold one request of the context that the server would promise."""
    from waypost.kernels.ops import PAGE_TOKENS
    from waypost.serve.pages import pages_for

    pages, context = engine.pool.total, engine.max_seq_len
    if pages * PAGE_TOKENS < context:
        raise ConfigError(
            f"the cache holds {pages * PAGE_TOKENS} tokens (num_pages={pages}), and one request may have {context}: give "
            f"--num-pages of at least {pages_for(context)}, or --max-seq-len of at most {pages * PAGE_TOKENS}"
        )


def aim(story: Story, engine: Engine, time_between_tokens_s: float | None, time_to_first_token_s: float | None) -> None:
    """Measures what steps cost and lets the engine schedule for the targets, where there is one."""
    if time_between_tokens_s is None and time_to_first_token_s is None:
        return
    from waypost.serve.costs import measure
    from waypost.serve.scheduling import Latency

    policy = Latency(time_to_first_token_s=time_to_first_token_s)  # before anything is measured: wrong targets are cheap
    if time_between_tokens_s is not None:
        policy = replace(policy, time_between_tokens_s=time_between_tokens_s)
    costs = measure(engine)
    engine.scheduler.policy = replace(policy, costs=costs)
    story.tell("measure", f"a step takes {1e3 * costs.base_s:.1f} ms and {1e3 * costs.token_s:.2f} ms a token")
