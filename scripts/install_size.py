"""Prints the wheels that a base installation for the CPU downloads, and their sizes; nothing is downloaded.

    make install-size                 # or: uv run python scripts/install_size.py [--limit-mb 250]

Packages, versions and sizes are those of uv.lock; of each the wheel that fits this Python and platform best counts, as
an installer would choose it. Status 1 if all together are more than the limit.
"""

import argparse
import dataclasses
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "elastic-jax"
LIMIT_MB = 250.0
"""MB of 10**6 bytes."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """What is downloaded for one package.

    Attributes:
        package: its name.
        version: its version.
        file: the wheel's name.
        size: in bytes.
    """

    package: str
    version: str
    file: str
    size: int


def base_wheels(lock: Mapping[str, Any], tags: Sequence[Tag], environment: Mapping[str, str]) -> list[Wheel]:
    """The wheels of the base installation, largest first.

    Args:
        lock: uv.lock.
        tags: what wheels may be for, best first.
        environment: what markers are evaluated with, besides this interpreter's own values.

    Raises:
        ValueError: the lock file lacks a package, or a wheel of one.
    """
    order = {tag: number for number, tag in enumerate(tags)}
    found = [_best(package, order) for package in _installed(lock["package"], environment)]
    return sorted(found, key=lambda wheel: wheel.size, reverse=True)


def _installed(packages: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """Every package that the project needs without extras, itself excepted."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for package in packages:
        by_name.setdefault(package["name"], []).append(package)
    waiting: list[tuple[Mapping[str, Any], str | None]] = [(by_name[PROJECT][0], None)]
    seen: set[tuple[str, str, str | None]] = set()
    given: set[tuple[str, str]] = set()
    while waiting:
        package, extra = waiting.pop()
        identity = package["name"], package["version"]
        if (*identity, extra) in seen:
            continue
        seen.add((*identity, extra))
        if identity not in given and package["name"] != PROJECT:
            given.add(identity)
            yield package
        needed = package.get("optional-dependencies", {}).get(extra, []) if extra else package.get("dependencies", [])
        for one in needed:
            if "marker" in one and not Marker(one["marker"]).evaluate({**environment, "extra": ""}):
                continue
            candidates = [p for p in by_name.get(one["name"], []) if one.get("version") in (None, p["version"])]
            if len(candidates) != 1:
                raise ValueError(f"uv.lock should hold one {one}, found {len(candidates)}")
            waiting += [(candidates[0], name) for name in (None, *one.get("extra", []))]


def _best(package: Mapping[str, Any], order: Mapping[Tag, int]) -> Wheel:
    fitting = []
    for wheel in package.get("wheels", []):
        file = wheel["url"].rsplit("/", 1)[-1]
        ranks = [order[tag] for tag in parse_wheel_filename(file)[3] if tag in order]
        if ranks:
            fitting.append((min(ranks), file, wheel["size"]))
    if not fitting:
        raise ValueError(f"uv.lock has no wheel of {package['name']} {package['version']} for this platform")
    _, file, size = min(fitting)
    return Wheel(package["name"], package["version"], file, size)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB)
    arguments = parser.parse_args()
    wheels = base_wheels(tomllib.loads((ROOT / "uv.lock").read_text("utf-8")), list(sys_tags()), {})
    for wheel in wheels:
        print(f"{wheel.size / 1e6:8.2f} MB  {wheel.package} {wheel.version}  {wheel.file}")
    total = sum(wheel.size for wheel in wheels) / 1e6
    print(f"{total:8.2f} MB  in {len(wheels)} wheels; at most {arguments.limit_mb:g} MB are allowed")
    if total > arguments.limit_mb:
        sys.exit(f"the base installation downloads {total:.1f} MB, more than {arguments.limit_mb:g} MB")


if __name__ == "__main__":
    main()
