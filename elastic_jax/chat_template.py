"""Renders a model's chat template as transformers does, without importing it: that takes two seconds.

What a template may use is described in transformers' documentation, "Writing a chat template": Jinja in a sandbox with
block trimming, loop controls, `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML, `{% generation %}`.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from elastic_jax.errors import RequestError, TokenizerError

Message = Mapping[str, Any]


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; here they are just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. It is code from a model's author, hence the sandbox, and plain data only as arguments.

    Args:
        source: the template's text.
        origin: where it was read, for messages.
        special_tokens: what `bos_token`, `eos_token` and so on are in the template.

    Raises:
        TokenizerError: the template is not valid Jinja.
    """

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{origin}: the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: each has a `role` and a `content`: a string, or a list of parts with a `type`. An assistant's may
                have `tool_calls` instead of a content.
            add_generation_prompt: end with what begins an assistant's answer.
            tools: JSON schemas of functions that the model may call.

        Raises:
            RequestError: messages are malformed, or the template refuses them (its own words are in the error).
        """
        check_messages(messages)
        try:
            # Through JSON, so that the template gets no object with methods.
            plain = json.loads(
                json.dumps({"messages": list(messages), "tools": None if tools is None else list(tools)})
            )
        except (TypeError, ValueError) as error:
            raise RequestError(f"chat messages and tools must be plain JSON data: {error}") from error
        try:
            return self._template.render(
                **plain, documents=None, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"the chat template ({self._origin}) refuses these messages: {error}") from error


def check_messages(messages: Sequence[Message]) -> None:
    """Checks that messages have roles and contents.

    Raises:
        RequestError: one has not, or there is none.
    """
    if not messages:
        raise RequestError("a conversation needs at least one message, found none")
    for index, message in enumerate(messages):
        where = f"chat message {index}"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where}: expected a mapping with role and content, found {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise RequestError(f"{where}: expected a role (system, user, assistant, ...), found {role!r}")
        if content is None and message.get("tool_calls"):
            continue
        parts = isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content)
        if not isinstance(content, str) and not parts:
            raise RequestError(f"{where} ({role}): expected content: text, or parts with a type; found {content!r:.80}")
