"""The tokenizer of a checkpoint: text to token ids and back, conversations, and the ids that mean something.

It reads the files that transformers' AutoTokenizer reads and gives the ids that it gives, through the same `tokenizers`
library, but needs 0.2 s instead of 2 s to import. Two things differ, both on purpose: a tokenizer.json is taken as it
is whatever class tokenizer_config.json names, and a wrong Mistral pre-tokenizer is corrected or refused
(`elastic_jax.mistral_pattern`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from elastic_jax.chat_template import ChatTemplate, Message, check_messages
from elastic_jax.detokenizer import DecoderScheme, Detokenizer
from elastic_jax.errors import RequestError, TokenizerError
from elastic_jax.mistral_chat import TEKKEN_JSON, MistralChat
from elastic_jax.mistral_pattern import correct_pattern

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

COMPLETE_TOKENIZER = (
    "A folder with only tokenizer.model is completed by "
    "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
)


class Tokenizer:
    """A byte-level or sentencepiece-like BPE tokenizer with its special tokens and chat template. Made by `load`.

    Attributes:
        bos_token_id: beginning of sequence, or None.
        eos_token_ids: what ends a generation: generation_config.json's, else tokenizer_config.json's `eos_token`.
        pad_token_id: padding, or None.
        special_ids: every special token.
        vocab_size: one more than the largest id. A model's own vocabulary may be padded beyond it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        scheme: DecoderScheme,
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None,
        folder: Path,
    ) -> None:
        self._backend = backend
        self._scheme = scheme
        self._chat_template = chat_template
        self._folder = folder
        self._mistral_chat = MistralChat(folder / TEKKEN_JSON)
        self.bos_token_id = _optional_id(backend, special_tokens.get("bos_token"))
        self.pad_token_id = _optional_id(backend, special_tokens.get("pad_token"))
        self.eos_token_ids = eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        mask = backend.encode("a", add_special_tokens=True).special_tokens_mask
        self._prefix_length = [*mask, 0].index(0)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads tokenizer.json and, where present, tokenizer_config.json, chat_template.jinja, generation_config.json.

        Raises:
            TokenizerError: a file is missing or malformed, or describes something that is not implemented.
        """
        source = path / "tokenizer.json"
        if not source.is_file():
            raise TokenizerError(f"{path}: expected tokenizer.json, found {_names(path)}. {COMPLETE_TOKENIZER}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(source))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise TokenizerError(f"{source}: cannot be read as a tokenizer: {error}") from error
        if type(backend.model).__name__ != "BPE":
            raise TokenizerError(f"{source}: expected a BPE model, found {type(backend.model).__name__}")
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(path / "tokenizer_config.json")
        special_tokens = _special_tokens(path, config)
        _mark_special(backend, special_tokens, source)
        correct_pattern(backend, path, config.get("fix_mistral_regex"), str(source))
        return cls(
            backend=backend,
            scheme=DecoderScheme.of(backend, source),
            special_tokens=special_tokens,
            eos_token_ids=_eos_token_ids(path, backend, special_tokens),
            chat_template=_chat_template(path, config, special_tokens),
            folder=path,
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Special tokens that are written out in it are recognized, as in transformers.

        Args:
            text: any text.
            add_special_tokens: add those that the post-processor of tokenizer.json puts round a text, usually a BOS.
                (`add_bos_token` in tokenizer_config.json means nothing beside a tokenizer.json, as in transformers 5.)

        Raises:
            RequestError: the text is not Unicode (it holds half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"text is not valid Unicode: a lone surrogate at character {error.start}") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context with its BOS, and of what continues it, for scoring.

        The whole text is encoded and cut at the length that the context has by itself, after white space at the end of
        the context was moved to the continuation: the rule of lm-evaluation-harness, whose continuation ids these are.
        (Its context ids differ where a token spans the cut; here both together always are the text's own encoding.) An
        empty context is the BOS token, also where the tokenizer adds none, else the first EOS token.

        Raises:
            RequestError: the continuation is left without a token, or there is neither BOS nor EOS for no context.
        """
        stripped = context.rstrip()
        prefix = self.encode(stripped, add_special_tokens=True)[: self._prefix_length]
        whole = self.encode(context + continuation, add_special_tokens=False)
        length = len(self.encode(stripped, add_special_tokens=False))
        if not prefix and not length:
            starts = [self.bos_token_id] if self.bos_token_id is not None else list(self.eos_token_ids[:1])
            if not starts:
                raise RequestError("the context is empty, and the tokenizer has no token to begin with")
            prefix = starts
        if len(whole) <= length:
            raise RequestError(
                f"the continuation {continuation!r:.80} has no token of its own after the context's last characters "
                f"{context[-40:]!r}: it is empty, or merges into the context's last token"
            )
        return prefix + whole[:length], whole[length:]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, ids that the vocabulary lacks give nothing.

        Raises:
            RequestError: an id is negative.
        """
        for token_id in token_ids:
            if token_id < 0:
                raise RequestError(f"token ids are not negative, found {token_id}")
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """Decodes one growing sequence piece by piece; all pieces together are what `decode` gives."""
        return Detokenizer(self._backend, self._scheme, self.special_ids if skip_special_tokens else frozenset())

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation; see `ChatTemplate.render` for the messages.

        Raises:
            TokenizerError: the model has no chat template.
            RequestError: messages are malformed, or the template refuses them.
        """
        if self._chat_template is None:
            raise TokenizerError(
                f"{self._folder}: the model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); give a prompt as text instead"
            )
        return self._chat_template.render(messages, add_generation_prompt, tools)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; the template writes its own special tokens, so none are added.

        Without a template, but with a tekken.json, mistral-common encodes it (`mistral_chat`).

        Raises:
            TokenizerError: the model has no chat template, and mistral-common cannot serve.
            RequestError: messages are malformed, or the template refuses them.
        """
        if self._chat_template is None and add_generation_prompt and (self._folder / TEKKEN_JSON).is_file():
            check_messages(messages)
            return self._mistral_chat.encode(messages, tools)
        return self.encode(self.render_chat(messages, add_generation_prompt, tools), add_special_tokens=False)


def _names(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing" if folder.is_dir() else "no folder"


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _optional_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens, each a string or an object with `content`; tokenizer_config.json has precedence."""
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    tokens = {name: named[name] for name in SPECIAL_NAMES if named.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}


def _mark_special(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], source: Path) -> None:
    """Named special tokens are recognized in text even if tokenizer.json lists them as ordinary ones."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for name, token in special_tokens.items():
        if backend.token_to_id(token) is None:
            raise TokenizerError(f"{source}: lacks {token!r}, which tokenizer_config.json names as {name}")
        if token not in special:
            backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])


def _eos_token_ids(folder: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> tuple[int, ...]:
    found = _read_json(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        token_id = _optional_id(backend, special_tokens.get("eos_token"))
        return () if token_id is None else (token_id,)
    return tuple(found) if isinstance(found, list) else (found,)


def _chat_template(folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """From chat_template.jinja, else tokenizer_config.json, else chat_template.json (a processor's)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), file.name, special_tokens)
    values = {"tokenizer_config.json": config, "chat_template.json": _read_json(folder / "chat_template.json")}
    for name, holder in values.items():
        template = holder.get("chat_template")
        if isinstance(template, list):
            # Several templates by name: the one for conversations is called "default".
            template = {each["name"]: each["template"] for each in template}.get("default")
        if template is not None:
            return ChatTemplate(template, name, special_tokens)
    return None
