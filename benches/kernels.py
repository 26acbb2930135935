"""Each kernel against what the device can do at most, measured in the same run (`limits.py`).

Method. A case is one implementation of a kernel on one piece of work of Mistral-Small-3.1-24B's step: by default the
implementations that are the default on this device, with --references also the plain-XLA ones. It is checked against a
reference by another route, on random numbers (`error`; a wrong one is not timed), then timed: one call holds several
layers with memory of their own, so that nothing comes from the L2 cache that would not in a model; as many calls as
fill 50 ms are put in flight and waited for once, five times after as long a warm-up. The median counts. `read_tb_s`
counts what must go through memory once (weights, live keys and values, logits; of rounding, what is written too),
`top_s` two operations for each product; `fraction_of_limit` is the larger of the two times that the limits allow over
the time taken, `bound` says which it is.

Cases that tell most come first, so --minutes leaves out the least. Many are compiled at once, and nothing is timed
meanwhile. The result is written after every row. A case that is wrong, or cannot be compiled or run, is in `failed`
with its error, and the status is 1.

A kernel's cases are in `kernel_cases_*.py`; to add one, add it to TABLE. `attention.py`, `integer_dot.py` and
`decode_tiles.py` try sizes of kernels; this bench tells where they stand.

    python benches/kernels.py --out benches/results/<device>/kernels.json [--only integer_dot]
    python benches/kernels.py --lower        # on any machine: traces every case for an H100, runs nothing
    python benches/kernels.py --small        # a tiny model on a CPU, to check this script
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import report, write
from kernel_case import Case, Place, fraction
from kernel_cases_attention import attentions
from kernel_cases_decode import decode_heads, decode_layers
from kernel_cases_dot import bf16_dots, integer_dots
from kernel_cases_quantize import roundings
from kernel_cases_sampling import samplings
from limits import dot_limit, read_limit, seconds
from random_model import MISTRAL_SMALL, SMALL

from elastic_jax.executables import default_compiler_options

TABLE: dict[str, Callable[[Place], Iterable[Case]]] = {
    "decode_layer": decode_layers,
    "decode_head": decode_heads,
    "integer_dot": integer_dots,
    "bf16_dot": bf16_dots,
    "quantize": roundings,
    "attention": attentions,
    "sampling": samplings,
}

REPEATS = 5
SEED = np.uint32(1)


class WrongError(Exception):
    """A kernel does not compute what its reference does."""


def cases_of(place: Place, only: Sequence[str] | None) -> list[Case]:
    """Every case that is measured here, in the order of TABLE."""
    return [case for name, make in TABLE.items() if not only or name in only for case in make(place)]


def in_turn(cases: Iterable[Case]) -> list[Case]:
    """In the order in which they are measured: of each turn, one of each kernel after the other."""
    found, number = [], dict.fromkeys(TABLE, 0)
    for case in cases:
        found.append((case.turn, number[case.kernel], case))
        number[case.kernel] += 1
    return [case for *_, case in sorted(found, key=lambda entry: entry[:2])]


def compared(case: Case) -> Callable[[Any, Any, Any], Any]:
    """(results, what was updated, what the reference gives) -> the error."""
    return lambda out, state, expected: case.error(case.outcome(out, state), expected)


class Compiled:
    """A case's programs; none has run.

    Args:
        case: the case.
        platform: whose options they are compiled with.
    """

    def __init__(self, case: Case, platform: str) -> None:
        self.case = case
        options = default_compiler_options(platform)
        # What makes the numbers need not be fast, and choosing among kernels takes seconds.
        quick = options | ({"xla_gpu_autotune_level": 0} if platform == "gpu" else {})
        shapes = jax.eval_shape(case.draw, SEED)
        self.operands = jax.jit(case.draw).lower(SEED).compile(compiler_options=quick)
        call = jax.jit(case.call, donate_argnums=1).lower(*shapes)
        self.call = call.compile(compiler_options=options)
        reference = jax.jit(case.reference).lower(*shapes)
        self.reference = reference.compile(compiler_options=options)
        error = jax.jit(compared(case)).lower(*call.out_info, reference.out_info)
        self.error = error.compile(compiler_options=quick)

    def measure(self, limits: dict[str, float]) -> dict[str, Any]:
        """Checks and times it.

        Raises:
            WrongError: it is wrong.
        """
        case = self.case
        given, state = self.operands(SEED)
        expected = self.reference(given, state)
        out, state = self.call(given, state)
        error = float(self.error(out, state, expected))
        del out, expected
        if not error <= case.tolerance:
            raise WrongError(f"{case.name}: wrong by {error:.3g}, at most {case.tolerance:.3g} is allowed")

        def again() -> Any:
            nonlocal state
            out, state = self.call(given, state)
            return out

        took = float(np.median(seconds(again, REPEATS))) / case.layers
        bound, part = fraction(case, took, limits)
        return {
            "kernel": case.kernel,
            "implementation": case.implementation,
            "work": case.work,
            "us": took * 1e6,
            "read_tb_s": case.read_bytes / took / 1e12,
            "top_s": case.operations / took / 1e12,
            "bound": bound,
            "fraction_of_limit": part,
            "error": error,
        }


def attempt[T](function: Callable[[], T]) -> T | Exception:
    """What it returns, or what it raises: one case must not end the others."""
    try:
        return function()
    except Exception as error:
        return error


def run(
    cases: Sequence[Case], platform: str, limits: dict[str, float], threads: int, end: float, save: Callable[..., None]
) -> tuple[list[dict[str, Any]], list[dict[str, str]], list[str]]:
    """Measures cases in batches; `save` gets rows, failures and what is left after each case."""
    order = {case.name: number for number, case in enumerate(cases)}
    rows: dict[str, dict[str, Any]] = {}
    failed: list[dict[str, str]] = []
    waiting = in_turn(cases)

    def state() -> tuple[list[dict[str, Any]], list[dict[str, str]], list[str]]:
        return [rows[name] for name in sorted(rows, key=order.__getitem__)], failed, [case.name for case in waiting]

    with ThreadPoolExecutor(threads) as pool:
        while waiting and time.time() < end:
            # All are compiled before the first is timed, so that nothing else runs then.
            batch = waiting[: 2 * threads]
            made = list(pool.map(lambda case: attempt(functools.partial(Compiled, case, platform)), batch))
            made.reverse()
            for case in batch:
                found = made.pop()  # so that nothing holds its programs longer
                if isinstance(found, Compiled):
                    found = attempt(functools.partial(found.measure, limits))
                waiting.remove(case)
                if isinstance(found, Exception):
                    failed.append({"case": case.name, "error": f"{type(found).__name__}: {found}"})
                    print("failed", failed[-1], flush=True)
                else:
                    rows[case.name] = found
                    print(found, flush=True)
                save(*state())
    return state()


def lower(cases: Sequence[Case], device: Any) -> list[str]:
    """Traces every case for a device that need not be there; returns those that cannot be."""
    wrong = []
    for case in cases:
        found = attempt(functools.partial(lowered, case, device))
        print(f"{case.name}: {found if isinstance(found, Exception) else 'can be lowered'}", flush=True)
        if isinstance(found, Exception):
            wrong.append(case.name)
    return wrong


def lowered(case: Case, device: Any) -> str:
    """The call of a case as text."""
    shapes = jax.eval_shape(case.draw, SEED)
    with jax.default_device(device):
        call = jax.jit(case.call, donate_argnums=1).trace(*shapes).lower(lowering_platforms=("cuda",))
        expected = jax.eval_shape(case.reference, *shapes)
        jax.eval_shape(compared(case), *call.out_info, expected)
    return call.as_text()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLE, help="these kernels")
    parser.add_argument("--references", action="store_true", help="measure the plain-XLA implementations too")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cases compiled at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no batch after that")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check this script")
    parser.add_argument("--lower", metavar="TARGET", nargs="?", const="h100", help="only trace, for an absent GPU")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    end = time.time() + 60 * arguments.minutes
    config = SMALL if arguments.small else MISTRAL_SMALL
    if arguments.lower:
        from aot_cache.targets import absent_device, find

        jax.config.update("jax_platforms", "cpu")
        device = absent_device(find(arguments.lower))
        place = Place.of(device, config, references=arguments.references)
        sys.exit(1 if lower(cases_of(place, arguments.only), device) else 0)
    device = jax.devices()[0]
    limits = {"read": read_limit(device), **{kind: dot_limit(device, kind) for kind in ("int8", "bf16")}}
    print({name: f"{value / 1e12:.2f}" for name, value in limits.items()}, "TB/s, TOP/s", flush=True)
    told = {"read_tb_s": limits["read"] / 1e12, **{f"{k}_top_s": limits[k] / 1e12 for k in ("int8", "bf16")}}
    cases = cases_of(Place.of(device, config, references=arguments.references), arguments.only)

    def save(rows: list[dict[str, Any]], failed: list[dict[str, str]], left: list[str]) -> None:
        write(rows, {"bench": "kernels", "limits": told, "left_out": left, "failed": failed}, arguments.out)

    rows, failed, left = run(cases, device.platform, limits, arguments.threads, end, save)
    if rows:
        report(rows, {"bench": "kernels", "limits": told, "left_out": left, "failed": failed}, arguments.out)
    print(json.dumps({"measured": len(rows), "failed": len(failed), "left_out": len(left)}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
