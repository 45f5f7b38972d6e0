"""Tokenizers of every kind against transformers.AutoTokenizer, and text streamed token by token."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_tokenizers import KINDS, files
from transformers import AutoTokenizer

from waypost.core.errors import ConfigError
from waypost.model.tokenizer import LONG_TEXT, Tokenizer, check_fits
from waypost.testing.tiny import SPECIAL, VOCAB_SIZE, tiny_assets, tiny_config, tiny_tokenizer

PIECES = (
    *("<|bos|>", "<|im_start|>", "<|im_end|>", "<think>", "<tab>", "<s>", "</s>", "<unk>", "<|late|>", "<extra>", "[SEP]"),
    *("<0x0A>", " ", "  ", "\n", "the", "Don't", " isn't 's", " ' ", " .", " ,", "a", "42"),
    *("\u65e5\u672c", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "e\u0301", "\u2581", "\ufffd", "caf\u00e9 \u65e5", "\x00"),
)
text = st.text(max_size=30) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)

_OURS: dict[str, Tokenizer] = {}
_THEIRS: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in KINDS:
        folder = write(tmp_path_factory.mktemp(kind), files(kind))
        _OURS[kind], _THEIRS[kind] = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def write(folder: Path, assets: dict[str, bytes]) -> Path:
    for name, data in assets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=text)
def test_encode_and_decode_as_transformers_do(kind: str, text: str) -> None:
    ours, theirs = _OURS[kind], _THEIRS[kind]
    ids = ours.encode(text, special=True)
    assert ids == theirs.encode(text)
    literal = ours.encode(text)
    assert literal == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    for tokens in (ids, literal, ids[1:], literal[:-1]):
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
        assert ours.decode(tokens, skip_special=False) == theirs.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_as_transformers_has_them(kind: str) -> None:
    ours, theirs = _OURS[kind], _THEIRS[kind]
    assert ours.vocab_size == len(theirs) == max(theirs.get_vocab().values()) + 1
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == [theirs.eos_token_id]
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.special_ids >= set(theirs.all_special_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(texts=st.lists(text, max_size=5))
def test_a_batch_is_its_texts(kind: str, texts: list[str]) -> None:
    ours = _OURS[kind]
    for special in (False, True):
        assert ours.encode_batch(texts, special=special) == [ours.encode(t, special=special) for t in texts]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_the_ids_of_the_plain_call(kind: str, special: bool) -> None:
    ours = _OURS[kind]
    some = "".join(ours.special_tokens.values()) + " W\u00f6rter, \U0001f469\u200d\U0001f467 and \tnumbers 12345\n"
    long = some * (LONG_TEXT // len(some) + 1)
    assert len(long) > LONG_TEXT
    fast = ours._fast if special else ours._literal
    assert ours.encode(long, special=special) == fast.encode(long, add_special_tokens=special).ids


def test_a_long_text_leaves_the_interpreter_to_others() -> None:
    turns, over = 0, False

    def count() -> None:
        nonlocal turns
        while not over:
            turns += 1
            time.sleep(0)  # lets go of the lock

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody is made to let go of it
    try:
        thread.start()
        before = turns
        _OURS[KINDS[0]].encode("some words " * 100_000)
        assert turns > before
    finally:
        over = True
        sys.setswitchinterval(interval)
        thread.join()


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special=skip_special)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_tokens_joins_to_their_text(kind: str, data: st.DataObject, skip: bool) -> None:
    ours = _OURS[kind]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 1), max_size=30))
    assert "".join(streamed(ours, ids, skip)) == ours.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=text)
@example(text="\U0001f469\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e e\u0301 \x00")
def test_a_stream_shows_no_half_character(kind: str, text: str) -> None:
    ours = _OURS[kind]
    ids = ours.encode(text, special=True)
    pieces = streamed(ours, ids)
    whole = ours.decode(ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_hands_out_each_character_as_soon_as_it_is_whole() -> None:
    ours = _OURS["byte-level"]
    ids = ours.encode("a\U0001f680b")
    assert len(ids) == 5  # two of the four bytes are one token
    assert streamed(ours, ids) == ["a", "", "", "\U0001f680", "b", ""]


def test_a_stream_of_byte_tokens_waits_for_the_end_of_the_run() -> None:
    ours = _OURS["llama"]
    ids = [i for i in ours.encode("x\u00df\u00dfy") if i != ours.encode("x")[0]]
    pieces = streamed(ours, ids)
    assert "".join(pieces) == "x\u00df\u00dfy"
    assert pieces[1:5] == [""] * 4  # a bad byte further on would spoil the whole run
    bad = [*ids[1:4], ids[-1]]
    assert "".join(streamed(ours, bad)) == ours.decode(bad) == "\ufffd\ufffd\ufffdy"


def test_bytes_that_never_complete_come_out_as_replacement_at_the_end() -> None:
    ours = _OURS["byte-level"]
    first = ours.encode("\U0001f680")[:2]
    stream = ours.stream()
    assert [stream.push(i) for i in first] == ["", ""]
    assert stream.flush() == ours.decode(first) == "\ufffd"
    assert stream.flush() == ""  # as new
    assert stream.push(ours.encode("a")[0]) == "a"


def test_special_tokens_leave_a_stream_only_where_asked() -> None:
    ours = tiny_tokenizer()
    ids = ours.encode("hi<|im_end|>", special=True)
    assert "".join(streamed(ours, ids)) == "hi"
    assert "".join(streamed(ours, ids, skip_special=False)) == "hi<|im_end|>"


def test_special_tokens_in_plain_text_are_text() -> None:
    ours = tiny_tokenizer()
    assert ours.encode("<|im_end|>", special=True) == [2]
    assert 2 not in ours.encode("<|im_end|>")
    assert ours.decode(ours.encode("<|im_end|>")) == "<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_assets_make_the_same_tokenizer(kind: str) -> None:
    ours = _OURS[kind]
    again = Tokenizer.from_assets(ours.assets())
    assert again.assets() == ours.assets() == files(kind)
    assert again.fingerprint == ours.fingerprint
    assert again.encode("The waves\n<|im_end|>", special=True) == ours.encode("The waves\n<|im_end|>", special=True)


def test_a_fingerprint_is_of_the_content_not_of_its_spelling() -> None:
    assets = tiny_assets()
    print_ = Tokenizer(assets).fingerprint
    respelled = {**assets, "tokenizer.json": json.dumps(json.loads(assets["tokenizer.json"])).encode()}
    assert Tokenizer(respelled).fingerprint == print_
    other_template = {**assets, "chat_template.jinja": assets["chat_template.jinja"] + b" "}
    other_token = {**assets, "tokenizer.json": assets["tokenizer.json"].replace(b"<|im_start|>", b"<|im_begin|>")}
    other_role = {**assets, "tokenizer_config.json": assets["tokenizer_config.json"].replace(b"im_end", b"im_start")}
    assert len({Tokenizer(a).fingerprint for a in (other_template, other_token, other_role)} | {print_}) == 4


def test_fingerprints_of_all_kinds_differ() -> None:
    assert len({_OURS[kind].fingerprint for kind in KINDS}) == len(KINDS)


def test_older_folders_name_special_tokens_elsewhere(tmp_path: Path) -> None:
    assets = dict(files("llama"))
    settings_ = json.loads(assets["tokenizer_config.json"])
    names = {name: settings_.pop(name) for name in ("bos_token", "eos_token", "unk_token")}
    names["eos_token"] = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    assets["tokenizer_config.json"] = json.dumps(settings_).encode()
    assets["special_tokens_map.json"] = json.dumps(names).encode()
    assets["added_tokens.json"] = json.dumps({"<new>": Tokenizer(files("llama")).vocab_size}).encode()
    ours, theirs = Tokenizer.from_folder(write(tmp_path, assets)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.encode("a<new>b</s>", special=True) == theirs.encode("a<new>b</s>")
    assert ours.vocab_size == len(theirs)


def test_a_tokenizer_must_fit_the_model() -> None:
    tokenizer = tiny_tokenizer()
    check_fits(tokenizer, tiny_config())
    check_fits(tokenizer, tiny_config(vocab_size=VOCAB_SIZE + 32))  # a padded vocabulary
    with pytest.raises(ConfigError, match=f"ids up to {VOCAB_SIZE - 1}.*vocabulary of {VOCAB_SIZE - 1}"):
        check_fits(tokenizer, tiny_config(vocab_size=VOCAB_SIZE - 1))
    with pytest.raises(ConfigError, match="eos_token_id=999"):
        check_fits(tokenizer, tiny_config(eos_token_id=[1, 999]))


@pytest.mark.parametrize(
    ("assets", "match"),
    [
        ({}, "has no tokenizer.json; copy it"),
        ({"tokenizer.model": b"x"}, "tokenizer.model, which transformers converts"),
        ({"tokenizer.json": b"{}"}, "cannot be read"),
        ({"tokenizer.json": b"\xff\xfe"}, "cannot be read"),
        ({**tiny_assets(), "tokenizer_config.json": b"["}, "tokenizer_config.json is not valid JSON"),
        ({**tiny_assets(), "tokenizer_config.json": b"[]"}, "tokenizer_config.json holds list"),
    ],
)
def test_broken_files_are_named(assets: dict[str, bytes], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        Tokenizer.from_folder(write(tmp_path, assets))


def test_text_that_is_none_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="surrogate"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ConfigError, match="int given"):
        tokenizer.encode_batch(["a", 3])  # type: ignore[list-item]


def test_truncation_and_padding_stored_in_a_file_are_not_applied(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(tiny_assets()["tokenizer.json"].decode())
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    assets = {**tiny_assets(), "tokenizer.json": fast.to_str().encode()}
    assert Tokenizer(assets).encode("a longer text than four") == tiny_tokenizer().encode("a longer text than four")


def test_the_tiny_tokenizer_is_what_it_says() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert [tokenizer.encode(token, special=True) for token in SPECIAL] == [[0], [1], [2]]
    assert tokenizer.fingerprint == tiny_tokenizer().fingerprint
