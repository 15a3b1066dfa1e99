"""The command line: thin commands over the library, one module for each group of commands."""

import logging
from typing import Any

import click

from ichprog.cli import (
    calibrate,
    cohorts,
    demo,
    evaluate,
    export,
    haemorrhage,
    models,
    pacs,
    plugins,
    predict,
    process,
    progress,
    reports,
    scans,
    simulate,
    spec,
    study,
    train,
)
from ichprog.cli.command import examples
from ichprog.cli.options import WRONG_USE
from ichprog.errors import IchprogError, missing_extra

# Extras whose packages a command imports; a command that is not listed needs none.
EXTRA_OF_COMMAND = {
    "calibrate": "study",
    "demo": "simulate,report",
    "evaluate": "study",
    "export": "export",
    "fuse": "study",
    "pacs": "dicom",
    "report": "report",
    "simulate": "simulate",
    "study": "study",
    "train": "train",
}


class _Group(click.Group):
    """A group that prints errors as one message: exit code 2 for wrong use, 1 for everything else that failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (IchprogError, OSError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, WRONG_USE) else 1)
        except ModuleNotFoundError as error:
            command = ctx.invoked_subcommand or ""
            if command not in EXTRA_OF_COMMAND or error.name is None:
                raise
            click.echo(f"Error: {missing_extra(EXTRA_OF_COMMAND[command], error.name, f'ichprog {command}')}", err=True)
            ctx.exit(1)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("demo", "predict scan.nii.gz", "predict --help"),
)
@click.version_option(package_name="ichprog")
@click.option("-v", "--verbose", count=True, help="Log what is fetched, compiled and cached; -vv logs more.")
@click.pass_context
def main(ctx: click.Context, verbose: int) -> None:
    """Prognosis after intracranial haemorrhage from one head CT. For research only, not for patient care."""
    if verbose:
        level = logging.INFO if verbose == 1 else logging.DEBUG
        _log_to_stderr(ctx, "ichprog", level, "%(levelname)s %(name)s: %(message)s")
    else:
        progress.silence_libraries(ctx)
        _log_to_stderr(ctx, "ichprog.progress", logging.DEBUG, "%(message)s")


def _log_to_stderr(ctx: click.Context, name: str, level: int, form: str) -> None:
    """Write the messages of a logger to standard error until the command ends."""
    logger = logging.getLogger(name)
    handler = progress.LineHandler()
    handler.setFormatter(logging.Formatter(form))
    previous = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)

    def restore() -> None:
        logger.removeHandler(handler)
        logger.setLevel(previous)

    ctx.call_on_close(restore)


for command in (
    models.models, spec.spec, plugins.plugins, models.fetch, models.doctor, predict.predict, predict.explain,
    reports.report, haemorrhage.haemorrhage, cohorts.cohort, demo.demo, simulate.simulate, train.train, study.study,
    evaluate.evaluate, calibrate.calibrate, calibrate.fuse, scans.scans, export.export, export.publish, pacs.pacs,
):  # fmt: skip
    main.add_command(command)


def run() -> None:
    """Run the command line as a process of its own."""
    process.run(main)
