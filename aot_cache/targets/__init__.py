"""Descriptions of GPUs, to compile for them on a machine that has none."""

from aot_cache.targets.absent import absent_device
from aot_cache.targets.catalog import find, names
from aot_cache.targets.description import Description

__all__ = ["Description", "absent_device", "find", "names"]
