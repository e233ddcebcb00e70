"""The command and its groups, to which the modules beside this one add their verbs."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="medssl",
    help="Pretrain on an unlabelled archive, fine-tune with few labels, predict. Research use only: no medical device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
finetune_app = typer.Typer(
    help="Train a model on labelled cases, from a checkpoint or from scratch.", no_args_is_help=True
)
evaluate_app = typer.Typer(help="Measure predictions against references.", no_args_is_help=True)
dataset_app = typer.Typer(help="Check and prepare public data sets.", no_args_is_help=True)
list_app = typer.Typer(help="List what can be named.", no_args_is_help=True)
app.add_typer(finetune_app, name="finetune")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(dataset_app, name="dataset")
app.add_typer(list_app, name="list")
