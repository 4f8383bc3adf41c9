"""Bundles on the model hub: push one to a repository, or pull one.

A revision of a repository (branch, tag or commit) holds one bundle; other files may lie next to it. A pull takes the
manifest and what it names, all of one commit, and `open_bundle` verifies it before it is returned.

The hub's cache has its snapshots as symbolic links to blobs elsewhere, and a bundle never leads out of its folder. So a
pulled bundle has a separate folder, `visionaccel/COMMIT` in the repository's folder of the cache, which goes when the
repository is deleted from the cache. Its files are hard links to the blobs, or copies where links cannot be made: to
change a bundle, pull it with an output, which holds copies.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visionaccel.bundle.bundle import Bundle, is_bundle, open_bundle
from visionaccel.bundle.folder import appearing
from visionaccel.bundle.manifest import MANIFEST, ExternalCheckpoint, Manifest, parse_manifest
from visionaccel.checkpoint import Checkpoint, locate_checkpoint
from visionaccel.errors import ArtifactError, BundleError, ConfigurationError, VisionAccelError


@dataclass(frozen=True, slots=True)
class PushReport:
    """The commit that holds a pushed bundle, which is the branch's last one if that held the same bundle already."""

    repository: str
    revision: str
    commit: str
    url: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PullReport:
    """A verified bundle and the commit that it came from."""

    repository: str
    commit: str
    bundle: Bundle


def push_bundle(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> PushReport:
    """Commit a bundle to a repository, which is created if it does not exist; so is the branch, from the default one.

    The manifest and the files that it names are one commit. Other files, here and in the repository, are left alone.

    Args:
        folder: The bundle.
        repository: `owner/name`; without an owner, the user's.
        revision: The branch. Default: `main`.
        private: Create the repository as a private one, and refuse a public one.
        message: The commit's message.

    Raises:
        BundleError: If the bundle is broken.
        ConfigurationError: If the bundle needs a checkpoint on this machine, the repository is public where a private
            one was wanted, or the hub cannot be reached or refuses.
    """
    folder = Path(folder)
    _require_portable(folder, parse_manifest(folder / MANIFEST).checkpoint)
    files = _names(open_bundle(folder).manifest)

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.constants import DEFAULT_REVISION

    api = HfApi()
    with _client_errors(f"{folder} cannot be pushed to {repository!r}"):
        # None, not False: the default of an organization may be private.
        repository = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repository).private:
            raise ConfigurationError(
                f"The repository {repository!r} exists and is public.",
                hint="Make it private first, push to another, or drop --private.",
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(name, folder / name) for name in files]
        # Or else the hub would leave out, without a word, what the repository's .gitignore has.
        api.preupload_lfs_files(repository, additions, revision=revision, gitignore_content="# nothing is ignored")
        message = message or "Push a visionaccel bundle"
        commit = api.create_commit(repository, additions, commit_message=message, revision=revision)
    return PushReport(repository, revision or DEFAULT_REVISION, commit.oid, commit.commit_url, files)


def pull_bundle(
    repository: str,
    *,
    revision: str | None = None,
    output: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PullReport:
    """Download and verify the bundle of a repository, or take it from the hub's cache.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit. Default: `main`.
        output: A new folder for copies of the files. Default: a folder in the hub's cache, not to be changed.
        checkpoint: Folder or repository, which is fetched, of the weights that the bundle needs. Default: what the
            manifest names, if that is on this machine: a manifest does not decide which servers are contacted.

    Raises:
        BundleError: If the revision holds no bundle, or one that fails its verification.
        ConfigurationError: If there is no such repository or revision, the hub cannot be reached or refuses, or the
            folder exists or cannot be written.
    """
    target = None if output is None else Path(output).absolute()
    if target is not None and os.path.lexists(target):
        raise ConfigurationError(f"{target} exists.", hint="Pass a folder that does not exist yet.")
    snapshot = _download(repository, revision, [MANIFEST])
    commit, storage = snapshot.name, snapshot.parents[1]
    if not (snapshot / MANIFEST).is_file():
        raise BundleError(
            f"{repository!r} at commit {commit} is not a bundle: it has no {MANIFEST}.",
            hint="Pass the repository and revision of one that `visionaccel push` wrote.",
        )
    try:
        manifest = parse_manifest(snapshot / MANIFEST)
        names, external, weights = _names(manifest), manifest.checkpoint, None
        if checkpoint is not None and external is not None:
            revision = external.revision if os.fspath(checkpoint) == external.source else None
            weights = locate_checkpoint(checkpoint, revision)
        if target is not None:
            _download(repository, commit, names)
            _place(snapshot, names, target, weights, link=False)
            return PullReport(repository, commit, open_bundle(target, checkpoint=weights))
        folder = storage / "visionaccel" / commit
        bundle = _cached(folder, snapshot, weights)
        if bundle is None:
            _download(repository, commit, names)
            bundle = _placed_in_cache(snapshot, names, folder, weights)
    except BundleError as error:
        raise BundleError(
            f"{repository!r} at commit {commit}: {error.message}",
            hint=f"{error.hint} To fetch it again, delete {storage} first.",
        ) from error
    return PullReport(repository, commit, bundle)


def _names(manifest: Manifest) -> tuple[str, ...]:
    """What a bundle consists of: the manifest, and each file that it names."""
    return tuple(dict.fromkeys((MANIFEST, *(file.path for file in manifest.every_file()))))


def _require_portable(folder: Path, checkpoint: ExternalCheckpoint | None) -> None:
    """A path to a checkpoint means nothing on another machine; a repository does."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if checkpoint is None:
        return
    try:
        hf_hub_url(checkpoint.source, MANIFEST)  # contacts no server; the client's check of names is not public
        local = Path(checkpoint.source).exists()
    except HFValidationError:
        local = True
    if local:
        raise ConfigurationError(
            f"{folder} takes its weights from a checkpoint on this machine, {checkpoint.source}.",
            hint="Export it --self-contained to push it.",
        )


def _download(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """The cache's snapshot with these files of a repository, or those of them that the repository has."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with _client_errors(f"{repository!r} cannot be pulled"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _cached(folder: Path, snapshot: Path, weights: Checkpoint | None) -> Bundle | None:
    """The bundle that an earlier pull placed, if it is still as the hub has it."""
    if not folder.is_dir():
        return None
    try:
        bundle = open_bundle(folder, checkpoint=weights)
        unchanged = (folder / MANIFEST).read_bytes() == (snapshot / MANIFEST).read_bytes()
    except (ArtifactError, OSError):
        return None
    return bundle if unchanged else None


def _placed_in_cache(snapshot: Path, names: Sequence[str], folder: Path, weights: Checkpoint | None) -> Bundle:
    """The bundle in its folder of the cache, where another process may place it at the same time."""
    try:
        _place(snapshot, names, folder, weights, link=True)
    except ConfigurationError:
        if not folder.is_dir():
            raise
        # Another process was faster with the same commit, or what is there was changed since.
        if (bundle := _cached(folder, snapshot, weights)) is not None:
            return bundle
        if not is_bundle(folder):
            shutil.rmtree(folder, ignore_errors=True)
        # A bundle stays until the new one is verified: it may be in use, and only its weights be missing here.
        _place(snapshot, names, folder, weights, link=True, force=True)
    return open_bundle(folder, checkpoint=weights)


def _place(
    snapshot: Path,
    names: Sequence[str],
    folder: Path,
    weights: Checkpoint | None,
    *,
    link: bool,
    force: bool | None = None,
) -> None:
    """Make a verified bundle in a folder; with `force`, in the place of another bundle."""
    put = _link_or_copy if link else shutil.copyfile
    with appearing(folder, force=force) as partial:
        for name in names:
            blob, file = (snapshot / name).resolve(), partial / name
            if not blob.is_file():
                raise BundleError(f"{name}, which the manifest names, is not there.", hint="Push the bundle again.")
            file.parent.mkdir(parents=True, exist_ok=True)
            put(blob, file)
        try:
            open_bundle(partial, checkpoint=weights)
        except BundleError as error:
            raise BundleError(error.message.replace(f"{partial}{os.sep}", ""), hint=error.hint) from error


def _link_or_copy(blob: Path, file: Path) -> None:
    try:
        os.link(blob, file)
    except OSError:  # across file systems, and on some of them
        shutil.copyfile(blob, file)


@contextmanager
def _client_errors(doing: str) -> Iterator[None]:
    """Errors of the hub's client, as this package's."""
    try:
        yield
    except VisionAccelError:
        raise
    except Exception as error:  # the client's HTTP library and its errors are others from version to version
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"{doing}: {text.rstrip('.')}.", hint=_what_to_do(error)) from error


def _what_to_do(error: BaseException) -> str:
    from huggingface_hub import errors

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    status = next((cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if isinstance(error, errors.HFValidationError):
        return "Pass a repository as owner/name."
    if status in (401, 403):
        return "Log in with `hf auth login` or set HF_TOKEN to a token that is allowed to, and check the name."
    if isinstance(error, errors.RevisionNotFoundError):
        return "Pass a branch, tag or commit that the repository has."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Check the name; for a private repository, log in with `hf auth login` or set HF_TOKEN."
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "Unset HF_HUB_OFFLINE; offline, there is only what was pulled before."
    return "Check the network and HF_ENDPOINT, then try again."
