"""Ray's own launcher and autoscaler, without SSH: what would run on machines is written down."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from ray.autoscaler._private import commands
from ray.autoscaler._private.command_runner import set_using_login_shells
from ray.autoscaler._private.providers import _clear_provider_cache, _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated.instance_manager_pb2 import Instance

_LAUNCH_S = 120.0


class Shell:
    """In the place of ``subprocess`` in Ray's launcher: remembers what is to run on a machine, and
    answers where the output is read, as a fresh one with Docker and no GPU would.

    bootstrap: the configuration that is copied to the head, from which it starts workers"""

    answers: ClassVar[dict[str, bytes]] = {
        "command -v docker": b"/usr/bin/docker",
        ".Config.Env": b'["HOME=/home/ray"]',
        "printenv HOME": b"/home/ray",
        "/proc/meminfo": b"MemAvailable: 16000000 kB",
    }

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.bootstrap: dict[str, Any] = {}

    def check_call(self, command: list[str], **_: Any) -> int:
        for word in command:
            if Path(word).name.startswith("ray-bootstrap-"):
                self.bootstrap = yaml.safe_load(Path(word).read_text())
        self.commands.append(command[-1] if command[0] == "ssh" else " ".join(command))
        return 0

    call = check_call

    def check_output(self, command: list[str], **_: Any) -> bytes:
        self.check_call(command)
        return next((out for part, out in self.answers.items() if part in command[-1]), b"")

    def place(self, part: str) -> int:
        """The place of the one command that contains ``part``."""
        (place,) = [i for i, command in enumerate(self.commands) if part in command]
        return place

    def check_started(self, image: str) -> str:
        """The command that started Ray, in a container of this image that has the shared folder
        and asks everybody for the token."""
        steps = ["nfs-common", "sudo mkdir -p /shared", "docker pull", "docker run", "ray start"]
        first, *places = (self.place(step) for step in steps)
        assert first < places[0], self.commands
        assert places == sorted(places), self.commands
        pulled, container = self.commands[places[1]], self.commands[places[2]]
        assert image in pulled and image in container
        assert "mount -t nfs" in self.commands[places[0]]
        for option in (
            "--env=RAY_AUTH_MODE=token",
            "--volume=/shared:/shared",
            "/home/ray/.ray-auth:/home/ray/.ray-auth",
        ):
            assert option in container
        assert self.place("/.ray-auth/ ubuntu@") < places[2]
        return self.commands[places[3]]


@contextmanager
def launcher() -> Iterator[None]:
    """Ray's launcher as if it were new in this process."""
    _clear_provider_cache()
    set_using_login_shells(False)
    try:
        yield
    finally:
        set_using_login_shells(True)
        _clear_provider_cache()


def bootstrapped(file: Path) -> dict[str, Any]:
    """A launcher file's configuration after Ray made what it needs in the cloud."""
    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    return commands._bootstrap_config(config, no_config_cache=True)


def up(file: Path) -> Shell:
    """``ray up``: what ran on the head."""
    shell = Shell()
    commands.get_or_create_head_node(
        bootstrapped(file), str(file), False, False, True, None, _runner=shell
    )
    return shell


def join(bootstrap: dict[str, Any], kind: str, token: Path) -> Shell:
    """One more machine of a kind, as the head starts it when work waits: what ran there.

    bootstrap: the configuration on the head
    token: this machine's folder of the token, which on the head lies elsewhere"""
    given = copy.deepcopy(bootstrap)
    Path(given["auth"]["ssh_private_key"]).expanduser().touch()
    given["file_mounts"] = dict.fromkeys(given["file_mounts"], str(token))
    autoscaling = AutoscalingConfig(given, skip_content_hash=True)
    provider = _get_node_provider(given["provider"], given["cluster_name"])
    machines = NodeProviderAdapter(provider, _Reader(autoscaling))
    request = str(uuid.uuid4())
    machines.launch({kind: 1}, request)
    machine, shell = _launched(machines, request), Shell()
    _list_often(provider)
    RayInstaller(provider, autoscaling, process_runner=shell).install_ray(
        Instance(instance_type=kind, cloud_instance_id=machine), "10.0.0.1"
    )
    return shell


def _list_often(provider: Any) -> None:
    """On a head another thread lists the machines all the while.  Without, Ray's provider for
    Google Cloud would not notice that it has set a label, and count the installation as failed."""
    remembered = provider.node_tags

    def node_tags(machine: str) -> dict[str, str]:
        provider.non_terminated_nodes({})
        return remembered(machine)

    provider.node_tags = node_tags


class _Reader:
    def __init__(self, autoscaling: AutoscalingConfig) -> None:
        self._autoscaling = autoscaling

    def get_cached_autoscaling_config(self) -> AutoscalingConfig:
        return self._autoscaling


def _launched(machines: NodeProviderAdapter, request: str) -> str:
    """The id of the one machine that a request brought."""
    deadline = time.monotonic() + _LAUNCH_S
    while time.monotonic() < deadline:
        for error in machines.poll_errors():
            raise error
        for name, machine in machines.get_non_terminated().items():
            if machine.request_id == request and machine.is_running:
                return name
        time.sleep(0.05)
    raise TimeoutError(f"no machine came for the request {request} in {_LAUNCH_S} s")
