"""`waypost serve`: a checkpoint over HTTP with OpenAI's API."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from waypost.cli._adapters import add_adapters
from waypost.cli._answer import tokenizer_of
from waypost.cli._serving import aim, callers_of, check_asked, check_names, check_room
from waypost.cli._shared import (
    Arithmetic,
    AsJson,
    CheckpointPath,
    DraftingName,
    Dtype,
    Kernel,
    KvPolicyName,
    Numerics,
    SchedulingName,
    Threads,
    end_at_once,
    print_result,
    read_ahead,
    require_extra,
    serving_techniques,
    torch_dtype,
)
from waypost.cli._story import Story, invitation, tell_loaded
from waypost.core.heap import uncollected
from waypost.core.progress import say

if TYPE_CHECKING:
    from waypost.model.tokenizer import Tokenizer
    from waypost.serve.api.service import Service
    from waypost.serve.engine import Engine


def command(
    checkpoint: CheckpointPath,
    host: Annotated[
        str, typer.Option(help="Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests.", show_default="the folder's name")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Longest context, prompt and answer together.", show_default="the model's")
    ] = None,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in a step. Lower answers running requests sooner while prompts come in.")
    ] = 512,
    max_sequences: Annotated[int, typer.Option(min=1, help="Most answers in progress at once; further ones wait.")] = 64,
    time_between_tokens: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Target: prompts come in pieces that keep answers in progress this fluent, by step costs that are measured "
            "at the start.",
            show_default="as --max-batch-tokens makes it",
        ),
    ] = None,
    time_to_first_token: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Target for a prompt by itself; goes before the other.", show_default="none"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Serve an adapter (a folder as PEFT writes it, or a checkpoint with one) to requests whose model is NAME. "
            "Repeatable; /admin/adapters loads more.",
        ),
    ] = None,
    num_pages: Annotated[
        int | None, typer.Option(help="Pages of the cache of keys and values.", show_default="by the free memory")
    ] = None,
    dtype: Dtype = None,
    arithmetic: Arithmetic = None,
    numerics: Numerics = "exact",
    kernel: Kernel = "auto",
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep what prompts share; the answers are the same bits.")
    ] = True,
    threads: Threads = None,
    kv: KvPolicyName = None,
    drafting: DraftingName = "auto",
    scheduling: SchedulingName = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="WAYPOST_API_KEY",
            help="Ask for this bearer token on /v1 and /(de)tokenize.",
            show_default="none is asked for",
        ),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask for one of the keys in this YAML file of NAME: KEY, or NAME: {key, weight, priority, max_in_flight}; "
            "their holders take turns.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="WAYPOST_ADMIN_KEY",
            help="Let the holder of this bearer token exchange the weights (POST /admin/weights).",
            show_default="nobody may",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most answers without a first token; further requests are refused (429).")
    ] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most new tokens of an answer.", show_default="what the context has room for")
    ] = None,
    max_choices: Annotated[
        int | None, typer.Option(min=1, help="Most answers of one request, prompts times n.", show_default="no limit")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Time of a request that names none (deadline_s, x-deadline-s).", show_default="no limit"
        ),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a JSON line for every request to stderr.")
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page that may call this server, * for all. Repeatable."),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Time that running requests get when the server is stopped.")
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Serve CHECKPOINT over HTTP with OpenAI's API.

    CHECKPOINT is a checkpoint, a run folder (its latest checkpoint) or a plain Hugging Face folder. Routes:
    /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /tokenize, /detokenize, /, /health, /ready,
    /metrics, /version, /docs, and /admin/weights where there is an admin key.

    The same request with the same seed gives the same tokens whatever else is running (numerics exact). Ctrl-C,
    SIGTERM or the end of its terminal lets running requests finish; a second one stops at once.

    Examples:
      waypost serve runs/tiny
      waypost serve models/it --port 0 --max-seq-len 4096
      waypost serve models/it --lora support=runs/support --lora poet=adapters/poet
    """
    from waypost.serve.api.server import listen, run, url

    story = Story()
    callers = callers_of(api_key, api_keys)
    check_asked(checkpoint, scheduling, time_between_tokens, time_to_first_token)
    check_names(name, cors or ())
    sock = listen(host, port)
    with read_ahead(checkpoint, kernel, dtype) as ahead:
        with uncollected():
            require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
            from waypost.serve.engine import Engine

        techniques = serving_techniques(kv, drafting, scheduling)
        story.tell("import", "torch")

        def build() -> Engine:
            return Engine(
                ahead, numerics=numerics, kernel=kernel, dtype=torch_dtype(dtype), arithmetic=torch_dtype(arithmetic),
                max_seq_len=max_seq_len, num_pages=num_pages, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences,
                threads=threads, prefix_cache=prefix_cache, **techniques,
            )  # fmt: skip

        building = ThreadPoolExecutor(1, "waypost-build").submit(build)  # weights are packed while the interpreter imports
        with uncollected():
            from waypost.serve.api.admission import Limits
            from waypost.serve.api.app import create_app

        model_name = name or checkpoint.resolve().name
        limits = Limits(max_waiting=max_waiting, max_tokens=max_tokens, max_choices=max_choices, deadline_s=deadline)
        log = (lambda line: print(line, file=sys.stderr, flush=True)) if log_requests else None
        app = create_app(None, None, model_name, callers=callers, limits=limits, cors_origins=cors or (), log=log,
                         admin_key=admin_key)  # fmt: skip

    def load() -> None:
        engine = building.result()
        check_room(engine)
        add_adapters(story, engine, lora or [], model_name)
        aim(story, engine, time_between_tokens, time_to_first_token)
        if (tokenizer := attach(app.state.service, engine, str(checkpoint))) is not None:
            tell_loaded(story, engine)
            say(invitation(url(sock), model_name, tokenizer.has_chat_template, callers is not None, max_tokens))
            print_result({"url": url(sock), "model": model_name, "ready_s": story.seconds}, as_json)

    run(app, sock, load, drain_s=drain, say=say, at_once=end_at_once)


def attach(service: Service, engine: Engine, checkpoint: str) -> Tokenizer | None:
    """Gives the engine to the server, with its tokenizer, which is returned; None: it was told to stop meanwhile."""
    service.checkpoint = checkpoint
    service.attach(engine, tokenizer := tokenizer_of(engine, checkpoint))
    return tokenizer if service.state[0] == "ready" else None
