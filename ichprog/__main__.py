"""Run the command line with `python -m ichprog`."""

from ichprog.cli import run

run()
