"""Verbs that list what can be named."""

from __future__ import annotations

from dataclasses import asdict

from medssl import options as o
from medssl import registry
from medssl.cli.apps import list_app
from medssl.registry_semisupervised import SEMISUPERVISED
from medssl.screen import table


@list_app.command("methods")
def list_methods(as_json: o.AsJson = False) -> None:
    """Pretraining methods."""
    table("Methods", registry.METHODS.values(), as_json)


@list_app.command("semisupervised")
def list_semisupervised(as_json: o.AsJson = False) -> None:
    """Methods of `medssl semisupervise`."""
    table("Semi-supervised methods", SEMISUPERVISED.values(), as_json)


@list_app.command("networks")
def list_networks(as_json: o.AsJson = False) -> None:
    """Networks."""
    table("Networks", registry.NETWORKS.values(), as_json)


@list_app.command("policies")
def list_policies(as_json: o.AsJson = False) -> None:
    """Augmentation policies by purpose and modality."""
    from medssl.augmentation.policy import list_policies as policies

    table("Policies", policies(), as_json)


@list_app.command("datasets")
def list_datasets(as_json: o.AsJson = False) -> None:
    """Public data sets that `medssl dataset prepare` knows."""
    from medssl.archive.datasets import manifests

    table("Data sets", manifests().values(), as_json)


@list_app.command("codes")
def list_codes(as_json: o.AsJson = False) -> None:
    """Reason codes of refusals, related objects, repairs, flags and gates, and what to do about each."""
    from medssl.archive.codes import CODES

    table("Codes", [asdict(code) for code in CODES.values()], as_json)
