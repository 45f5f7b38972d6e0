"""The server through the eyes of the `openai` package."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from api_cases import MODEL, Live

from waypost.serve.sampling import Sampling

HI = [{"role": "user", "content": "Good morning!"}]


def test_models_lists_the_served_name_and_the_context(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "waypost")
    assert model.max_model_len == 256  # type: ignore[attr-defined]
    assert client.models.retrieve(MODEL) == model


def test_completion_is_what_the_engine_generates(live: Live, client: openai.OpenAI) -> None:
    (want,) = live.engine.generate(["the cat"], Sampling(seed=5, max_tokens=16))
    got = client.completions.create(model=MODEL, prompt="the cat", seed=5, max_tokens=16, extra_body={"return_token_ids": True})
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason, choice.index) == (want.text, want.finish_reason, 0)
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == want.token_ids
    assert choice.model_extra["prompt_token_ids"] == live.tokenizer.encode("the cat", special=True)
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 0


def test_usage_says_what_the_prefix_cache_had(client: openai.OpenAI) -> None:
    prompts = ["a prompt of its own that fills some pages: " + "0123456789" * 5, "another " * 9]

    def cached() -> list[int]:
        streamed = client.completions.create(
            model=MODEL, prompt=prompts, n=2, max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
        last = list(streamed)[-1].usage
        whole = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=2).usage
        assert last is not None
        assert last.prompt_tokens_details is not None
        assert whole is not None
        assert whole.prompt_tokens_details is not None
        return [details.cached_tokens or 0 for details in (last.prompt_tokens_details, whole.prompt_tokens_details)]

    first, again = cached()
    assert (first, again % 16) == (0, 0)
    assert 0 < again < sum(map(len, prompts)), "each prompt is counted once, though it has two choices"
    assert cached() == [again, again]


def test_completion_stops_after_16_tokens_unless_told(client: openai.OpenAI) -> None:
    got = client.completions.create(model=MODEL, prompt="a", seed=0, extra_body={"ignore_eos": True})
    assert got.usage is not None
    assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (16, "length")


def test_all_forms_of_a_prompt_mean_the_same(live: Live, client: openai.OpenAI) -> None:
    ids = live.tokenizer.encode("in the end", special=True)

    def texts(prompt: Any) -> list[str]:
        got = client.completions.create(model=MODEL, prompt=prompt, seed=3, max_tokens=6)
        assert [choice.index for choice in got.choices] == list(range(len(got.choices)))
        return [choice.text for choice in got.choices]

    (text,) = texts("in the end")
    assert texts(ids) == [text]
    assert texts(["in the end", "in the end"]) == [text, text]
    assert texts([ids, ids]) == [text, text]
    assert texts(["in the end", "on and on"])[1] != text


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(client: openai.OpenAI) -> None:
    def texts(prompt: Any, n: int) -> list[str]:
        got = client.completions.create(model=MODEL, prompt=prompt, seed=8, n=n, max_tokens=6)
        return [choice.text for choice in got.choices]

    both = texts(["one", "two"], 3)
    assert both == texts("one", 3) + texts("two", 3)
    assert len(set(both)) == 6


def test_echo_begins_with_the_prompt(live: Live, client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt="once", seed=1, max_tokens=4).choices[0].text
    assert client.completions.create(model=MODEL, prompt="once", seed=1, max_tokens=4, echo=True).choices[0].text == (
        "once" + plain
    )
    ids = live.tokenizer.encode("once")
    stream = client.completions.create(model=MODEL, prompt=ids, seed=1, max_tokens=4, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "once" + plain


def test_chat_answers_the_rendered_template(live: Live, client: openai.OpenAI) -> None:
    ids = live.tokenizer.chat(HI)
    (want,) = live.engine.generate([ids], Sampling(seed=2, max_tokens=12))
    got = client.chat.completions.create(model=MODEL, messages=HI, seed=2, max_completion_tokens=12)  # type: ignore[arg-type]
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content) == ("assistant", want.text)
    assert choice.finish_reason == want.finish_reason
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(ids)
    older = client.chat.completions.create(model=MODEL, messages=HI, seed=2, max_tokens=12)  # type: ignore[arg-type]
    assert older.choices == got.choices


def test_chat_takes_every_role_and_content_in_parts(live: Live, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Good"}, {"type": "text", "text": "morning!"}]
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "Yes?", "refusal": None},
        {"role": "tool", "content": "42", "tool_call_id": "call-1"},
        {"role": "user", "content": ""},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Good\nmorning!"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": ""},
    ]
    got = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, extra_body={"return_token_ids": True})
    assert got.model_extra is not None
    assert got.model_extra["prompt_token_ids"] == live.tokenizer.chat(plain)


def test_chat_goes_on_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model=MODEL, messages=HI, seed=1, extra_body={"ignore_eos": True})  # type: ignore[arg-type]
    assert got.usage is not None
    assert (got.usage.total_tokens, got.choices[0].finish_reason) == (256, "length")


def test_streamed_chat_joins_to_the_whole(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": HI, "seed": 4, "max_tokens": 24, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    *body, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    cached = {"prompt_tokens_details"}  # the first of the two may be the first that ever asks this
    assert last.usage.model_dump(exclude=cached) == whole.usage.model_dump(exclude=cached)
    assert all(chunk.usage is None for chunk in body)
    for choice in whole.choices:
        mine = [c for chunk in body for c in chunk.choices if c.index == choice.index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert all(c.delta.role is None for c in mine[1:])
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        assert [t for c in mine if c.logprobs for t in c.logprobs.content or []] == choice.logprobs.content


def test_streamed_completions_join_to_the_whole(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "prompt": ["one", "two"], "seed": 4, "max_tokens": 12, "n": 2, "logprobs": 1}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        assert choice.logprobs is not None
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for c in mine if c.logprobs for x in getattr(c.logprobs, field)] == getattr(choice.logprobs, field)


def test_chat_logprobs_are_the_models(live: Live, client: openai.OpenAI) -> None:
    import torch

    from waypost.model import hf

    got = client.chat.completions.create(
        model=MODEL, messages=HI, seed=6, max_tokens=8, logprobs=True, top_logprobs=3, temperature=0.5,
        extra_body={"return_token_ids": True},
    )  # type: ignore[call-overload]  # fmt: skip
    (choice,) = got.choices
    ids, answer = got.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]
    logits = hf.logits(live.engine.model, ids + answer).double()
    want = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
    assert len(choice.logprobs.content) == len(answer)
    for row, token, entry in zip(want, answer, choice.logprobs.content, strict=True):
        assert math.isclose(entry.logprob, row[token].item(), abs_tol=1e-5)  # float32 sums of 288 terms
        assert bytes(entry.bytes) == live.tokenizer.token_bytes(token)
        assert entry.token == bytes(entry.bytes).decode("utf-8", "replace")
        top = row.topk(3)
        assert [bytes(t.bytes) for t in entry.top_logprobs] == [live.tokenizer.token_bytes(int(i)) for i in top.indices]
        for shown, value in zip(entry.top_logprobs, top.values.tolist(), strict=True):
            assert math.isclose(shown.logprob, value, abs_tol=1e-5)


def test_completion_logprobs_in_the_older_form(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "prompt": "the", "max_tokens": 10, "temperature": 0, "extra_body": {"ignore_eos": True}}
    got = client.completions.create(**request, logprobs=2).choices[0]
    scores = got.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert scores.text_offset is not None
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset) == 10
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())  # greedy: the sampled token is the likeliest
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        if not token.startswith("bytes:") and "<|" not in token:
            assert got.text[offset:].startswith(token)
    none = client.completions.create(**request, logprobs=0).choices[0].logprobs
    assert none is not None
    assert none.top_logprobs == [{t: p} for t, p in zip(scores.tokens, scores.token_logprobs, strict=True)]


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "prompt": "a", "seed": 11, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**request).choices[0].text
    at = len(text) // 2
    stop = text[at : at + 2]
    got = client.completions.create(**request, stop=stop).choices[0]
    assert (got.text, got.finish_reason) == (text[: text.index(stop)], "stop")
    assert client.completions.create(**request, stop=["\u2603", stop]).choices[0].text == got.text
    streamed = "".join(c.choices[0].text for c in client.completions.create(**request, stop=stop, stream=True))
    assert streamed == got.text


def test_extra_sampling_fields_reach_the_sampler(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str:
        return client.completions.create(model=MODEL, prompt="a b", seed=1, max_tokens=20, extra_body=extra).choices[0].text

    greedy = client.completions.create(model=MODEL, prompt="a b", temperature=0, max_tokens=20).choices[0].text
    assert text(top_k=1) == greedy
    assert text(min_p=1.0) == greedy
    assert text(top_k=0) == text(top_k=-1) == text()
    for extra in ({"repetition_penalty": 1.8}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"top_p": 0.3}):
        assert text(**extra) != text(), extra
    forced = client.completions.create(model=MODEL, prompt="a", max_tokens=4, temperature=0, logit_bias={"70": 100})
    assert len(set(forced.choices[0].text)) == 1


def test_an_answer_may_not_end_before_min_tokens(live: Live, client: openai.OpenAI) -> None:
    eos = live.tokenizer.eos_ids[0]
    request: Any = {"model": MODEL, "prompt": "a", "seed": 1, "max_tokens": 12, "logit_bias": {str(eos): 100}}
    early = client.completions.create(**request)
    assert early.usage is not None
    assert (early.usage.completion_tokens, early.choices[0].finish_reason) == (1, "stop")
    late = client.completions.create(**request, extra_body={"min_tokens": 7})
    assert late.usage is not None
    assert (late.usage.completion_tokens, late.choices[0].finish_reason) == (8, "stop")


def test_variables_reach_the_chat_template(live: Live, client: openai.OpenAI) -> None:
    extra = {"chat_template_kwargs": {"add_generation_prompt": False}, "return_token_ids": True}
    got = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1, extra_body=extra)  # type: ignore[arg-type]
    assert got.model_extra is not None
    assert got.model_extra["prompt_token_ids"] == live.tokenizer.chat(HI, add_generation_prompt=False)


def test_the_same_seed_gives_the_same_answer_and_another_another(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        return client.completions.create(model=MODEL, prompt="x", seed=seed, max_tokens=20).choices[0].text

    assert text(7) == text(7)
    assert len({text(seed) for seed in (7, 8, -9, None, None)}) == 5


def test_sixteen_at_once_give_the_bits_of_each_alone(live: Live) -> None:
    prompts = [f"{'word ' * (i * 3)}number {i}" for i in range(16)]

    def request(i: int) -> dict[str, Any]:
        return {
            "model": MODEL, "prompt": prompts[i], "seed": i, "max_tokens": 24, "logprobs": 3,
            "extra_body": {"return_token_ids": True, "ignore_eos": True},
        }  # fmt: skip

    with live.client() as client:
        alone = [client.completions.create(**request(i)).choices for i in range(16)]

    async def together() -> list[Any]:
        async with live.async_client() as client:
            return await asyncio.gather(*(client.completions.create(**request(i)) for i in range(16)))

    assert [reply.choices for reply in asyncio.run(together())] == alone


def test_async_client_streams(live: Live) -> None:
    async def read() -> str:
        async with live.async_client() as client:
            stream = await client.chat.completions.create(model=MODEL, messages=HI, seed=9, max_tokens=10, stream=True)  # type: ignore[arg-type]
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    with live.client() as client:
        whole = client.chat.completions.create(model=MODEL, messages=HI, seed=9, max_tokens=10)  # type: ignore[arg-type]
    assert asyncio.run(read()) == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "kind", "param", "says"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model", f"serves '{MODEL}'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "greater than or equal to 0"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "Did you mean 'temperature'?"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", "has no tools"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, openai.BadRequestError, None, "unclosed group"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, openai.BadRequestError, "max_tokens", "not both"),
        ({"stop": ""}, openai.BadRequestError, "stop", "no empty string"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, openai.BadRequestError, "messages", "messages"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 300}, openai.BadRequestError, "messages", "256"),
        ({"logit_bias": {"9999": 1}}, openai.BadRequestError, None, "this model knows 0..287"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, openai.BadRequestError, "messages", "shorten the prompt"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, openai.BadRequestError, "messages.0.role", "'assistant'"),
    ],
)  # fmt: skip
def test_refusals_are_the_clients_exceptions(
    client: openai.OpenAI, change: dict[str, Any], kind: type[openai.APIStatusError], param: str | None, says: str
) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": HI, **change}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**request)
    assert says in caught.value.message
    assert caught.value.param == param
    with pytest.raises(kind):  # refused before a stream begins, not inside it
        client.chat.completions.create(**request, stream=True)


def test_context_length_error_says_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 200, max_tokens=57)
    assert caught.value.code == "context_length_exceeded"
    assert "256" in caught.value.message
    assert "200" in caught.value.message
    assert "at most 56" in caught.value.message
    ok = client.completions.create(model=MODEL, prompt=[5] * 200, max_tokens=56, extra_body={"ignore_eos": True})
    assert ok.usage is not None
    assert ok.usage.total_tokens == 256
