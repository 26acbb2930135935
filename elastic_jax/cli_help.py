"""Help as plain text: importing what draws it in boxes takes longer than all else that `--help` does."""

from typing import Any

from typer.core import TyperGroup

_WHOLE = 1000
"""Characters: no summary is cut."""


class Commands(TyperGroup):
    """Commands whose list has whole summaries, where click cuts them to one line each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list."""
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        shown = [
            (name, command.get_short_help_str(_WHOLE)) for name, command in found if command and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(shown)
