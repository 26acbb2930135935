"""A store of serialized XLA executables: compiled once, loaded without tracing or compiling anything."""
