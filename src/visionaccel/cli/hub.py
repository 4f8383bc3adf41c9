"""`visionaccel push` and `visionaccel pull`: bundles to and from the model hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from visionaccel.bundle import pull_bundle, push_bundle
from visionaccel.cli.output import Json, print_json, results

__all__ = ["pull", "push"]

Repository = Annotated[str, typer.Argument(help="Hugging Face repository, owner/name.")]


def push(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    repository: Repository,
    revision: Annotated[str | None, typer.Option(help="Branch, created if needed. Default: main.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one; refuse a public one.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    as_json: Json = False,
) -> None:
    """Verify a bundle and push it to a repository, which is created if it does not exist."""
    report = push_bundle(bundle, repository, revision=revision, private=private, message=message)
    if as_json:
        print_json(asdict(report))
        return
    results.print(f"Pushed {len(report.files)} files to {report.repository}, {report.revision}.")
    results.print(f"  {report.url}", soft_wrap=True)


def pull(
    repository: Repository,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A folder to make, with copies of the files. Default: one in the hub's cache; change no file."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Folder or repository of the weights, for a bundle that does not hold them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download the bundle of a repository and verify it."""
    report = pull_bundle(repository, revision=revision, output=output, checkpoint=checkpoint)
    answer = {"repository": report.repository, "commit": report.commit, "folder": str(report.folder)}
    if as_json:
        print_json(answer)
        return
    results.print(f"Pulled {report.repository} at {report.commit} into")
    results.print(f"  {report.folder}", soft_wrap=True)
