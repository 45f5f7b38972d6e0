"""/tokenize, /detokenize and /v1/embeddings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from api_cases import MODEL, Live
from pydantic import TypeAdapter

from waypost.serve.api import schemas


def test_a_text_there_and_back(live: Live) -> None:
    text = "What is this? <|im_end|>"
    reply = live.post("/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert reply["tokens"] == live.tokenizer.encode(text, special=True)
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert "".join(reply["token_strs"]) == text
    assert reply["max_model_len"] == live.engine.max_seq_len
    assert live.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": text}
    plain = live.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert plain == live.tokenizer.encode(text)


def test_a_list_of_texts_is_refused_with_what_is_allowed(live: Live) -> None:
    refused = live.post("/tokenize", {"prompt": ["a", "b"]}).json()["error"]
    assert (refused["param"], refused["message"]) == ("prompt", "prompt=['a', 'b']: give one text, or messages")


def test_what_draws_no_token_is_not_among_the_lengths_of_answers(live: Live) -> None:
    def counts() -> list[float]:
        names = ("request_generation_tokens_count", "request_params_max_tokens_count", "request_prompt_tokens_count")
        found = {
            line.partition("{")[0]: float(line.split()[-1]) for line in live.get("/metrics").text.splitlines() if line[0] != "#"
        }
        return [found[f"waypost:{name}"] for name in names]

    before = counts()
    assert live.post("/v1/embeddings", {"model": MODEL, "input": ["a", "b"]}).status_code == 200
    asked = {"model": MODEL, "prompt": "x y z", "max_tokens": 0, "echo": True, "logprobs": 0}
    assert live.post("/v1/completions", asked).status_code == 200
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [0, 0, 3]
    assert live.post("/v1/completions", {**asked, "max_tokens": 2}).status_code == 200
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 4]


def test_messages_are_rendered(live: Live) -> None:
    messages = [{"role": "user", "content": "x"}]
    for generation in (True, False):
        reply = live.post("/tokenize", {"messages": messages, "add_generation_prompt": generation}).json()
        assert reply["tokens"] == live.tokenizer.chat(messages, add_generation_prompt=generation)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x", "prmpt": "y"}),
        ("/detokenize", {"tokens": [288]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "x"}),
        ("/v1/embeddings", {"model": MODEL, "input": ""}),
        ("/v1/embeddings", {"model": MODEL, "input": []}),
        ("/v1/embeddings", {"model": MODEL, "input": ["a", ""]}),
        ("/v1/embeddings", {"model": MODEL, "input": [400]}),
        ("/v1/embeddings", {"model": MODEL, "input": "x " * 300}),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "dimensions": 8}),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "pooling": "max"}),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(live: Live, route: str, body: dict[str, Any]) -> None:
    reply = live.post(route, body)
    assert reply.status_code == 400
    TypeAdapter(schemas.ErrorBody).validate_json(reply.content, strict=True)


def test_only_the_models_own_size_of_vectors_is_given(live: Live) -> None:
    size = live.engine.model.config.hidden_size
    ask = {"model": MODEL, "input": "x"}
    assert len(live.post("/v1/embeddings", {**ask, "dimensions": size}).json()["data"][0]["embedding"]) == size
    refused = live.post("/v1/embeddings", {**ask, "dimensions": size // 2}).json()["error"]
    assert (refused["param"], refused["code"]) == ("dimensions", "unsupported_value")
    assert f"vectors of this model have {size} numbers" in refused["message"]


def test_the_openai_client_gets_vectors(client: openai.OpenAI, live: Live) -> None:
    texts = ["one", "another text", "one"]
    reply = client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64 and decodes it
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert reply.data[0].embedding == reply.data[2].embedding != reply.data[1].embedding
    assert torch.tensor(reply.data[0].embedding).norm().item() == pytest.approx(1.0, abs=1e-6)
    assert reply.usage.prompt_tokens == sum(len(live.tokenizer.encode(t, special=True)) for t in texts)
    floats = client.embeddings.create(model=MODEL, input=texts[1], encoding_format="float")
    assert floats.data[0].embedding == reply.data[1].embedding
    ids = client.embeddings.create(model=MODEL, input=live.tokenizer.encode(texts[1], special=True))
    assert ids.data[0].embedding == reply.data[1].embedding


def test_a_vector_does_not_depend_on_what_runs_beside_it(live: Live) -> None:
    body = {"model": MODEL, "input": "the same text", "pooling": "last"}
    alone = live.post("/v1/embeddings", body).json()
    chat = {"model": MODEL, "prompt": "the same text", "max_tokens": 60, "ignore_eos": True, "n": 4}
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(live.post, "/v1/completions", chat) for _ in range(3)]
        beside = list(pool.map(lambda _: live.post("/v1/embeddings", body).json(), range(4)))
        assert {reply.result().status_code for reply in busy} == {200}
    assert beside == [alone] * 4
    assert live.post("/v1/embeddings", {**body, "pooling": "mean"}).json() != alone
