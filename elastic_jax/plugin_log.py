"""JAX's plugins that do not start. JAX logs a traceback and uses the CPU; the commands keep the reason, and say a line.

Whoever uses this project as a library sees what JAX logs, since its logging is theirs. JAX is not imported here.
"""

import logging
from collections.abc import Callable

_LOGGER = logging.getLogger("jax._src.xla_bridge")
_BEGINNING = "Jax plugin configuration error"  # jax 0.11.2; of other words JAX's own log shows
_NAMES = {"xla_cuda13": "CUDA 13", "xla_cuda12": "CUDA 12"}


class _Keeper(logging.Filter):
    """Takes records about plugins out of JAX's log.

    Attributes:
        failures: a sentence for each plugin that did not start.
        say: is told once why JAX uses the CPU; None tells nobody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: list[str] = []
        self.say: Callable[[str], None] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith(_BEGINNING):
            return True
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            why = _one_line(record.msg % record.args if record.args else record.msg)
        else:
            why = _one_line(error) or type(error).__name__
        named = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        name = next((known for part, known in _NAMES.items() if part in named), named)
        self.failures.append(f"the plugin {f'for {name} ' if name else ''}does not start: {why}")
        return False


_keeper = _Keeper()


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def keep(say: Callable[[str], None] | None) -> None:
    """Keeps failures of plugins from now on, instead of letting JAX log them.

    Args:
        say: is told, once, when a command uses the CPU because of them (`tell`); None tells nobody.
    """
    if _keeper not in _LOGGER.filters:
        _LOGGER.addFilter(_keeper)
    _keeper.say = say


def failures() -> tuple[str, ...]:
    """What was kept; JAX looks for its plugins when it is first asked for devices."""
    return tuple(_keeper.failures)


def tell() -> None:
    """Says, the first time, that the CPU is used, and why; nothing if every plugin started."""
    say, _keeper.say = _keeper.say, None
    if say is not None and _keeper.failures:
        say(
            f"note: JAX uses the CPU: {'; '.join(_keeper.failures)} (`elastic-jax doctor` says what to do; with "
            "JAX_PLATFORMS=cpu the CPU is what was asked for)"
        )
