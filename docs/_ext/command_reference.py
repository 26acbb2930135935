"""The directive `command-reference`: every command of the program with its options, as the program tells them."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args, get_origin

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from typer.main import get_command

from elastic_jax.cli import app

PROGRAM = "elastic-jax"


class CommandReference(Directive):
    """A section for each command: what it does, how it is called, and a list of its options."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """The sections."""
        group = get_command(app)
        return [self._section(name, command) for name, command in sorted(_commands(group, PROGRAM))]

    def _section(self, name: str, command: Any) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title("", "", nodes.literal(text=name))
        section += nodes.paragraph(text=(command.help or "").strip())
        usage = " ".join([name, *command.collect_usage_pieces(command.make_context(name, [], resilient_parsing=True))])
        section += nodes.literal_block(usage, usage, language="text")
        options = nodes.definition_list()
        for parameter in command.params:
            options += _described(parameter)
        if options.children:
            section += options
        return section


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The program itself, which has options too, and every command below it."""
    yield name, command
    for own, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{name} {own}")


def _described(parameter: Any) -> nodes.definition_list_item:
    """An argument or option, how it is written, and what it means."""
    is_argument = parameter.param_type_name == "argument"
    written = parameter.name if is_argument else ", ".join(parameter.opts + parameter.secondary_opts)
    if not is_argument and not parameter.is_flag:
        written += f" {parameter.metavar or _kind(parameter.type_descriptor.annotation)}"
    text = parameter.help or ""
    if not is_argument and not parameter.is_flag and parameter.default not in (None, ""):
        text += f" Default: {parameter.default}."
    if parameter.multiple:
        text += " May be repeated."
    return nodes.definition_list_item(
        "", nodes.term("", "", nodes.literal(text=written)), nodes.definition("", nodes.paragraph(text=text.strip()))
    )


def _kind(annotation: Any) -> str:
    """`a|b` for choices, else the type's name: `TEXT`, `INTEGER`, `PATH`."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    inner = [part for part in get_args(annotation) if part is not type(None)]
    if inner:
        return _kind(inner[0])
    return {str: "TEXT", int: "INTEGER", float: "NUMBER"}.get(annotation, "PATH")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-reference", CommandReference)
    return {"parallel_read_safe": True}
