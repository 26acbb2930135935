"""The `doctor` command."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from elastic_jax.cli_options import JsonOption, print_value

_MARKS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="An Elastic checkpoint to look at too.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine: what is there, what is wrong, and the command that mends it. Status 1 if something is."""
    from elastic_jax import plugin_log
    from elastic_jax.doctor import Finding, examine

    plugin_log.keep(None)  # it is one of the findings
    findings = examine(checkpoint)
    wrong = sum(finding.status == "wrong" for finding in findings)

    def line(finding: Finding) -> str:
        mend = f"\n{'':18s}-> {finding.mend}" if finding.mend else ""
        return f"{_MARKS[finding.status]}  {finding.name:11s} {finding.found}{mend}"

    verdict = f"{wrong} of {len(findings)} findings need mending" if wrong else "nothing is wrong"
    print_value(
        {"findings": [dataclasses.asdict(finding) for finding in findings], "wrong": wrong},
        as_json,
        lambda: "\n".join([*map(line, findings), verdict]),
    )
    if wrong:
        raise typer.Exit(1)
