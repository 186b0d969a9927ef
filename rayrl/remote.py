"""Whole copies of files in remote storage: S3, Google Cloud Storage, or a folder.

    <uri>/step_40/<path of each file>
    <uri>/step_40/manifest.json      {"files": {path: {"bytes": n, "sha256": hex}}}

An object store can neither rename nor write several objects at once, so the manifest makes a copy
whole: it is written last and removed first.  A reader takes what a manifest lists, and nothing that
differs from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

MANIFEST = "manifest.json"
_CHUNK = 8 << 20
_MAX_MANIFEST = 16 << 20
_TRIAL = ".rayrl-writable"
_WITHOUT_FOLDERS = {"s3", "gcs"}
"""Where folders are empty objects, made for each part of a path up to the bucket: nothing needs
them, and who may write below a prefix alone may not make them."""

STORAGE_ERRORS = (OSError, pa.ArrowException)
"""What pyarrow's filesystems raise when storage does not answer or refuses."""


class RemoteCopies:
    """Named copies under ``root`` of a pyarrow filesystem.

    Storage that does not answer, or refuses, raises one of :data:`STORAGE_ERRORS`.
    """

    def __init__(self, filesystem: pafs.FileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def names(self) -> list[str]:
        """The names of the whole copies, sorted."""
        found = self._found()
        return sorted(name for name in found if MANIFEST in found[name] and self._is_whole(name))

    def unfinished(self) -> dict[str, set[str]]:
        """What has no manifest, and the names in its folder: copies that are being written or
        removed, those whose writer was lost, and what others keep there."""
        return {name: parts for name, parts in self._found().items() if MANIFEST not in parts}

    def _found(self) -> dict[str, set[str]]:
        """The folders there, and the names in each."""
        # All files, for what is no object is no folder to Google's storage, unless somebody made an
        # empty object of its name; a copy that other tools brought there has none.
        selector = pafs.FileSelector(self._root, allow_not_found=True, recursive=True)
        root = PurePosixPath(self._root)
        found: dict[str, set[str]] = {}
        for entry in self._filesystem.get_file_info(selector):
            path = PurePosixPath(entry.path)
            # Some list the place itself too.
            parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
            if len(parts) > 1 or (parts and entry.type == pafs.FileType.Directory):
                found.setdefault(parts[0], set()).update(parts[1:2])
        return found

    def check(self) -> None:
        """Write a small file and remove it: what will be refused is to be known before a run's
        work, not after."""
        place = self._path(_TRIAL)
        self._write(place, [b"rayrl"])
        self._filesystem.delete_file(place)

    def put(self, name: str, folder: Path, files: Iterable[str]) -> None:
        """Copy ``files``, paths relative to ``folder``, as ``name``; what it held before goes."""
        self.remove(name)
        listed = {}
        for file in sorted(files):
            with (folder / file).open("rb") as source:
                listed[file] = self._write(self._path(name, file), _chunks(source))
        manifest = json.dumps({"files": listed}, indent=1).encode()
        self._write(self._path(name, MANIFEST), [manifest])

    def fetch(self, name: str, folder: Path, *, only: Collection[str] = ()) -> list[str]:
        """Write a copy's files, or of them those in ``only``, below ``folder`` and return their
        paths.

        ValueError naming the first file that is not what the manifest lists."""
        listed = self._manifest(name)
        if only:
            listed = {file: want for file, want in listed.items() if file in only}
        for file, want in listed.items():
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                stream = self._filesystem.open_input_stream(self._path(name, file))
            except FileNotFoundError:
                raise ValueError(f"{name}/{file}: listed, but not there") from None
            with stream, target.open("wb") as out:
                got = _copied(out, _chunks(stream), most=want["bytes"])
            if got != want:
                raise ValueError(f"{name}/{file}: got {got}, want {want}")
        return list(listed)

    def remove(self, name: str) -> None:
        """Remove a copy, its manifest first, so that a half-removed one is not taken for whole."""
        manifest = self._path(name, MANIFEST)
        if self._is_file(manifest):
            self._filesystem.delete_file(manifest)
        place = self._path(name)
        if self._filesystem.get_file_info(place).type == pafs.FileType.Directory:
            if self._filesystem.type_name == "gcs":
                # It fails to remove a folder that is no object, after all that is in it is gone.
                self._filesystem.delete_dir_contents(place, missing_dir_ok=True)
            else:
                self._filesystem.delete_dir(place)

    def _is_whole(self, name: str) -> bool:
        try:
            self._manifest(name)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def _manifest(self, name: str) -> dict[str, dict[str, Any]]:
        with self._filesystem.open_input_stream(self._path(name, MANIFEST)) as stream:
            text = stream.read(_MAX_MANIFEST)
        try:
            listed = json.loads(text)["files"]
            return {
                _inside(file): {key: want[key] for key in ("bytes", "sha256")}
                for file, want in listed.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{name}/{MANIFEST}: not a manifest: {error}") from None

    def _write(self, path: str, chunks: Iterable[bytes]) -> dict[str, Any]:
        if self._filesystem.type_name not in _WITHOUT_FOLDERS:
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with self._filesystem.open_output_stream(path) as out:
            return _copied(out, chunks)

    def _is_file(self, path: str) -> bool:
        return self._filesystem.get_file_info(path).type == pafs.FileType.File

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts) if self._root else parts)


def open_copies(uri: str) -> RemoteCopies | None:
    """``s3://bucket/prefix``, ``gs://bucket/prefix``, ``file:///folder`` or an absolute path, with
    credentials from the environment, as the cloud's own tools find them; None for "".

    ValueError for any other text."""
    if not uri:
        return None
    try:
        filesystem, root = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri!r} is no place that pyarrow knows: {error}") from None
    return RemoteCopies(filesystem, root)


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _copied(out: Any, chunks: Iterable[bytes], most: int | None = None) -> dict[str, Any]:
    """Write chunks, no more than the first that goes beyond ``most`` bytes, and describe them."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        out.write(chunk)
        digest.update(chunk)
        size += len(chunk)
        if most is not None and size > most:
            break
    return {"bytes": size, "sha256": digest.hexdigest()}


def _inside(file: str) -> str:
    """A manifest's path, refused where it would lead out of the folder that it is written to."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in file:
        raise ValueError(f"{file!r} leads out of its folder")
    return file
