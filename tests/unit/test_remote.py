"""Copies in remote storage are whole or absent, on local folders and on other filesystems."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pyarrow.fs as pafs
import pytest
from gcp_storage_emulator.server import create_server

from rayrl.remote import STORAGE_ERRORS, RemoteCopies, open_copies
from tests.aws_server import aws_server, log_in

FILES = {"checkpoints/step_4/model.safetensors": b"\x00\x01" * 40_000, "metrics.jsonl": b"{}\n"}


def run_folder(folder: Path, files=FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_put_and_fetched(copies: RemoteCopies, folder: Path) -> None:
    """Two copies in an empty place, of which the second stays, with one file."""
    assert copies.names() == []
    source = run_folder(folder / "source")
    copies.put("step_4", source, FILES)
    copies.put("step_10", source, ["metrics.jsonl"])
    assert copies.names() == ["step_10", "step_4"]
    assert sorted(copies.fetch("step_4", folder / "back")) == sorted(FILES)
    assert {name: (folder / "back" / name).read_bytes() for name in FILES} == FILES
    copies.remove("step_4")
    copies.remove("step_4")
    assert copies.names() == ["step_10"]


def filesystem(kind: str, folder: Path) -> tuple[pafs.FileSystem, str]:
    folder.mkdir(exist_ok=True)
    if kind == "mock":
        return pafs._MockFileSystem(), "bucket/run"
    if kind == "subtree":
        return pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()), "run"
    return pafs.LocalFileSystem(), f"{folder}/run"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3, whose one bucket is called captions."""
    with aws_server() as address:
        urlopen(Request(f"http://{address}/captions", method="PUT")).close()
        yield address


@pytest.fixture(scope="module")
def gcs() -> Iterator[str]:
    """The same for Google Cloud Storage."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="captions")
    server.start()
    yield "{}:{}".format(*server._api._httpd.server_address)
    server.stop()


@pytest.fixture(params=["s3", "gcs"])
def store(request, monkeypatch) -> tuple[RemoteCopies, Callable[[], list[str]]]:
    """Copies in an object store, and the names of all objects in its bucket."""
    address = request.getfixturevalue(request.param)
    if request.param == "s3":
        log_in(monkeypatch)
        uri, rest = "s3://captions/runs/one", "&region=us-east-1"
        listing, pattern = f"http://{address}/captions?list-type=2", r"<Key>(.*?)</Key>"
    else:
        # Without a login, which an address in a configuration may not ask for.
        uri, rest = "gs://anonymous@captions/runs/one", "&retry_limit_seconds=5"
        listing, pattern = f"http://{address}/storage/v1/b/captions/o", r'"name": "(.*?)"'

    def objects() -> list[str]:
        with urlopen(listing) as answer:
            return re.findall(pattern, answer.read().decode())

    copies = open_copies(f"{uri}?endpoint_override={address}&scheme=http{rest}")
    for name in copies.names():
        copies.remove(name)
    return copies, objects


def test_what_is_put_is_fetched_from_object_stores(store, tmp_path):
    copies, objects = store
    copies.check()
    assert set(objects()) <= {"runs/one/"}
    assert_put_and_fetched(copies, tmp_path)
    left = {"step_10/manifest.json", "step_10/metrics.jsonl"}
    # Nothing above the prefix, where others may forbid it.
    assert {f"runs/one/{name}" for name in left} == set(objects()) - {"runs/one/"}


def test_a_copy_without_its_manifest_is_not_whole_in_object_stores(store, tmp_path):
    copies, objects = store
    source = run_folder(tmp_path / "source")
    copies.put("step_4", source, FILES)
    copies.put("step_6", source, FILES)
    copies._filesystem.delete_file("captions/runs/one/step_6/manifest.json")
    assert "runs/one/step_6/metrics.jsonl" in objects()
    assert copies.names() == ["step_4"]
    assert copies.unfinished().keys() == {"step_6"}
    # What is left of it goes when it is made again.
    copies.put("step_6", source, ["metrics.jsonl"])
    assert copies.fetch("step_6", tmp_path / "back") == ["metrics.jsonl"]
    assert not [name for name in objects() if "step_6/checkpoints" in name]


def test_a_bucket_that_is_not_there_is_named(s3, monkeypatch, tmp_path):
    log_in(monkeypatch)
    copies = open_copies(f"s3://nowhere/run?endpoint_override={s3}&scheme=http&region=us-east-1")
    assert copies.names() == []
    with pytest.raises(STORAGE_ERRORS, match="nowhere"):
        copies.check()
    with pytest.raises(STORAGE_ERRORS, match="nowhere"):
        copies.put("step_4", run_folder(tmp_path / "source"), FILES)


@pytest.mark.parametrize("kind", ["local", "subtree", "mock"])
def test_what_is_put_is_fetched_on_every_filesystem(tmp_path, kind):
    assert_put_and_fetched(RemoteCopies(*filesystem(kind, tmp_path / "remote")), tmp_path)


def test_some_files_of_a_copy_are_fetched_alone(tmp_path):
    copies = open_copies(f"file://{tmp_path}/remote")
    copies.put("step_4", run_folder(tmp_path / "source"), FILES)
    only = ["metrics.jsonl", "not_there"]
    assert copies.fetch("step_4", tmp_path / "back", only=only) == ["metrics.jsonl"]
    assert [file.name for file in (tmp_path / "back").iterdir()] == ["metrics.jsonl"]


def test_putting_again_leaves_nothing_of_before(tmp_path):
    copies = open_copies(f"file://{tmp_path}/remote")
    source = run_folder(tmp_path / "source")
    copies.put("step_4", source, FILES)
    copies.put("step_4", source, ["metrics.jsonl"])
    assert copies.fetch("step_4", tmp_path / "back") == ["metrics.jsonl"]
    assert not (tmp_path / "remote/step_4/checkpoints").exists()


class Failing:
    """A filesystem that fails at the ``at``-th file it is asked to write."""

    def __init__(self, filesystem: pafs.FileSystem, at: int) -> None:
        self._filesystem, self._left = filesystem, at

    def __getattr__(self, name):
        return getattr(self._filesystem, name)

    def open_output_stream(self, path):
        self._left -= 1
        if self._left == 0:
            with self._filesystem.open_output_stream(path) as out:
                out.write(b"half")
            raise OSError(errno.EIO, "storage went away")
        return self._filesystem.open_output_stream(path)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_copy_that_breaks_off_is_not_there_and_the_one_before_stays(tmp_path, at):
    local = pafs.LocalFileSystem()
    source = run_folder(tmp_path / "source")
    RemoteCopies(local, f"{tmp_path}/remote").put("step_2", source, FILES)
    broken = RemoteCopies(Failing(local, at), f"{tmp_path}/remote")
    with pytest.raises(OSError, match="storage went away"):
        broken.put("step_4", source, FILES)
    whole = RemoteCopies(local, f"{tmp_path}/remote")
    # The third file is the manifest: half of one makes nothing whole.
    assert whole.names() == ["step_2"]
    assert whole.unfinished().keys() == ({"step_4"} if at < 3 else set())
    assert whole.fetch("step_2", tmp_path / "back")


@pytest.mark.parametrize("damage", [b"", b"\x00\x01" * 39_999 + b"\x00\x00", b"\x00" * 90_000])
def test_what_differs_from_the_manifest_is_refused_by_name(tmp_path, damage):
    copies = open_copies(str(tmp_path / "remote"))
    copies.put("step_4", run_folder(tmp_path / "source"), FILES)
    (tmp_path / "remote/step_4/checkpoints/step_4/model.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match=r"step_4/checkpoints/step_4/model\.safetensors: got"):
        copies.fetch("step_4", tmp_path / "back")


def test_a_listed_file_that_is_not_there_is_named(tmp_path):
    copies = open_copies(str(tmp_path / "remote"))
    copies.put("step_4", run_folder(tmp_path / "source"), FILES)
    (tmp_path / "remote/step_4/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"step_4/metrics\.jsonl: listed, but not there"):
        copies.fetch("step_4", tmp_path / "back")


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", "a\\b", ""])
def test_a_manifest_cannot_write_outside_the_folder(tmp_path, name):
    copies = open_copies(str(tmp_path / "remote"))
    copies.put("step_4", run_folder(tmp_path / "source"), ["metrics.jsonl"])
    manifest = tmp_path / "remote/step_4/manifest.json"
    entry = json.loads(manifest.read_text())["files"]["metrics.jsonl"]
    manifest.write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(ValueError, match="leads out of its folder"):
        copies.fetch("step_4", tmp_path / "inner/back")
    assert not (tmp_path / "inner").exists() and not Path("/escaped").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": {"a": 1}}', '{"files": {"a": {}}}', "x"])
def test_a_manifest_that_is_none_is_named(tmp_path, text):
    copies = open_copies(str(tmp_path / "remote"))
    copies.put("step_4", run_folder(tmp_path / "source"), ["metrics.jsonl"])
    (tmp_path / "remote/step_4/manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"step_4/manifest\.json: not a manifest"):
        copies.fetch("step_4", tmp_path / "back")


def test_an_address_that_is_no_storage_is_refused():
    assert open_copies("") is None
    with pytest.raises(ValueError, match="'ftp://host/run' is no place that pyarrow knows"):
        open_copies("ftp://host/run")
