"""Tokenizers and chat templates of Hugging Face folders, with the results of `transformers.AutoTokenizer`.

The folder's tokenizer.json is the truth: its normaliser, model, added tokens and post-processor are used as they stand.
tokenizer_config.json adds the names of the special tokens and, in older folders, the chat template.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.errors import ConfigError
from waypost.model.chat_template import ChatTemplate, Message
from waypost.model.detokenizer import Detokenizer, tidy
from waypost.model.token_bytes import token_bytes

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Fast

    from waypost.model.config import ModelConfig

TOKENIZER_JSON, CONFIG_JSON, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
ASSETS = (TOKENIZER_JSON, CONFIG_JSON, TEMPLATE, SPECIAL_MAP, ADDED)
"""The files that make a tokenizer; only tokenizer.json is required."""
MORE_TEMPLATES = "additional_chat_templates/"
"""Folder of further chat templates, NAME.jinja each."""
LONG_TEXT = 10_000
"""Characters from which on a text is encoded as a batch, which lets go of the interpreter's lock: nobody waits for somebody's
long text. A shorter one is done in two milliseconds."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OUTDATED = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


class Tokenizer:
    """Text to token ids and back. Make one with `from_folder` or `from_assets`; safe to share between threads."""

    def __init__(self, assets: Mapping[str, bytes]) -> None:
        more = sorted(name for name in assets if name.startswith(MORE_TEMPLATES) and name.endswith(".jinja"))
        self._assets = {name: bytes(assets[name]) for name in (*ASSETS, *more) if name in assets}
        if TOKENIZER_JSON not in self._assets:
            raise ConfigError(f"tokenizer: no {TOKENIZER_JSON} among {', '.join(assets) or 'the files'}; it is required")
        self._settings = self._read_settings()
        self._fast = self._build()
        added = self._fast.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._special_ids = {i for i, token in added.items() if token.special}
        tidy_asked = bool(self._settings.get("clean_up_tokenization_spaces"))
        self._tidied = tidy_asked and type(self._fast.model).__name__ != "BPE"  # on BPE it would destroy text

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model folder. ConfigError: there is none, or it is of a kind that has to be converted."""
        folder = Path(path)
        more = [path.relative_to(folder).as_posix() for path in folder.glob(f"{MORE_TEMPLATES}*.jinja")]
        assets = {name: (folder / name).read_bytes() for name in (*ASSETS, *more) if (folder / name).is_file()}
        if TOKENIZER_JSON not in assets:
            old = next((name for name in _OUTDATED if (folder / name).is_file()), None)
            convert = (
                f"; it has {old}, which transformers converts: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                if old
                else "; copy it from the model that the weights come from"
            )
            raise ConfigError(f"{folder}: has no {TOKENIZER_JSON}{convert}")
        return cls(assets)

    @classmethod
    def from_assets(cls, assets: Mapping[str, bytes]) -> Tokenizer:
        """The tokenizer that these files make, by file name; files that are not a tokenizer's are left aside."""
        return cls(assets)

    def assets(self) -> dict[str, bytes]:
        """The files that this tokenizer was made of, byte for byte."""
        return dict(self._assets)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`.

        special=False: text and nothing else. What looks like a special token is ordinary text, and nothing is added
        (transformers: encode(text, add_special_tokens=False, split_special_tokens=True)). For documents and user input.
        special=True: special tokens in the text become their ids, and the tokenizer's own post-processor adds what it
        adds, such as a beginning-of-text token (transformers: encode(text)).
        """
        if len(text) > LONG_TEXT:
            return self.encode_batch([text], special=special)[0]
        fast = self._fast if special else self._literal
        return list(fast.encode(_check(text), add_special_tokens=special).ids)

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        fast = self._fast if special else self._literal
        encodings = fast.encode_batch_fast([_check(text) for text in texts], add_special_tokens=special)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that make no character become U+FFFD; ids beyond the vocabulary leave no trace."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special)
        return tidy(text) if self._tidied else text

    def stream(self, *, skip_special: bool = True) -> Detokenizer:
        """Text of tokens that arrive one by one: push(id) -> str, flush() -> str; joined, they equal `decode` of all."""
        return Detokenizer(
            decode=self._whole,
            skip=self._special_ids if skip_special else (),
            token=self._fast.id_to_token,
            byte_runs="ByteFallback" in json.dumps(self._decoder),
            tidied=self._tidied,
            alone=self._alone,
        )

    def _whole(self, ids: Sequence[int]) -> str:
        """The text of `ids`, those of special tokens included, untidied."""
        return str(self._fast.decode(ids, skip_special_tokens=False))

    @functools.cached_property
    def _alone(self) -> Callable[[int], str]:
        """`_whole` of one id, remembered: there are no more than the vocabulary has."""
        return functools.cache(lambda token_id: self._whole([token_id]))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; a special token stands for its name, an unused id for none."""
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._added_ids else token_bytes(token, self._decoder)

    @functools.cached_property
    def vocab_size(self) -> int:
        """The smallest vocabulary of a model that has room for every token: the highest id plus one."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a text: the tokenizer's end-of-text token, if it names one. A model's config may name more."""
        return [i for i in [self.id_of("eos_token")] if i is not None]

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if the tokenizer names one."""
        return self.id_of("bos_token")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of every special token."""
        return frozenset(self._special_ids)

    def id_of(self, name: str) -> int | None:
        """Id of a special token by its role: bos_token, eos_token, pad_token, unk_token ..."""
        token = self.special_tokens.get(name)
        found: int | None = None if token is None else self._fast.token_to_id(token)
        return found

    @property
    def special_tokens(self) -> dict[str, str]:
        """Role -> token, of the roles that the tokenizer fills."""
        return {name: _content(self._settings[name]) for name in _NAMED if self._settings.get(name) is not None}

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The chat as the text that the model was trained on. `variables` go to the template (enable_thinking=False)."""
        return self._template(tools).render(messages, tools, add_generation_prompt, **variables)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of `render`: special tokens are parsed, nothing is added, since the template wrote them all."""
        text = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self._encoding(text).ids

    def chat_with_mask(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a whole chat: 1 on the tokens that the assistant wrote, its end-of-turn token included.

        By the template's {% generation %} parts; where it has none, by rendering the chat turn by turn (ConfigError if
        the template rewrites earlier turns).
        """
        text, spans = self._template(tools).assistant_spans(messages, tools, **variables)
        encoding = self._encoding(text)
        mask = [0] * len(encoding.ids)
        for start, stop in spans:
            # A blank token may have its offsets trimmed to the empty range after its character.
            inside = [
                index
                for index, (first, last) in enumerate(encoding.offsets)
                if (first < stop and last > start if first < last else start < first <= stop)
            ]
            if inside:
                mask[inside[0] : inside[-1] + 1] = [1] * (inside[-1] + 1 - inside[0])
        return encoding.ids, mask

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of everything that ids and rendered chats depend on; the formatting of the files does not count."""
        parts = [json.loads(self._assets[TOKENIZER_JSON]), self.special_tokens, self._template_texts(), self._tidied]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # How it is put together

    def _read_settings(self) -> dict[str, Any]:
        """tokenizer_config.json; special_tokens_map.json fills in where the former lists no added tokens."""
        settings = self._json(CONFIG_JSON)
        if "added_tokens_decoder" not in settings:
            settings |= self._json(SPECIAL_MAP)
        if not settings.get("extra_special_tokens"):
            settings["extra_special_tokens"] = settings.get("additional_special_tokens")
        return settings

    def _json(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads(self._assets.get(name, b"{}"))
        except ValueError as error:
            raise ConfigError(f"tokenizer: {name} is not valid JSON: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"tokenizer: {name} holds {type(tree).__name__}, expected an object")
        return tree

    def _build(self) -> Fast:
        """The tokenizer of tokenizer.json, with the special tokens that the other files name added where it lacks them."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        try:
            fast = Fast.from_str(self._assets[TOKENIZER_JSON].decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"tokenizer: {TOKENIZER_JSON} cannot be read: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        have = {token.content for token in fast.get_added_tokens_decoder().values()}
        listed = sorted((self._settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
        wanted = [_added(token) for _, token in listed]
        known = {token.content for token in wanted}
        legacy = sorted(self._json(ADDED).items(), key=lambda item: int(item[1])) if not listed else []

        named = [*(self._settings.get(name) for name in _NAMED), *_extra(self._settings.get("extra_special_tokens"))]
        special = [_added(token, special=True) for token in named if token is not None]
        names = {token.content for token in special}
        wanted += [AddedToken(text, special=text in names, normalized=text not in names) for text, _ in legacy]
        wanted += [token for token in special if token.content not in known]
        fast.add_tokens([token for token in wanted if token.content not in have])
        return fast

    @functools.cached_property
    def _decoder(self) -> Any:
        """The decoder's own description; None where there is none."""
        return None if self._fast.decoder is None else json.loads(self._fast.decoder.__getstate__())

    @functools.cached_property
    def _literal(self) -> Fast:
        """A twin to which special tokens in a text are text. (The switch belongs to a tokenizer, not to a call.)"""
        from tokenizers import Tokenizer as Fast

        twin = Fast.from_str(self._fast.to_str())
        twin.encode_special_tokens = True
        return twin

    def _encoding(self, text: str) -> Encoding:
        return self._fast.encode(_check(text), add_special_tokens=False)

    def _template_texts(self) -> dict[str, str]:
        files = {"default": TEMPLATE} if TEMPLATE in self._assets else {}
        files |= {Path(name).stem: name for name in self._assets if name.startswith(MORE_TEMPLATES)}
        if files:
            return {name: self._assets[file].decode("utf-8") for name, file in files.items()}
        given = self._settings.get("chat_template")
        if isinstance(given, list):
            return {str(item["name"]): str(item["template"]) for item in given}
        return {} if given is None else {"default": str(given)}

    @functools.cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        return {name: ChatTemplate(text, self.special_tokens) for name, text in self._template_texts().items()}

    def _template(self, tools: object) -> ChatTemplate:
        """ "tool_use" where there are tools and such a template, else "default"."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ConfigError(
                f"tokenizer: no chat template named '{name}' (it has: {', '.join(self._templates) or 'none'}); "
                f"put a {TEMPLATE} beside {TOKENIZER_JSON}, or give plain text instead of messages"
            )
        return self._templates[name]


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _added(token: Any, special: bool = False) -> Any:
    from tokenizers import AddedToken

    if not isinstance(token, Mapping):
        return AddedToken(str(token), special=special, normalized=not special)
    flags = {key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token}
    return AddedToken(_content(token), special=special or bool(token.get("special")), **flags)


def _extra(tokens: Any) -> list[Any]:
    """extra_special_tokens: a list, or a mapping of roles."""
    return list(tokens.values()) if isinstance(tokens, Mapping) else list(tokens or [])


def _check(text: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"tokenizer: {type(text).__name__} given, expected text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"tokenizer: character {error.start} of the text is half of a surrogate pair (U+{ord(text[error.start]):04X}), "
                "which is no character; repair or drop it"
            ) from error
    return text


def check_fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """ConfigError where a token's id, or a special id of the config, lies beyond the model's vocabulary."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model a vocabulary of {config.vocab_size}; "
            f"take the tokenizer that belongs to the model, or a model with vocab_size >= {tokenizer.vocab_size}"
        )
    named = [("bos_token_id", config.bos_token_id), *(("eos_token_id", i) for i in config.eos_token_ids)]
    for name, value in named:
        if value is not None and not 0 <= value < config.vocab_size:
            raise ConfigError(f"config.json: {name}={value} is outside the vocabulary of {config.vocab_size}")
