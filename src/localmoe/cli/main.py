"""The `localmoe` command.

A command's module imports what is heavy (torch, the engine, the gateway) inside the functions that need it, so
that help is instant.
"""

import sys
from typing import Annotated

import typer

from localmoe import __version__
from localmoe.cli.bench import app as bench_app
from localmoe.cli.chat import chat
from localmoe.cli.config import app as config_app
from localmoe.cli.doctor import doctor
from localmoe.cli.engines import app as engines_app
from localmoe.cli.inspect import app as inspect_app
from localmoe.cli.keys import app as keys_app
from localmoe.cli.models import app as models_app
from localmoe.cli.serve import serve
from localmoe.core.errors import LocalMoEError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(serve)
app.command()(chat)
app.command()(doctor)
app.add_typer(models_app, name="models")
app.add_typer(engines_app, name="engines")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(bench_app, name="bench")
app.add_typer(inspect_app, name="inspect")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"localmoe {__version__}")
        raise typer.Exit


@app.callback()
def localmoe(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Serve Mixture-of-Experts language models on hardware they do not fit in.

    Examples:

      localmoe serve

      localmoe chat

      localmoe models list

      localmoe engines list

      localmoe config show --origin

      localmoe keys create alice

      localmoe doctor

      localmoe bench engine

      localmoe inspect experts
    """


def main() -> None:
    """Run the command line. Exit status: 0, 1 on an error of ours, 2 on wrong usage, 130 on Ctrl-C."""
    try:
        app()
    except LocalMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
