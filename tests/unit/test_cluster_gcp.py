"""cluster/gcp.yaml through Ray's own launcher: the cloud is in this process, and what would run on
machines over SSH is written down instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError

from tests.google_cloud import GoogleCloud, log_in
from tests.ray_launcher import join, launcher, up

FILE = Path(__file__).resolve().parents[2] / "cluster/gcp.yaml"


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GoogleCloud]:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray-auth").mkdir()
    (tmp_path / ".ray-auth/token").write_text("0" * 64)
    provider = yaml.safe_load(FILE.read_text())["provider"]
    cloud = GoogleCloud(provider["project_id"], provider["region"])
    log_in(monkeypatch, cloud, tmp_path)
    with launcher():
        yield cloud


def test_ray_up_starts_a_head_that_can_start_spot_workers(
    cloud: GoogleCloud, tmp_path: Path
) -> None:
    written, on_head = yaml.safe_load(FILE.read_text()), up(FILE)
    (head,) = cloud.instances.values()
    assert head["machineType"].endswith("/e2-standard-4") and "scheduling" not in head
    # With which it may start machines.
    (account,) = head["serviceAccounts"]
    roles = cloud.roles[f"serviceAccount:{account['email']}"]
    assert roles >= {"roles/compute.admin", "roles/iam.serviceAccountUser"}
    assert "ray start --head" in on_head.check_started(written["docker"]["head_image"])
    on_worker = join(on_head.bootstrap, "gpu", tmp_path / ".ray-auth")
    started = on_worker.check_started(written["docker"]["image"])
    assert "RAY_HEAD_IP=10.0.0.1" in started and "--address=$RAY_HEAD_IP:6379" in started
    # Ray may install a worker twice.
    assert not any("ray stop" in command for command in on_worker.commands)
    (worker,) = [one for one in cloud.instances.values() if one["name"] != head["name"]]
    assert worker["machineType"].endswith("/g2-standard-8")
    assert worker["scheduling"]["provisioningModel"] == "SPOT"
    assert "serviceAccounts" not in worker
    for one in (head, worker):
        (disk,) = one["disks"]
        assert disk["autoDelete"] and disk["initializeParams"]["diskType"].endswith("/pd-balanced")
    # As the head does with machines that are idle, and `ray down` with all.
    given = on_head.bootstrap
    provider = _get_node_provider(given["provider"], given["cluster_name"])
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert not cloud.instances


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"scheduling": {"provisioningModel": "SPOTS"}}, "provisioningModel is one of"),
        ({"scheduling": {"provisioningModel": "SPOT"}}, "does not support live migration"),
        ({"machine_type": "g2-standard-8"}, "no field 'machine_type'"),
    ],
)
def test_a_machine_that_google_refuses_is_not_started(
    cloud: GoogleCloud, tmp_path: Path, machine: dict[str, Any], reason: str
) -> None:
    given = up(FILE).bootstrap
    given["available_node_types"]["gpu"]["node_config"] |= machine
    with pytest.raises(LaunchNodeError) as refused:
        join(given, "gpu", tmp_path / ".ray-auth")
    assert reason in str(refused.value.__cause__)
    assert len(cloud.instances) == 1
