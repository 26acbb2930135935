"""Turns weights as they are published into an Elastic checkpoint."""

from converters.convert import convert

__all__ = ["convert"]
