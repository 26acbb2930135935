"""Turns weights as they are published into an Elastic checkpoint."""

from converters.conversion import convert

__all__ = ["convert"]
