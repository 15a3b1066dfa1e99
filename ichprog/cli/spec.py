"""`ichprog spec`: print the spec of a model, or the JSON Schema of a file format."""

import click

from ichprog.cli import completion
from ichprog.cli.command import Command, examples
from ichprog.cli.options import find_spec, print_json


@click.command(cls=Command, epilog=examples("spec MODEL", "spec --schema study"))
@click.argument("name", required=False, shell_complete=completion.models)
@click.option("--schema", type=click.Choice(["model", "study"]), help="Print the JSON Schema of a file format instead.")
def spec(name: str | None, schema: str | None) -> None:
    """Print the spec of the model NAME as one JSON object, to edit and to load with local-dir: or a study."""
    if (name is None) == (schema is None):
        raise click.UsageError("Give the name of a model, or --schema model, or --schema study.")
    if name is not None:
        print_json(find_spec(name).to_dict())
    elif schema == "model":
        from ichprog.spec import model_schema

        print_json(model_schema())
    else:
        from ichprog.study.study_file import study_schema

        print_json(study_schema())
