"""The routes that draw no token: /tokenize and /detokenize, as vLLM has them, and OpenAI's /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from waypost.core.errors import ConfigError
from waypost.model.tokenizer import Tokenizer
from waypost.serve.api import schemas
from waypost.serve.api.asgi import CLIENT_GONE, read_body, unless_gone
from waypost.serve.api.calls import call_of, refusals, service_of, takes
from waypost.serve.api.described import Described
from waypost.serve.api.errors import bad_request, context_exceeded, of_waypost, unavailable
from waypost.serve.api.jobs import Work, each
from waypost.serve.api.messages import Message
from waypost.serve.api.protocol import parse
from waypost.serve.api.replies import Prompt
from waypost.serve.api.strict import Strict
from waypost.serve.engine import Engine
from waypost.serve.pooling import Kind
from waypost.serve.prepare import Prepared
from waypost.serve.request import Request as EngineRequest

router = APIRouter(route_class=Described)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages, as the model would get them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = Field(
        True, description="For a prompt: read special tokens in it, and add those that the tokenizer adds."
    )
    add_generation_prompt: bool = Field(True, description="For messages: end where the assistant's answer begins.")
    return_token_strs: bool = False
    allowed: ClassVar[Mapping[str, str]] = {"prompt": "give one text, or messages"}


class DetokenizeRequest(Strict):
    """POST /detokenize: the text of token ids, special tokens included."""

    model: str | None = None
    tokens: list[TokenId]


class EmbeddingRequest(Strict):
    """POST /v1/embeddings: the decoder's last hidden states after the final norm, pooled, of length one."""

    model: str = Field(description="The served name, as listed by /v1/models.")
    input: str | list[str] | list[int] | list[list[int]] = Field(description="A text, token ids, or a list of either.")
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Kind = Field("mean", description="mean: over all tokens; last: the last token's. (Extra.)")
    dimensions: int | None = Field(None, description="The model's hidden size; any other is refused.")
    deadline_s: float | None = Field(None, gt=0.0, description="As for completions. (Extra.)")
    priority: int = Field(0, ge=0, le=2**31, description="As for completions. (Extra.)")
    user: str | None = None


BODIES = (TokenizeRequest, DetokenizeRequest, EmbeddingRequest)


@router.post(
    "/tokenize",
    responses={200: {"model": schemas.Tokenized}, **refusals(400, 401, 404, 413, 503)},
    openapi_extra=takes("TokenizeRequest"),
)
async def tokenize(request: Request) -> Response:
    """Token ids of a text or of messages."""
    asked = parse(TokenizeRequest, await read_body(request))
    if (asked.prompt is None) == (asked.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    service = service_of(request)
    engine, tokenizer = service.require(asked.model)
    ids = await service.think(_encode, asked, tokenizer)
    reply: schemas.Tokenized = {"count": len(ids), "max_model_len": engine.max_seq_len, "tokens": ids}
    if asked.return_token_strs:
        reply["token_strs"] = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return JSONResponse(reply)


@router.post(
    "/detokenize",
    responses={200: {"model": schemas.Detokenized}, **refusals(400, 401, 404, 413, 503)},
    openapi_extra=takes("DetokenizeRequest"),
)
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    asked = parse(DetokenizeRequest, await read_body(request))
    service = service_of(request)
    engine, tokenizer = service.require(asked.model)
    _known(asked.tokens, engine, "tokens")
    text = await service.think(lambda: tokenizer.decode(asked.tokens, skip_special=False))
    reply: schemas.Detokenized = {"prompt": text}
    return JSONResponse(reply)


@router.post(
    "/v1/embeddings",
    responses={200: {"model": schemas.Embeddings}, **refusals(400, 401, 404, 413, 429, 500, 503, 504)},
    openapi_extra=takes("EmbeddingRequest"),
)
async def embeddings(request: Request) -> Response:
    """A vector for each text."""
    asked = parse(EmbeddingRequest, await read_body(request))
    inputs = each(asked.input) if asked.input else []
    if not inputs:
        raise bad_request("input is empty; give at least one text", "input")
    service = service_of(request)
    engine, tokenizer = service.require(asked.model)
    size = engine.model.config.hidden_size
    if asked.dimensions not in (None, size):
        why = f"dimensions={asked.dimensions}: vectors of this model have {size} numbers and are not shortened; leave it out"
        raise bad_request(why, "dimensions", "unsupported_value")
    call = call_of(request, len(inputs), asked.user, asked.priority, asked.deadline_s)
    adapter = service.adapter(asked.model)
    work = await service.think(_plan, asked, inputs, engine, tokenizer, adapter)
    parts = await unless_gone(request, service.finished(work, call))
    if parts is None:
        return Response(status_code=CLIENT_GONE)
    data: list[schemas.Embedding] = []
    for index, part in enumerate(parts):
        if part.embedding is None:
            raise unavailable("weights_exchanged", "The weights were exchanged under this request; send it again")
        vector = part.embedding.numpy()
        # base64 as OpenAI sends it: little-endian float32
        given = (
            vector.tolist() if asked.encoding_format == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()
        )
        data.append({"object": "embedding", "index": index, "embedding": given})
    tokens = sum(len(prompt.token_ids) for prompt in work.prompts)
    reply: schemas.Embeddings = {
        "object": "list", "data": data, "model": asked.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}
    }  # fmt: skip
    return JSONResponse(reply)


def _encode(asked: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    try:
        if asked.messages is not None:
            messages = [m.for_template() for m in asked.messages]
            return tokenizer.chat(messages, add_generation_prompt=asked.add_generation_prompt)
        return tokenizer.encode(asked.prompt or "", special=asked.add_special_tokens)
    except ConfigError as error:
        raise of_waypost(error) from error


def _known(ids: list[int], engine: Engine, param: str) -> None:
    vocab = engine.model.config.vocab_size
    unknown = next((i for i in ids if not 0 <= i < vocab), None)
    if unknown is not None:
        raise bad_request(f"{param} holds token {unknown}; this model knows 0..{vocab - 1}", param, "invalid_value")


def _plan(asked: EmbeddingRequest, inputs: list[Any], engine: Engine, tokenizer: Tokenizer, adapter: str | None) -> Work:
    prompts: list[Prompt] = []
    requests: list[Prepared] = []
    try:
        for given in inputs:
            ids = tokenizer.encode(given, special=True) if isinstance(given, str) else given
            if len(ids) > engine.max_seq_len:
                raise context_exceeded(engine.max_seq_len, len(ids), None, "input")
            prompts.append(Prompt(ids))
            requests.append(engine.prepare(EngineRequest(ids, pooling=asked.pooling, adapter=adapter)))
    except ConfigError as error:
        raise bad_request(str(error), "input") from error
    return Work(prompts, requests, 1)
