"""cluster/aws.yaml through Ray's own launcher: the cloud is a local server that speaks EC2 and IAM,
and what would run on machines over SSH is written down instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws.utils import client_cache, resource_cache

from tests.aws_server import aws_server, log_in
from tests.ray_launcher import bootstrapped, join, launcher, up

FILE = Path(__file__).resolve().parents[2] / "cluster/aws.yaml"


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
    # What Ray remembers of the clouds it spoke to in this process.
    remembered = (resource_cache, client_cache, aws_config._get_subnets_or_die)
    for cached in remembered:
        cached.cache_clear()
    with launcher():
        yield yaml.safe_load(FILE.read_text())["provider"]["region"]
    for cached in remembered:
        cached.cache_clear()


def test_ray_up_starts_a_head_that_can_start_spot_workers(region: str, tmp_path: Path) -> None:
    written, on_head = yaml.safe_load(FILE.read_text()), up(FILE)
    ec2 = boto3.client("ec2", region)
    (head,) = instances(ec2)
    assert head["InstanceType"] == "m7i.xlarge" and "InstanceLifecycle" not in head
    # With which it may start machines.
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/ray-autoscaler-v1")
    assert "ray start --head" in on_head.check_started(written["docker"]["head_image"])
    on_worker = join(on_head.bootstrap, "gpu", tmp_path / ".ray-auth")
    (worker,) = [one for one in instances(ec2) if one["InstanceId"] != head["InstanceId"]]
    started = on_worker.check_started(written["docker"]["image"])
    assert "RAY_HEAD_IP=10.0.0.1" in started and "--address=$RAY_HEAD_IP:6379" in started
    assert worker["InstanceType"] == "g6.2xlarge" and worker["InstanceLifecycle"] == "spot"
    assert "IamInstanceProfile" not in worker
    for one in (head, worker):
        assert one["MetadataOptions"]["HttpTokens"] == "required"
        assert one["SecurityGroups"] == head["SecurityGroups"]
    (volume,) = {v["VolumeType"] for v in ec2.describe_volumes()["Volumes"] if v["Encrypted"]}
    assert volume == "gp3" and len(ec2.describe_volumes()["Volumes"]) == 2


def test_the_head_needs_no_permission_that_it_lacks_to_start_a_worker(region: str) -> None:
    bootstrapped(FILE)
    policies = boto3.client("iam", region).list_attached_role_policies(RoleName="ray-autoscaler-v1")
    held = {policy["PolicyName"] for policy in policies["AttachedPolicies"]}
    assert held == {"AmazonEC2FullAccess", "AmazonS3FullAccess"}
    # So an image's id, and not a name of Systems Manager; and no role that it would hand on.
    for kind in yaml.safe_load(FILE.read_text())["available_node_types"].values():
        assert re.fullmatch("ami-[0-9a-f]{17}", kind["node_config"]["ImageId"])
        assert "IamInstanceProfile" not in kind["node_config"]


def test_ray_takes_the_group_that_was_made_before_it_and_fills_it(
    region: str, tmp_path: Path
) -> None:
    ec2 = boto3.client("ec2", region)
    (vpc,) = ec2.describe_vpcs()["Vpcs"]
    made = ec2.create_security_group(GroupName="early", Description="d", VpcId=vpc["VpcId"])
    file = tmp_path / "aws.yaml"
    file.write_text(FILE.read_text().replace("GroupName: rayrl", "GroupName: early"))
    kinds = bootstrapped(file)["available_node_types"].values()
    assert [kind["node_config"]["SecurityGroupIds"] for kind in kinds] == [[made["GroupId"]]] * 2
    (group,) = ec2.describe_security_groups(GroupIds=[made["GroupId"]])["SecurityGroups"]
    ssh, inside = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"], reverse=True)
    assert ssh["FromPort"] == 22 and inside["IpProtocol"] == "-1"
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [made["GroupId"]]


def test_nothing_but_ssh_is_open_to_the_world(region: str) -> None:
    bootstrapped(FILE)
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
