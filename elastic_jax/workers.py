"""How many threads work where nobody says. Apart, so that the command line's `--help` imports nothing else."""

import os

_MOST = 16
"""Reading and compiling gain little from more, and each thread needs memory."""


def default_workers() -> int:
    """One per processor core, 16 at most."""
    return min(os.cpu_count() or 1, _MOST)
