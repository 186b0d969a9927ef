"""What docs/security.md promises, one promise a test."""

from __future__ import annotations

import ast
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from rayrl.config import Config
from rayrl.data.images import MAX_PIXELS, Bounds, check_bounds, decode, square_jpeg
from rayrl.data.rejections import BadImage
from rayrl.rewards.clipscore import preprocess
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.http import Client, RequestFailed
from rayrl.vlm import decode_image, load_captioner
from tests.conftest import encoded_picture

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "rayrl").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])
RESTRICTED_READER = ROOT / "rayrl/rewards/pickles.py"

RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "tarfile.open",
    "zipfile.ZipFile",
    "shutil.unpack_archive",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(file: Path) -> list[tuple[str, dict[str, ast.expr], str]]:
    """(name, keyword arguments, place) of each call in a file."""
    return [
        (
            dotted(node.func),
            {k.arg: k.value for k in node.keywords if k.arg},
            f"{file.relative_to(ROOT)}:{node.lineno}",
        )
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    ]


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_nothing_that_runs_code_from_data_is_imported_but_by_the_restricted_reader():
    users = {file for file in SOURCES if imports(file) & RUNS_CODE}
    assert users == {RESTRICTED_READER}
    names = {name for name, _, _ in calls(RESTRICTED_READER)}
    # That one never uses the reader that looks types up freely.
    assert not names & {"pickle.load", "pickle.loads", "pickle.Unpickler"}


def test_nothing_that_runs_code_from_data_is_called():
    found = [(name, place) for file in SOURCES for name, _, place in calls(file)]
    assert [(n, p) for n, p in found if n in FORBIDDEN_CALLS] == []
    # The walk sees calls: files are read by safe_load.
    assert any(name == "yaml.safe_load" for name, _ in found)


def test_arrays_are_read_without_pickles_and_commands_run_without_a_shell():
    for file in SOURCES:
        for name, keywords, place in calls(file):
            if name in ("np.load", "numpy.load"):
                assert ast.unparse(keywords["allow_pickle"]) == "False", place
            assert not is_true(keywords.get("shell")), place
            assert not is_true(keywords.get("allow_pickle")), place


def test_models_load_from_safetensors_and_run_a_folder_s_code_only_when_asked():
    models = 0
    for file in SOURCES:
        for name, keywords, place in calls(file):
            if not name.endswith(".from_pretrained"):
                continue
            assert not is_true(keywords.get("trust_remote_code")), place
            kind = name.split(".")[-2]
            if kind == "CLIPModel" or kind.startswith("AutoModel"):
                models += 1
                assert is_true(keywords.get("use_safetensors")), place
    assert models >= 2
    assert Config().model.trust_remote_code is False
    for job in (ROOT / "jobs").glob("*.yaml"):
        assert "trust_remote_code" not in (yaml.safe_load(job.read_text()).get("model") or {})


class Canary:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self):
        return Path.write_text, (self._file, "ran")


def test_a_model_folder_with_pickled_weights_is_refused_unread(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(Canary(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        load_captioner(folder)
    assert not (tmp_path / "ran").exists()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("read", [decode, decode_image, lambda data: preprocess(data, 224)])
@pytest.mark.parametrize("size", [(100_000, 100_000), (MAX_PIXELS // 1000 + 1, 1000)])
def test_a_decompression_bomb_is_refused_by_its_header(read, size):
    with pytest.raises(BadImage, match="too many pixels"):
        read(png_header(*size))


def test_a_loader_s_own_bounds_hold_before_decoding():
    bounds = Bounds(max_bytes=1000, max_pixels=100)
    with pytest.raises(BadImage, match="20 x 6, more than 100"):
        check_bounds(png_header(20, 6), bounds)
    with pytest.raises(BadImage, match="too many bytes: more than 1000"):
        square_jpeg(b"\xff\xd8" + bytes(1000), 16, bounds)
    with pytest.raises(ValidationError, match="max_image_pixels"):
        Config.model_validate({"data": {"max_image_pixels": MAX_PIXELS + 1}})


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO"])
def test_formats_that_are_not_listed_are_not_decoded(kind, tmp_path):
    file = tmp_path / "picture"
    Image.new("RGB", (8, 8)).save(file, kind)
    with pytest.raises(BadImage, match="another format: want JPEG, PNG, WebP"):
        decode(file.read_bytes())
    assert decode(encoded_picture((1, 2, 3), size=8)).size == (8, 8)


class Hostile(BaseHTTPRequestHandler):
    """Redirects, repeats the key, or answers without end, by path; counts what it is asked."""

    asked: list[str] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            return
        self.send_response(400 if self.path == "/echo" else 200)
        self.end_headers()
        answer = f"bad key {self.headers['Authorization']}" if self.path == "/echo" else "[1]" * 99
        self.wfile.write(answer.encode())

    do_GET = do_POST

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hostile():
    Hostile.asked.clear()
    server = HTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def client(url: str) -> Client:
    return Client(url, 5.0, 0, 1, api_key_variable="RAYRL_TEST_KEY")


def test_a_reward_server_cannot_send_the_images_and_the_key_elsewhere(hostile, monkeypatch):
    monkeypatch.setenv("RAYRL_TEST_KEY", "hush-hush")
    with pytest.raises(RequestFailed, match="status 302"):
        client(f"{hostile}/redirect").post({}, lambda answer: answer)
    assert Hostile.asked == ["/redirect"]


def test_a_key_that_a_server_repeats_does_not_reach_a_message(hostile, monkeypatch):
    monkeypatch.setenv("RAYRL_TEST_KEY", "hush-hush")
    with pytest.raises(RequestFailed, match=r"status 400: bad key Bearer \*\*\*") as raised:
        client(f"{hostile}/echo").post({}, lambda answer: answer)
    assert "hush" not in str(raised.value)


def test_an_answer_that_is_too_long_is_not_read_to_its_end(hostile, monkeypatch):
    monkeypatch.setenv("RAYRL_TEST_KEY", "hush-hush")
    monkeypatch.setattr("rayrl.rewards.http._MAX_ANSWER", 100)
    with pytest.raises(RequestFailed, match="more than 100 bytes"):
        client(f"{hostile}/long").post({}, lambda answer: answer)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "want http"),
        ("ftp://host/x", "want http"),
        ("score", "want http"),
        ("http:///score", "want http"),
        ("https://me:hush@host/score", "carries a credential"),
        ("https://host/score?token=hush", "carries a credential"),
    ],
)
def test_a_reward_server_is_named_by_http_and_without_credentials(url, said):
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate({"terms": {"judge": {"kind": "http", "url": url}}})
    with pytest.raises(ValidationError, match="url"):
        RewardConfig.model_validate({"terms": {"judge": {"kind": "http"}}})


def test_a_key_is_named_in_the_configuration_and_not_held_by_it(monkeypatch):
    monkeypatch.setenv("RAYRL_TEST_KEY", "hush-hush")
    term = {"kind": "http", "url": "https://host/score", "api_key_variable": "RAYRL_TEST_KEY"}
    config = Config.model_validate({"reward": {"terms": {"judge": term}}})
    text = json.dumps(config.model_dump(mode="json"))
    assert "RAYRL_TEST_KEY" in text and "hush" not in text
