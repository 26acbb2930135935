"""Going without a network, for this process and those that it starts."""

import os
import sys

_SWITCHES = {"HF_HUB_OFFLINE": "1", "UV_OFFLINE": "1", "PIP_NO_INDEX": "1"}
"""Read by the Hub's client, and by the installers that fetch the demo's model."""


def go_offline() -> None:
    """Forbids downloads: a file that no cache holds is an error that says so."""
    os.environ.update(_SWITCHES)
    if constants := sys.modules.get("huggingface_hub.constants"):
        vars(constants)["HF_HUB_OFFLINE"] = True  # it has read the environment already
