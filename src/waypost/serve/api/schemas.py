"""What the server answers, as types: they check `replies.py` and describe the answers in /openapi.json. Those of chats are
in chat_schemas.py.

Members marked NotRequired are sent only where they were asked for (`return_token_ids`, `prompt_logprobs`, `include_usage`).
`weight_versions` are those of the weights that drew each of `token_ids`, counted from 0 as they are exchanged.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads it from here before Python 3.12

Finish = Literal["stop", "length", "abort"]
"""abort: the weights were exchanged under it, and it has what it had."""


class PromptTokensDetails(TypedDict):
    """How much of the prompt was found in the prefix cache, in tokens."""

    cached_tokens: int


class Usage(TypedDict):
    """`completion_tokens` counts every sampled token, end tokens included, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    """A token that could have stood here: its text, natural log-probability and UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that stands here, and the likeliest of its place in falling order."""

    top_logprobs: list[TopLogprob]


class CompletionLogprobs(TypedDict):
    """As ChatLogprobs, in the older form. `text_offset` counts characters from the beginning of the choice's text. With
    echo the prompt's tokens come first; the very first has no score."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """`rank` is 1 for the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One entry a token of the prompt, by token id; null for the first, which nothing stands before."""


class CompletionChoice(TypedDict):
    """One of the `n` texts; logprobs and finish_reason are null in the chunks of a stream that lack them."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs | None]
    token_ids: NotRequired[list[int]]
    weight_versions: NotRequired[list[int]]


class Completion(TypedDict):
    """Also the shape of a chunk when streaming; then `usage` comes in one last chunk, if it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    """`max_model_len` is the longest context, prompt and answer together, in tokens; `parent` is what an adapter changes."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: NotRequired[str]


class Adapters(TypedDict):
    """Names of the adapters that requests may give as `model`, with what each takes in the cache."""

    adapters: list[AdapterInfo]


class AdapterInfo(TypedDict):
    """An adapter: its name, the folder it was read from, the pages of its weights, and whether they are in the cache now."""

    name: str
    path: str
    num_pages: int
    resident: bool


class ModelList(TypedDict):
    """What /v1/models answers."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    """What /tokenize answers: ids, their number, and the longest prompt and answer together that the server takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class Detokenized(TypedDict):
    """What /detokenize answers: the text of the ids."""

    prompt: str


class Embedding(TypedDict):
    """`embedding`: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """What the inputs cost, in tokens; nothing is generated, so both are equal."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """What /v1/embeddings answers, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ErrorDetail(TypedDict):
    """OpenAI's error: `param` is the field at fault, `code` what a program can tell errors apart by."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """What every reply outside 2xx holds."""

    error: ErrorDetail


class Index(TypedDict):
    """What / answers: who this is, what it can do now, and the paths that describe the rest."""

    server: str
    version: str
    model: str
    status: Literal["loading", "ready", "stopping", "failed"]
    docs: str
    openapi: str


class Health(TypedDict):
    """What /health and /ready answer; `detail` says why it is not ready."""

    status: Literal["loading", "ready", "stopping", "failed"]
    detail: NotRequired[str]


class Weights(TypedDict):
    """`weight_version` counts exchanges from 0; `seconds` is how long this one took, until it was in use."""

    weight_version: int
    checkpoint: str
    swapping: bool
    seconds: NotRequired[float]


class Version(TypedDict):
    """What /version answers."""

    version: str
