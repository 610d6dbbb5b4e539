"""Hugging Face hub: access check, upload with retries, and one revision per checkpoint, through huggingface_hub."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.errors import CheckpointError, ConfigError

T = TypeVar("T")
ATTEMPTS = 5
UPLOAD_GROUP = 8
"""Files that are uploaded together; between groups the progress is reported."""
FIRST_WAIT = 1.0
MAIN = "main"
PUBLIC = "https://huggingface.co"
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose exceptions mean a connection that failed or was cut."""


class Hub:
    """One model repository, and what is done with it.

    Args:
        name: USER/NAME.
        flag: that gave the name, for errors.
        private: whether it is made private, if it does not exist.
        notify: called with a message for every retry.
        sleep: waits; injected by tests.

    Raises:
        ConfigError: the name is malformed, or there is no token.
    """

    def __init__(
        self,
        name: str,
        *,
        flag: str = "--push-to",
        private: bool = False,
        notify: Callable[[str], None] = lambda text: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError

        tools: Any = importlib.import_module("huggingface_hub.utils")
        try:
            # Before the library, whose text about several / advises an argument of its own.
            if name.count("/") != 1:
                raise HFValidationError("it must contain exactly one /, as in USER/NAME")
            tools.validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(
                f"{flag} {name} is not the name of a repository on the Hugging Face Hub: {str(error).rstrip('.')}",
                fix=f"Give {flag} USER/NAME or ORGANIZATION/NAME, in which NAME has at most 96 characters: letters, "
                "digits, ., - and _",
            ) from error
        if not get_token():
            raise ConfigError(
                f"{flag} needs an access token of the Hugging Face Hub, but HF_TOKEN is not set and none is stored on "
                "this machine",
                fix="Create a token with write access in the settings of the Hub, then set HF_TOKEN or run `hf auth "
                "login`",
            )
        tools.disable_progress_bars()
        constants: Any = importlib.import_module("huggingface_hub.constants")
        if constants.ENDPOINT != PUBLIC:
            # Xet is the public hub's own storage; mirrors and servers of companies (HF_ENDPOINT) take plain HTTP.
            constants.HF_HUB_DISABLE_XET = True
        self.name = name
        self._flag = flag
        self._private = private
        self._notify = notify
        self._sleep = sleep
        self._api: Any = HfApi()

    def check_access(self) -> None:
        """Ask the hub whose token it is, before any work is done.

        Raises:
            ConfigError: the token is not valid or cannot write, or the name belongs to somebody else.
            CheckpointError: the hub cannot be reached.
        """
        try:
            who = self._retried("asking who the token belongs to", self._api.whoami)
        except CheckpointError as error:
            if isinstance(error.__cause__, Exception) and _status(error.__cause__) in (401, 403):
                raise ConfigError(
                    f"{self._api.endpoint} rejects the access token",
                    fix="Create a new token with write access in the settings of the Hub, and set HF_TOKEN to it",
                ) from error
            raise
        owner = self.name.partition("/")[0]
        writable = {who["name"]} | {one["name"] for one in who.get("orgs", []) if one.get("roleInOrg") != "read"}
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read" or owner not in writable:
            problem = (
                "has read access only" if role == "read" else f"belongs to {who['name']}, who cannot write to {owner}"
            )
            raise ConfigError(
                f"Cannot push to {self._flag} {self.name}: the access token {problem}",
                fix="Set HF_TOKEN to a token with write access"
                if role == "read"
                else f"Use {self._flag} {who['name']}/{self.name.partition('/')[2]}, or set HF_TOKEN to a token that "
                "can write to "
                f"{owner}",
            )

    def revisions(self) -> set[str]:
        """Return the branches that hold a push of their own.

        A branch is made from main, and its commit follows: one that still is at main's commit was interrupted.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            refs = self._retried("listing revisions", lambda: self._api.list_repo_refs(self.name))
        except CheckpointError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                return set()
            raise
        main = {ref.target_commit for ref in refs.branches if ref.name == MAIN}
        return {ref.name for ref in refs.branches if ref.name == MAIN or ref.target_commit not in main}

    def push(self, folder: Path, revision: str, message: str) -> str:
        """Upload a folder as one commit; files that the hub has already are not sent again.

        Args:
            folder: what to upload.
            revision: the branch, made if it does not exist.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the hub refuses it, or cannot be reached after several attempts. The branch is unchanged.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return self.commit({path.relative_to(folder).as_posix(): path for path in files}, revision, message)

    def commit(
        self,
        files: Mapping[str, Path],
        revision: str,
        message: str,
        *,
        deleted: Sequence[str] = (),
        uploaded: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> str:
        """Change files of a revision by one commit.

        Args:
            files: to upload, by their path in the repository.
            revision: the branch, made if it does not exist.
            message: of the commit.
            deleted: paths of files to delete.
            uploaded: called with the paths that are uploaded; an error that it raises prevents the commit.

        Returns, raises: as push.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self._retried(
            f"creating {self.name}", lambda: self._api.create_repo(self.name, private=self._private, exist_ok=True)
        )
        additions = self._retried(
            "reading the files", lambda: [CommitOperationAdd(name, path) for name, path in files.items()]
        )
        # The large files go first, so that a branch is made only when its commit can follow at once.
        for start in range(0, len(additions), UPLOAD_GROUP):
            group = additions[start : start + UPLOAD_GROUP]
            self._retried(
                "uploading the large files",
                partial(self._api.preupload_lfs_files, self.name, additions=group),
            )
            uploaded([addition.path_in_repo for addition in group])
        operations = [*additions, *(CommitOperationDelete(name) for name in deleted)]
        if revision != MAIN:
            self._retried(
                f"creating revision {revision}",
                lambda: self._api.create_branch(self.name, branch=revision, exist_ok=True),
            )
        done = self._retried(
            f"committing to {revision}",
            lambda: self._api.create_commit(
                self.name, operations=operations, commit_message=message, revision=revision
            ),
        )
        return str(done.commit_url)

    def _retried(self, what: str, act: Callable[[], T]) -> T:
        """Return what `act` returns, after up to ATTEMPTS attempts with growing waits between them."""
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return act()
            except Exception as error:
                if attempt == ATTEMPTS or not _is_transient(error):
                    raise _failed(what, self._api.endpoint, error, attempt) from error
                self._notify(f"{what} failed ({_text(error)}): trying again in {wait:g} s")
            self._sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException | None) -> bool:
    """Return whether a later attempt may succeed: the server's fault, or the connection's."""
    if error is None:
        return False
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if type(error).__module__.partition(".")[0] in _TRANSPORTS:
        return True
    # huggingface_hub closes its connections after a failure, also those that another thread uses.
    if isinstance(error, RuntimeError) and "client has been closed" in str(error):
        return True
    # It wraps what happens to one file of several.
    return isinstance(error, RuntimeError) and _is_transient(error.__cause__)


def _failed(what: str, endpoint: str, error: Exception, attempts: int) -> CheckpointError:
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    return CheckpointError(
        f"{what[:1].upper()}{what[1:]} at {endpoint} failed{tried}: {_text(error).rstrip('.')}",
        fix="Give the token write access to the repository (HF_TOKEN), then give the same command again"
        if _status(error) in (401, 403)
        else "Give the same command again: files that have arrived are not sent twice",
    )


def _text(error: BaseException) -> str:
    text = str(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
    return " ".join(text.split()) or type(error).__name__
