"""cluster/aws.yaml through Ray's own launcher: the cloud is a local server that speaks EC2 and IAM,
and what would run on machines over SSH is written down instead."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import boto3
import pytest
import yaml
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.command_runner import set_using_login_shells
from ray.autoscaler._private.providers import _clear_provider_cache, _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.core.generated.instance_manager_pb2 import Instance

from tests.aws_server import aws_server, log_in

FILE = Path(__file__).resolve().parents[2] / "cluster/aws.yaml"


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


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    with aws_server(MOTO_IAM_LOAD_MANAGED_POLICIES="true") as address:
        yield address


@pytest.fixture
def region(cloud: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The name of the file's region, with a login to the cloud."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray-auth").mkdir()
    (tmp_path / ".ray-auth/token").write_text("0" * 64)
    log_in(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{cloud}")
    # Ray waits half a minute for the real IAM.
    monkeypatch.setattr(aws_config.time, "sleep", lambda seconds: None)
    set_using_login_shells(False)
    _forget()
    yield yaml.safe_load(FILE.read_text())["provider"]["region"]
    _forget()
    set_using_login_shells(True)


def _forget() -> None:
    """Have Ray forget the clouds it spoke to in this process."""
    _clear_provider_cache()
    for cached in (resource_cache, client_cache, aws_config._get_subnets_or_die):
        cached.cache_clear()


def test_ray_up_starts_a_head_that_can_start_spot_workers(region: str, tmp_path: Path) -> None:
    shell, written = Shell(), yaml.safe_load(FILE.read_text())
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    config = commands._bootstrap_config(config, no_config_cache=True)
    commands.get_or_create_head_node(config, str(FILE), False, False, True, None, _runner=shell)
    ec2 = boto3.client("ec2", region)
    (head,) = instances(ec2)
    assert head["InstanceType"] == "m7i.xlarge" and "InstanceLifecycle" not in head
    # With which it may start machines.
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/ray-autoscaler-v1")
    shared, image = shell.place("mount -t nfs4"), shell.place("docker pull")
    started, ray_start = shell.place("docker run"), shell.place("ray start")
    assert shared < image < started < ray_start
    assert written["docker"]["head_image"] in shell.commands[started]
    assert "--env=RAY_AUTH_MODE=token" in shell.commands[started]
    assert "/home/ray/.ray-auth:/home/ray/.ray-auth" in shell.commands[started]
    assert shell.place("/.ray-auth/ ubuntu@") < started
    assert "ray start --head" in shell.commands[ray_start]
    # As the head does when work waits.
    given, on_worker = shell.bootstrap, Shell()
    provider = _get_node_provider(given["provider"], given["cluster_name"])
    machine = copy.deepcopy(given["available_node_types"]["gpu"]["node_config"])
    tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: "gpu"}
    provider.create_node(machine, tags, 1)
    assert len(provider.non_terminated_nodes({})) == 2
    (worker,) = [one for one in instances(ec2) if one["InstanceId"] != head["InstanceId"]]
    # This machine is not the head, where the token lies elsewhere.
    given["file_mounts"] = dict.fromkeys(given["file_mounts"], f"{tmp_path}/.ray-auth")
    autoscaling = AutoscalingConfig(given, skip_content_hash=True)
    RayInstaller(provider, autoscaling, process_runner=on_worker).install_ray(
        Instance(instance_type="gpu", cloud_instance_id=worker["InstanceId"]), "10.0.0.1"
    )
    started, ray_start = on_worker.place("docker run"), on_worker.place("ray start")
    assert on_worker.place("mount -t nfs4") < started < ray_start
    assert written["docker"]["image"] in on_worker.commands[started]
    assert "--env=RAY_AUTH_MODE=token" in on_worker.commands[started]
    assert "RAY_HEAD_IP=10.0.0.1" in on_worker.commands[ray_start]
    assert "ray start --address=$RAY_HEAD_IP:6379" in on_worker.commands[ray_start]
    assert worker["InstanceType"] == "g6.2xlarge" and worker["InstanceLifecycle"] == "spot"
    assert "IamInstanceProfile" not in worker
    for one in (head, worker):
        assert one["MetadataOptions"]["HttpTokens"] == "required"
        assert one["SecurityGroups"] == head["SecurityGroups"]
    (volume,) = {v["VolumeType"] for v in ec2.describe_volumes()["Volumes"] if v["Encrypted"]}
    assert volume == "gp3" and len(ec2.describe_volumes()["Volumes"]) == 2


def test_nothing_but_ssh_is_open_to_the_world(region: str) -> None:
    config = prepare_config(yaml.safe_load(FILE.read_text()))
    commands._bootstrap_config(config, no_config_cache=True)
    filters = [{"Name": "group-name", "Values": ["rayrl"]}]
    (group,) = boto3.client("ec2", region).describe_security_groups(Filters=filters)[
        "SecurityGroups"
    ]
    open_ports = [
        (rule["FromPort"], rule["ToPort"]) for rule in group["IpPermissions"] if rule["IpRanges"]
    ]
    assert open_ports == [(22, 22)]
    inside = [rule for rule in group["IpPermissions"] if not rule["IpRanges"]]
    assert {pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]} == {
        group["GroupId"]
    }


def test_the_file_says_of_a_gpu_machine_what_amazon_does(region: str) -> None:
    gpu = yaml.safe_load(FILE.read_text())["available_node_types"]["gpu"]
    kind = gpu["node_config"]["InstanceType"]
    (known,) = boto3.client("ec2", region).describe_instance_types(InstanceTypes=[kind])[
        "InstanceTypes"
    ]
    gpus = sum(one["Count"] for one in known["GpuInfo"]["Gpus"])
    assert gpu["resources"] == {"CPU": known["VCpuInfo"]["DefaultVCpus"], "GPU": gpus}


def instances(ec2: Any) -> list[dict[str, Any]]:
    return [one for some in ec2.describe_instances()["Reservations"] for one in some["Instances"]]
