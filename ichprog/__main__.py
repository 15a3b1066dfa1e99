"""`python -m ichprog` is `ichprog`."""

from ichprog.cli import run

run()
