"""The command line: each verb parses, calls its Python twin, and says where the result is."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from medssl import __version__
from medssl import options as o
from medssl.cli.apps import app
from medssl.errors import EXIT_OK, MedsslError
from medssl.screen import complain, say

# In the order in which `--help` shall list their verbs.
# isort: off
from medssl.cli import archive, training, semisupervised, prediction, evaluation, exchange, lists
# isort: on

__all__ = ["app", "archive", "evaluation", "exchange", "lists", "main", "prediction", "semisupervised", "training"]


def main() -> None:
    """Run the command line; an error a user can act on is one message and its exit code, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except MedsslError as error:
        complain(f"Error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("Stopped. Where the verb has --resume, the same command with it goes on from here.")
        sys.exit(130)


def _version(value: bool) -> None:
    if value:
        say(f"medssl {__version__} (research use only: not a medical device)")
        raise typer.Exit(EXIT_OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: o.Verbose = False,
) -> None:
    if verbose:
        logging.getLogger("medssl").setLevel(logging.INFO)
