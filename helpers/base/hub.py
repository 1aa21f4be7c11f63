"""Fetch from the Hugging Face hub: repositories of model files, and rows of data sets.

What was fetched once is read from the disk, and the network is not asked again. What comes is compared with the hashes
that the hub states, as the library compares sizes alone. A busy hub (429, 5xx) is asked again after `WAITS`; a hub that
does not answer is given up after `PATIENCE`, one that falls silent half-way after `STALLED` seconds at most.

A failure is one sentence that tells token, licence, name, network and disk apart, and says what to do.
"""

import contextlib
import errno
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from httpx2 import Client, Request
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from helpers.base.storage import cache_dir, write_atomic

PATIENCE = 5.0  # seconds to wait for a hub that may not be there, or for what it says of a file
STALLED = 90  # the library waits 10 s ($HF_HUB_DOWNLOAD_TIMEOUT) or `PATIENCE` six times, and rests between
WAITS = (2, 8, 30)  # seconds before a busy hub is asked again
BUSY = (429, 500, 502, 503, 504)
BLOCK = 256  # rows of a data set in one file of the cache
DISK = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.ENOTDIR)
PAGES = {"model": "", "dataset": "datasets/"}


def snapshot(repo: str, whole: Callable[[Path], Path], instead: str, **files: Any) -> Path:
    """What `whole` finds in the folder of a hub repository: the cached one, if all is there, else fetched.

    `whole` raises FileNotFoundError where something is missing; `instead` is what to do without a network; `files` are
    patterns of `snapshot_download`. Raises PermissionError for a token or a licence that the hub asks for, ValueError
    for a name that it does not know, ConnectionError for the network, OSError for a disk that cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):  # hub errors of absence are this one, too
        return whole(Path(snapshot_download(repo, local_files_only=True, **files)))
    try:
        folder = patiently(lambda: _fetched(repo, files))
    except _ERRORS as error:
        raise refusal(repo, error, instead) from None
    return whole(folder)


def rows(name: str, column: str, *config: str, instead: str) -> Iterator[Any]:
    """A column of a data set's "train" part, in its order; blocks of `BLOCK` rows are kept in the suite's cache.

    Raises what `snapshot` raises, while it is read.
    """
    folder = cache_dir() / "hub" / "--".join([*name.split("/"), *config, column])
    source = None
    for block in itertools.count():
        path = folder / f"{block:06}.json"
        if (found := _read(path)) is None:
            source = source or _streamed(name, column, config, block * BLOCK, instead)
            found = list(itertools.islice(source, BLOCK))
            write_atomic(path, json.dumps(found))
        yield from found
        if len(found) < BLOCK:
            return


def patiently(ask: Callable[[], Any]) -> Any:
    """What `ask` gives; asked again while the hub is busy or what came is damaged."""
    for wait in WAITS:
        try:
            return ask()
        except _ERRORS as error:
            answer = _answer_behind(error)
            if not isinstance(error, _Damaged) and (answer is None or answer.response.status_code not in BUSY):
                raise
        time.sleep(wait)
    return ask()


def refusal(repo: str, error: Exception, instead: str, kind: str = "model") -> Exception:
    """What a reader is told of the hub's error about a "model" or "dataset", in one sentence."""
    known = _answer_behind(error)
    status = known.response.status_code if known else None
    page = f"{constants.ENDPOINT}/{PAGES[kind]}{repo}"
    accept = f"open {page}, accept its licence"
    if isinstance(known, GatedRepoError):
        if status == 403:
            return PermissionError(
                f"{repo} is gated, and the account of your token has not accepted its licence: {accept}, then run again"
            )
        return PermissionError(
            f"{repo} is gated, and you are not logged in: {accept}, then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(known, RepositoryNotFoundError):
        return ValueError(f"{repo} is neither a directory here nor a {kind} on the hub: check the name, or log in")
    if status == 401:
        return PermissionError(
            f"the hub does not know your token, which {repo} was asked for with: log in again with `hf auth login`, or "
            "mend HF_TOKEN"
        )
    if status == 403:
        return PermissionError(
            f"your token may not read {repo}: give it the right to read gated repositories in the hub's settings, or "
            "log in with another one by `hf auth login`"
        )
    if status in BUSY:
        return ConnectionError(
            f"the hub is busy ({status}) and gave no {repo} in {len(WAITS) + 1} attempts: run again later, what came "
            f"whole is kept, or {instead}"
        )
    if isinstance(error, OSError) and error.errno in DISK:
        return OSError(
            error.errno,
            f"{repo} could not be written to the hub's cache {constants.HF_HUB_CACHE} ({error.strerror}): set HF_HOME "
            "to a folder that can be written to and has space",
        )
    reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{type(error).__name__}: {error}"
    return ConnectionError(
        f"{repo} is not complete in the local cache and could not be fetched from the hub "
        f"({' '.join(reason.split())}): run once with a network, or {instead}"
    )


class _Damaged(ConnectionError):
    """Files came with other contents than the hub states."""


_ERRORS = (HTTPError, OSError)


def _fetched(repo: str, files: dict) -> Path:
    """The folder of a repository, every file with the hash that the hub states; a damaged one is deleted."""
    _require_access(repo, "model")
    folder = Path(snapshot_download(repo, **files))
    checked = HfApi().verify_repo_checksums(repo, local_dir=folder, revision=folder.name)
    damaged = [folder / file["path"] for file in checked.mismatches]
    for path in damaged:
        path.resolve().unlink()  # in the cache's blobs, where the file is a link
        path.unlink(missing_ok=True)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise _Damaged(f"{names} came with another hash than the hub states, which a proxy may cause")
    return folder


def _require_access(repo: str, kind: str) -> None:
    """Ask for one file, there or not. A download would wait for minutes on a dead network, and `datasets` hides why."""
    with contextlib.suppress(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(repo, "config.json", repo_type=kind), timeout=PATIENCE)


def _streamed(name: str, column: str, config: tuple[str, ...], first: int, instead: str) -> Iterator[Any]:
    import datasets  # slow to import, and only this road needs it

    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1  # of six each
    try:
        patiently(lambda: _require_access(name, "dataset"))
        data = patiently(lambda: datasets.load_dataset(name, *config, split="train", streaming=True))
        yield from (row[column] for row in (data.skip(first) if first else data))
    except (*_ERRORS, ValueError) as error:
        raise refusal(name, error, instead, "dataset") from None  # a damaged table is a ValueError


def _read(path: Path) -> list | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _answer_behind(error: BaseException | None) -> HfHubHTTPError | None:
    """The hub's answer that an error was made of, if there was one."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error


def _client() -> Client:
    """The library's requests, none of which may wait for long: its own has no limit on some, and 60 s on others."""
    return Client(follow_redirects=True, event_hooks={"request": [_refuse_offline, _limit_wait]})


def _refuse_offline(request: Request) -> None:
    if constants.is_offline_mode():
        raise OfflineModeIsEnabled(f"{request.url} was not asked, as HF_HUB_OFFLINE is set")


def _limit_wait(request: Request) -> None:
    longest = PATIENCE if request.method == "HEAD" else constants.HF_HUB_DOWNLOAD_TIMEOUT
    limits = request.extensions["timeout"]
    limits |= {step: min(longest, seconds or longest) for step, seconds in limits.items()}


set_client_factory(_client)
