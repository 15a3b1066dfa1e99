"""What all commands share: help with examples and headings, and a clean end by Ctrl-C."""

from collections.abc import Iterator
from typing import Any

import click

from ichprog.zoo import DEFAULT

_MANY = 10  # options; more are shown under headings
HEADINGS = {  # names of parameters, the same in all commands
    "Model": ("name", "model", "fold", "device", "runtime", "precision", "cache_dir", "offline"),
    "Scans": ("brain", "study", "series", "clinical", "skull", "dicom", "grid_of"),
    "Archive": ("aet", "retrieve", "receive_port", "tls_ca", "tls_cert", "tls_key", "match"),
    "Watching": ("journal", "interval", "settle", "queue", "port"),
    "Haemorrhage and scores": ("haemorrhage", "detector_name", "scores"),
    "Combination": ("columns",),
    "Maps": ("methods", "tasks", "label", "options", "maps", "png", "percent"),
    "Calibration": ("coverage",),
    "Training": (
        "folds", "only_folds", "preset", "changes", "epochs", "seed", "loss_weighting", "heads", "dropped",
        "loss_weights", "start_from", "trackers",
    ),
    "Statistics": ("n_bootstrap", "ci_method", "at_sensitivity", "at_specificity", "subgroups", "compare"),
    "Several sites": ("summary", "min_count", "pool_summaries"),
    "Output": ("output", "masks", "dicom_out", "report", "identifiers", "pdf", "as_json"),
    "Long runs": ("resume", "retry_failed", "overwrite", "shard", "workers", "scheduler", "slurm"),
}  # fmt: skip
_OTHER = "Other"
INTERRUPTED = 130  # exit code, as shells expect it after Ctrl-C


class Command(click.Command):
    """A command whose help shows more than ten options under headings, and which ends with a sentence by Ctrl-C.

    Args:
        arguments: As in `click.Command`.
        interrupted: How to continue after Ctrl-C, in one sentence. A KeyboardInterrupt with a message overrides it.
        options: As in `click.Command`.
    """

    def __init__(self, *arguments: Any, interrupted: str = "Repeat the command.", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._interrupted = interrupted

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interruption:
            continuation = interruption.args[0] if interruption.args else self._interrupted
            click.echo(f"\nInterrupted. {continuation}", err=True)
            ctx.exit(INTERRUPTED)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help."""
        if sum(isinstance(each, click.Option) for each in self.params) <= _MANY:
            super().format_options(ctx, formatter)
            return
        heading_of = {name: heading for heading, names in HEADINGS.items() for name in names}
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*HEADINGS, _OTHER)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups[heading_of.get(parameter.name or "", _OTHER)].append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def examples(*commands: str) -> str:
    """Return the examples of a command as the last part of its help.

    Args:
        commands: Command lines without the name of the program. MODEL stands for the name of the default model.
    """
    return "\n".join(_lines(commands))


def _lines(commands: tuple[str, ...]) -> Iterator[str]:
    yield from ("Examples:", "", "\b")  # click keeps the lines of a paragraph that begins with \b
    for command in commands:
        yield f"ichprog {command.replace('MODEL', DEFAULT)}"
