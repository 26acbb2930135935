"""`python -m elastic_jax` is the `elastic-jax` program."""

from elastic_jax.cli import main

main()
