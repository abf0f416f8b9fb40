"""Workdirs on object stores: what s3:// and gs:// have in common with a folder.

A store has neither folders nor renaming nor appending: an object is put whole or not at
all. Its libraries (fsspec with s3fs or gcsfs) are imported once a path names a store.
"""

import contextlib
import datetime
import errno
import functools
import importlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from triform.runtime.errors import UserError, reason

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs"}
ALOUD = ("botocore", "aiobotocore", "gcsfs", "fsspec")  # log what they also raise
COMMITTED = "commit_success.txt"  # orbax writes it into a step after everything else
LEAST = 10.0  # seconds from an upload of growing files to the next, at least
SHARE = 0.02  # of the time, at most, for uploads of growing files
GROWING = ("metrics.jsonl", "runs.jsonl")
_NO_BUCKET = "bucket does not exist"  # S3's words
_CREATE = "there is no such bucket; create it or name another"
_lost: dict[str, str] = {}  # URL of a workdir -> why this process may not write there


def is_store(path: Any) -> bool:
    """Does a path name a store: s3://bucket/run?"""
    return re.match(r"[a-z][a-z0-9]*://", str(path)) is not None


@functools.cache
def _system(scheme: str) -> Any:
    """The file system of fsspec; UserError if this store or its library is unknown."""
    if scheme not in LIBRARIES:
        raise UserError(
            f"{scheme}://: no such kind of store; name a folder, or a path that begins "
            f"with {' or '.join(f'{x}://' for x in LIBRARIES)}"
        )
    # Orbax's paths would go through TensorFlow wherever that is installed.
    os.environ.setdefault("EPATH_USE_TF", "0")
    library = LIBRARIES[scheme]
    try:
        importlib.import_module(library)
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise UserError(
            f"{scheme}://: needs {library}; pip install 'triform[stores]'"
        ) from error
    for name in ALOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Other processes write there, too: what was listed once may have changed.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


@contextlib.contextmanager
def _asked(url: str) -> Iterator[Any]:
    """The file system of a URL; its errors get one line.

    Raises UserError for a missing library, bucket or credentials, OSError for a store
    that cannot be reached or refuses, FileNotFoundError and FileExistsError as usual.
    """
    try:
        yield _system(url.partition("://")[0])
    except UserError:
        raise
    except (FileNotFoundError, FileExistsError) as error:
        if _NO_BUCKET in str(error):
            raise UserError(f"{url}: {_CREATE}") from error
        raise
    except Exception as error:
        if "Credentials" in type(error).__name__:
            raise UserError(
                f"{url}: no credentials ({error}); set those that the store's own "
                "command line needs, such as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from error
        raise OSError(errno.EIO, reason(error), url) from error


# Objects


def read(url: str) -> bytes | None:
    """The content of an object, None if there is none."""
    with _asked(url) as system:
        try:
            return system.cat_file(url)
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):
                raise
            return None


def write(url: str, content: bytes, new: bool = False) -> None:
    """Puts an object whole; `new`: FileExistsError if there is one."""
    check(url)
    with _asked(url) as system:
        try:
            system.pipe_file(url, content, mode="create" if new else "overwrite")
        except FileNotFoundError as error:
            raise UserError(f"{url}: {_CREATE}") from error


def names(url: str) -> list[str]:
    """The names of what is below a folder, sorted; none if there is no such folder."""
    with _asked(url) as system:
        try:
            found = system.ls(url, detail=False)
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):
                raise
            return []
    return sorted({os.path.basename(x.rstrip("/")) for x in found} - {""})


def exists(url: str) -> bool:
    """Is there such an object, or one below it?"""
    with _asked(url) as system:
        return system.exists(url)


def size(url: str) -> int:
    """Bytes of everything below a folder; 0 if there is no such folder."""
    with _asked(url) as system:
        return system.du(url, total=True) if system.exists(url) else 0


def modified(url: str) -> datetime.datetime:
    """When an object was put, by the store's clock."""
    with _asked(url) as system:
        return system.modified(url)


def remove(url: str) -> None:
    """Removes an object or everything below a folder; none is fine."""
    check(url)
    with _asked(url) as system, contextlib.suppress(FileNotFoundError):
        system.rm(url, recursive=True)


def move(source: str, target: str) -> None:
    """Copies everything below `source`, then removes it.

    A kill in between leaves both: the source counts until it is gone.
    """
    copy(source, target)
    remove(source)


def copy(source: str, target: str) -> None:
    """Copies everything below `source`; one of the two may be a local folder."""
    check(target)
    with _asked(source if is_store(source) else target) as system:
        do = system.copy if is_store(target) else system.get
        do = do if is_store(source) else system.put
        # A trailing slash: the content, whether or not the target is there already.
        do(f"{source}/", f"{target}/", recursive=True)


def check(url: str) -> None:
    """UserError if another run has taken over the workdir of a path."""
    for workdir, why in _lost.items():
        if url == workdir or url.startswith(f"{workdir}/"):
            raise UserError(why)


def lose(workdir: str, why: str) -> None:
    """This process does not write into a workdir any more."""
    _lost[workdir] = why


def regain(workdir: str) -> None:
    """This process may write into a workdir."""
    _lost.pop(workdir, None)


# Folders


class Mirror:
    """A local folder whose files go to a folder of a store.

    Of a local folder it is that folder itself, and nothing goes anywhere.
    """

    def __init__(self, folder: str):
        self._url = folder if is_store(folder) else ""
        self._temporary = None
        self.folder = folder
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and time
        self._due = 0.0
        if self._url:
            self._temporary = tempfile.TemporaryDirectory(prefix="triform-")
            self.folder = self._temporary.name

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        self.close(push=kind is None)

    def push(self, only_if_due: bool = False) -> None:
        """Puts the files that have changed, each whole.

        `only_if_due`: not within LEAST seconds of the last time, and not if it would
        take more than SHARE of the time; a store that cannot be reached may be so the
        next time.
        """
        start = time.monotonic()
        if not self._url or (only_if_due and start < self._due):
            return
        try:
            self._put_changes()
        except OSError as error:
            if not only_if_due:
                raise
            text = f"{self._url}: {error.strerror}; trying again later"
            print(text, file=sys.stderr, flush=True)
        end = time.monotonic()
        self._due = end + max(LEAST, (end - start) / SHARE)

    def _put_changes(self) -> None:
        for root, _, files in os.walk(self.folder):
            for name in sorted(files):
                path = os.path.join(root, name)
                state = os.stat(path)
                version = (state.st_size, state.st_mtime_ns)
                name = os.path.relpath(path, self.folder)
                if self._sent.get(name) != version:
                    with open(path, "rb") as f:
                        write(f"{self._url}/{name}", f.read())
                    self._sent[name] = version

    def close(self, push: bool = True) -> None:
        """Puts what has changed and removes the local folder."""
        try:
            if push:
                self.push()
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()


_copies: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def local(folder: str) -> str:
    """The folder itself, or a local copy of a store's: its files and its code/.

    What grows with a run, checkpoints and samples are not copied.
    """
    if not is_store(folder):
        return folder
    copy = tempfile.TemporaryDirectory(prefix="triform-")
    _copies.append(copy)
    with _asked(folder) as system:
        for below in ("", "code"):
            source = f"{folder}/{below}".rstrip("/")
            target = os.path.join(copy.name, below)
            os.makedirs(target, exist_ok=True)
            found = []
            with contextlib.suppress(FileNotFoundError):
                found = system.ls(source, detail=True)
            for info in found:
                name = os.path.basename(info["name"])
                if info["type"] == "file" and name not in ("", *GROWING):
                    system.get_file(info["name"], os.path.join(target, name))
    return copy.name


# Checkpoints


def for_orbax(directory: str) -> tuple[str, bool]:
    """(the directory as orbax takes it, is it on a store?)."""
    if is_store(directory):
        teach_orbax()
        return directory, True
    return os.path.abspath(directory), False  # it refuses relative paths on save


@functools.cache
def teach_orbax() -> None:
    """Lets orbax put arrays on s3://, which tensorstore can and orbax 0.12 cannot.

    Orbax describes a gs:// folder to tensorstore. An s3:// folder is described in the
    same way, but for the driver and its settings.
    """
    # Only here: programs that read no checkpoint need no orbax.
    tensorstore_utils = importlib.import_module(
        "orbax.checkpoint._src.serialization.tensorstore_utils"
    )
    build = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(build)
    def build_kvstore_tspec(directory: Any, *args: Any, **kwargs: Any) -> Any:
        scheme, _, rest = str(directory).partition("://")
        if scheme != "s3":
            return build(directory, *args, **kwargs)
        return _on_s3(build(f"gs://{rest}", *args, **kwargs), _s3_settings())

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _on_s3(spec: Any, settings: dict[str, Any]) -> Any:
    """A description for tensorstore with the driver s3 in place of gcs."""
    if not isinstance(spec, dict):
        return spec
    found = {key: _on_s3(value, settings) for key, value in spec.items()}
    if found.get("driver") in ("gcs", "gcs_grpc"):
        found |= {"driver": "s3", **settings}
    return found


def _s3_settings() -> dict[str, Any]:
    """Endpoint, region and credentials for tensorstore, as s3fs found them."""
    with _asked("s3://") as system:
        client = system.s3.meta
    settings: dict[str, Any] = {}
    if "amazonaws.com" not in client.endpoint_url:
        settings["endpoint"] = client.endpoint_url
        settings["aws_region"] = client.region_name or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:  # the others first look for files, aloud
        settings["aws_credentials"] = {"type": "environment"}
    return settings
