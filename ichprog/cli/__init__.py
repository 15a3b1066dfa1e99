"""The command line: a thin skin over the library, a file for each kind of command."""

import os
import sys
from typing import Any

import click

from ichprog.cli import cohorts, demo, evaluate, export, models, plugins, predict, simulate, study, train
from ichprog.cli.options import WRONG_USE
from ichprog.errors import IchprogError


class _Group(click.Group):
    """Says what went wrong instead of showing a traceback: exit code 2 for wrong use, 1 for what failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (IchprogError, OSError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, WRONG_USE) else 1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ichprog")
def main() -> None:
    """Prognosis after intracranial haemorrhage from one head CT. For research only, not for patient care."""


for command in (
    models.models, plugins.plugins, models.fetch, models.doctor, predict.predict, predict.explain, cohorts.cohort,
    demo.demo, simulate.simulate, train.train, study.study, evaluate.evaluate, export.export, export.publish,
):  # fmt: skip
    main.add_command(command)


def run() -> None:
    """The command as a process, which ends as soon as everything is said.

    To take apart what a prediction loaded takes as long as a tenth of it. Torch, where it was loaded, may have ends of
    its own to meet and is left to them.
    """
    try:
        main()
    except SystemExit as done:
        if "torch" in sys.modules or not isinstance(done.code, int):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(done.code)
