"""Pushes bundles to repositories of the Hugging Face Hub, and pulls them.

A revision of a repository (branch, tag or commit) contains one bundle, and possibly other files. A pull downloads the
manifest and the files in it from one commit, and `open_bundle` verifies them.

Snapshots in the hub's cache are symbolic links, and no link in a bundle may point outside its folder. So a pulled
bundle gets a separate folder, `visionaccel/COMMIT` in the repository's folder of the cache, which is removed when the
repository is deleted from the cache. Its files are hard links to the cache's blobs, or copies where links are not
possible. To change a bundle, pull it with `output`, which makes copies.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visionaccel.bundle.bundle import Bundle, is_bundle, open_bundle
from visionaccel.bundle.folder import appearing
from visionaccel.bundle.manifest import MANIFEST, ExternalCheckpoint, Manifest, parse_manifest
from visionaccel.checkpoint import Checkpoint, locate_checkpoint
from visionaccel.errors import ArtifactError, BundleError, ConfigurationError, VisionAccelError


@dataclass(frozen=True, slots=True)
class PushReport:
    """The commit with a pushed bundle: the branch's last commit if that has the same bundle already."""

    repository: str
    revision: str
    commit: str
    url: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PullReport:
    """A verified bundle and the commit that it was pulled from."""

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
    """Commit a bundle to a repository. Repository and branch are created if they do not exist.

    The manifest and the files in it become one commit. Other files of the folder are not pushed, and other files in the
    repository are not changed.

    Args:
        folder: The bundle.
        repository: `owner/name`; without an owner, the user's.
        revision: The branch; a new one starts from the default branch. Default: `main`.
        private: Create the repository as a private one, and refuse a public one.
        message: The commit's message.

    Raises:
        BundleError: If the bundle is broken.
        ConfigurationError: If the bundle needs a checkpoint on this machine, the repository is public although
            `private` is set, or the hub cannot be reached or refuses.
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
                f"the repository {repository!r} exists and is public.",
                hint="Make it private first, push to a different one, or omit --private.",
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(name, folder / name) for name in files]
        # Otherwise the hub would silently skip files that match the repository's .gitignore.
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
        output: A new folder for copies of the files. Default: a folder in the hub's cache, which must not be changed.
        checkpoint: Folder or repository of the weights that the bundle needs; a repository is downloaded. Default: the
            checkpoint in the manifest if it is on this machine, since a manifest may not choose servers to contact.

    Raises:
        BundleError: If the revision has no bundle, or one that fails verification.
        ConfigurationError: If the repository or revision does not exist, the hub cannot be reached or refuses, or
            `output` exists or cannot be written.
    """
    target = None if output is None else Path(output).absolute()
    if target is not None and os.path.lexists(target):
        raise ConfigurationError(f"{target} already exists.", hint="Choose a folder that does not exist yet.")
    snapshot = _download(repository, revision, [MANIFEST])
    commit, storage = snapshot.name, snapshot.parents[1]
    if not (snapshot / MANIFEST).is_file():
        raise BundleError(
            f"{repository!r} at commit {commit} is not a bundle: it has no {MANIFEST}.",
            hint="Pass a repository and revision that `visionaccel push` wrote.",
        )
    try:
        manifest = parse_manifest(snapshot / MANIFEST)
        names, external, weights = _names(manifest), manifest.checkpoint, None
        if checkpoint is not None and external is not None:
            revision = external.revision if os.fspath(checkpoint) == external.source else None
            weights = locate_checkpoint(checkpoint, revision)
        folder = target or storage / "visionaccel" / commit
        bundle = None if target else _cached(folder, snapshot, weights)
        if bundle is None:
            _download(repository, commit, names)
            place = _placed if target else _placed_in_cache
            bundle = place(snapshot, names, folder, weights)
    except BundleError as error:
        raise BundleError(
            f"{repository!r} at commit {commit}: {error.message}",
            hint=f"{error.hint} To download it again, delete {storage} first.",
        ) from error
    return PullReport(repository, commit, bundle)


def _names(manifest: Manifest) -> tuple[str, ...]:
    """Return the paths of the manifest and of each file in it."""
    return tuple(dict.fromkeys((MANIFEST, *(file.path for file in manifest.every_file()))))


def _require_portable(folder: Path, checkpoint: ExternalCheckpoint | None) -> None:
    """Refuse a bundle whose checkpoint is a path, which is useless on another machine, and not a repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if checkpoint is None:
        return
    try:
        hf_hub_url(checkpoint.source, MANIFEST)  # checks the name without contacting a server
        local = Path(checkpoint.source).exists()
    except HFValidationError:
        local = True
    if local:
        raise ConfigurationError(
            f"{folder} reads its weights from a checkpoint on this machine, {checkpoint.source}.",
            hint="Export the bundle with --self-contained to push it.",
        )


def _download(repository: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download the named files that a repository has; return the folder of the cache's snapshot."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    with _client_errors(f"{repository!r} cannot be pulled"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _cached(folder: Path, snapshot: Path, weights: Checkpoint | None) -> Bundle | None:
    """Return the bundle that an earlier pull made, if it is still valid and equal to the hub's."""
    if not folder.is_dir():
        return None
    try:
        bundle = open_bundle(folder, checkpoint=weights)
        unchanged = (folder / MANIFEST).read_bytes() == (snapshot / MANIFEST).read_bytes()
    except (ArtifactError, OSError):
        return None
    return bundle if unchanged else None


def _placed_in_cache(snapshot: Path, names: Sequence[str], folder: Path, weights: Checkpoint | None) -> Bundle:
    """Make the bundle in its folder of the cache, where another process may be making it at the same time."""
    place = partial(_placed, snapshot, names, folder, weights, put=_link_or_copy)
    try:
        return place()
    except ConfigurationError:
        if not folder.is_dir():
            raise
    # Another process was faster with the same commit, or the folder was changed after an earlier pull.
    if (bundle := _cached(folder, snapshot, weights)) is not None:
        return bundle
    if not is_bundle(folder):
        shutil.rmtree(folder, ignore_errors=True)
    # A bundle stays until the new one is verified: it may be in use, and perhaps only its checkpoint is missing.
    return place(force=True)


def _placed(
    snapshot: Path,
    names: Sequence[str],
    folder: Path,
    weights: Checkpoint | None,
    *,
    put: Callable[[Path, Path], object] = shutil.copyfile,
    force: bool | None = None,
) -> Bundle:
    """Make and verify a bundle in a folder; with `force`, it replaces another bundle."""
    with appearing(folder, force=force) as partial_folder:
        for name in names:
            blob, file = (snapshot / name).resolve(), partial_folder / name
            if not blob.is_file():
                raise BundleError(f"{name} is in the manifest but missing.", hint="Push the bundle again.")
            file.parent.mkdir(parents=True, exist_ok=True)
            put(blob, file)
        try:
            open_bundle(partial_folder, checkpoint=weights)
        except BundleError as error:
            raise BundleError(error.message.replace(f"{partial_folder}{os.sep}", ""), hint=error.hint) from error
    return open_bundle(folder, checkpoint=weights)


def _link_or_copy(blob: Path, file: Path) -> None:
    try:
        os.link(blob, file)
    except OSError:  # across file systems, and on some of them
        shutil.copyfile(blob, file)


@contextmanager
def _client_errors(doing: str) -> Iterator[None]:
    """Convert errors of the hub's client to this package's."""
    try:
        yield
    except VisionAccelError:
        raise
    except Exception as error:  # the client's HTTP library and its errors depend on the version
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
        return "Log in with `hf auth login`, or set HF_TOKEN to a token with this permission, and check the name."
    if isinstance(error, errors.RevisionNotFoundError):
        return "Pass a branch, tag or commit that the repository has."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Check the name; for a private repository, log in with `hf auth login` or set HF_TOKEN."
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "Unset HF_HUB_OFFLINE; offline, only bundles that were pulled before are available."
    return "Check the network and HF_ENDPOINT, then try again."
