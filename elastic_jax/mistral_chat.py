"""Conversations of Mistral models without a chat template: encoded by mistral-common, Mistral's own reference.

Newer Mistral models are published with a tekken.json and no chat template. mistral-common reads it, and writes system
prompts, tools, calls and their results as the version of the format that it names says (v7 for Small-3.1). It is not
among the dependencies of this package: the extra `mistral` installs it.
"""

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_jax.chat_template import Message
from elastic_jax.errors import RequestError, TokenizerError

TEKKEN_JSON = "tekken.json"


class MistralChat:
    """Encodes conversations; reads the vocabulary when it is first asked.

    Args:
        file: the model's tekken.json.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tokenizer: Any = None

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        """Token ids of a conversation that an assistant's answer follows.

        Args:
            messages: in OpenAI's form: `role` and `content`, `tool_calls` of assistants, `tool_call_id` of results.
            tools: JSON schemas of functions, in OpenAI's form.

        Raises:
            TokenizerError: mistral-common is not installed, or cannot read the file.
            RequestError: the conversation has something other than text, or mistral-common refuses it.
        """
        request_class = self._load()
        for index, message in enumerate(messages):
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if part.get("type") != "text":
                    raise RequestError(f"chat message {index}: only text can be read, found a {part.get('type')!r}")
        try:
            # Through JSON, so that what is not plain data is refused here.
            plain = json.loads(json.dumps({"messages": list(messages), "tools": list(tools) if tools else None}))
            request = request_class.from_openai(plain["messages"], tools=plain["tools"])
            return list(self._tokenizer.encode_chat_completion(request).tokens)
        except Exception as error:  # pydantic's, and a family of its own without a common base
            raise RequestError(f"mistral-common refuses this conversation: {error}") from error

    def _load(self) -> Any:
        if importlib.util.find_spec("mistral_common") is None:
            raise TokenizerError(
                f"{self._file.parent}: the model has no chat template; its conversations are encoded by mistral-common "
                "from tekken.json, and that is not installed: pip install 'elastic-jax[mistral]' (or "
                "mistral-common), or give a prompt as text"
            )
        protocol = importlib.import_module("mistral_common.protocol.instruct.request")
        if self._tokenizer is None:
            reader = importlib.import_module("mistral_common.tokens.tokenizers.mistral").MistralTokenizer
            try:
                self._tokenizer = reader.from_file(str(self._file))
            except Exception as error:
                raise TokenizerError(f"{self._file}: mistral-common cannot read it: {error}") from error
        return protocol.ChatCompletionRequest
