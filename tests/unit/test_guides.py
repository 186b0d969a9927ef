"""docs/data.md, docs/after_training.md and README.md are true: examples run, names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl import cli, commands, config_keys, eval_cli, evaluate
from rayrl.config import Config
from rayrl.data import load_split, load_train_and_val
from rayrl.data.shards import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DATA = (DOCS / "data.md").read_text(encoding="utf-8")
AFTER = (DOCS / "after_training.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python ")]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_writer_of_shards_writes_what_the_loader_reads(here, prompts):
    pictures = here / "pictures"
    pictures.mkdir()
    written = {"cat": prompts[0].image, "boat": prompts[1].image}
    (pictures / "cat.jpg").write_bytes(written["cat"])
    (pictures / "boat.png").write_bytes(written["boat"])
    (block,) = blocks(DATA, "python")
    space: dict = {}
    exec(block, space)
    assert space["table"].schema == SCHEMA
    config = cli.load(None, ["--data.source", "parquet", "--data.path", "{split}.parquet"]).data
    data = load_split(config, "train")
    assert {one.prompt_id: one.image for one in data} == written
    assert [one.references for one in data] == [tuple(t) for t in space["captions"].values()]
    assert not data.rejected


def test_the_flags_for_a_hub_s_shards_read_them(here, prompts):
    (flags,) = (words[2:] for words in commands_in(DATA) if "--data.val_path" in words)
    (here / "flickr/data").mkdir(parents=True)
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-0")):
        image = {"bytes": prompts[i].image, "path": "photo.jpg"}
        table = pa.table({"image": [image], "sentences": [[f"caption {i}"]], "split": ["all"]})
        pq.write_table(table, f"flickr/data/{name}.parquet")
    train, val = load_train_and_val(cli.load(None, flags).data)
    assert [*train.ids, *val.ids] == ["00000000", "00000001", "00000000"]
    assert [one.image for one in (*train, *val)] == [prompt.image for prompt in prompts[:3]]
    assert val.references() == [["caption 2"]]


def test_the_commands_are_understood():
    from rayrl.prepare import _parser

    seen = [words[1] for words in commands_in(DATA) + commands_in(AFTER)]
    assert seen == [
        *["jobs/grpo_coco.py"] * 2,
        *["jobs/prepare_coco.py"] * 2,
        "jobs/eval_coco.py",
    ]
    for _, script, *flags in commands_in(DATA) + commands_in(AFTER):
        if script == "jobs/grpo_coco.py":
            cli.load(None, flags)
        elif script == "jobs/eval_coco.py":
            assert eval_cli.parse(flags)[0].split == "test"
        else:
            assert _parser().parse_args(flags).image_size == 512
    for text, flags in (
        (DATA, r"`(--model\.path FOLDER [^`]*)`"),
        (AFTER, r"`(--(?:lear|engi)[^`]*)`"),
    ):
        for found in re.findall(flags, text):
            names = {word[2:] for word in found.split() if word.startswith("--")}
            assert names <= set(config_keys.known_keys()), found


def test_the_commands_of_the_readme_are_understood():
    from rayrl.doctor.__main__ import read_needs
    from rayrl.prepare import _parser

    found = commands_in(README)
    assert [words[1] for words in found].count("jobs/grpo_coco.py") == 4
    for _, script, *flags in found:
        if script == "jobs/prepare_coco.py":
            assert _parser().parse_args(flags).source == "karpathy"
        elif script == "-m":
            assert flags[:2] == ["rayrl.doctor", "--config"]
            assert read_needs(ROOT / flags[2])
        else:
            file = ROOT / flags.pop(1) if "--config" in flags else None
            cli.load(file, [flag for flag in flags if flag != "--config"])
    lists = re.findall(r"-r (\S+)", "\n".join(blocks(README, "sh")))
    assert lists == ["docker/gpu.txt"] and (ROOT / lists[0]).is_file()


def test_the_flags_for_one_gpu_are_those_of_the_guide():
    (flags,) = re.findall(r"on one GPU add\s+`([^`]*)`", README)
    config = cli.load(ROOT / "jobs/coco.yaml", flags.split())
    assert config.rollout.gpus + config.learner.gpus == 1 and config.rollout.colocate
    weights = (DOCS / "weights.md").read_text(encoding="utf-8")
    (job,) = (words for words in commands_in(weights) if words[1] == "jobs/grpo_coco.py")
    assert cli.load(ROOT / job[3], job[4:]).rollout == config.rollout


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda job: job.stem)
def test_a_python_without_the_packages_is_told_which_one_to_take(job):
    # -S: without site-packages.
    done = subprocess.run([sys.executable, "-S", job], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("No module named ") and f".venv/bin/python {job} …" in line


def test_the_defaults_are_those_that_the_pages_name():
    from rayrl.prepare import _parser

    config, prepare = Config(), _parser()
    assert config.data.image_size == 48 and prepare.get_default("image_size") == 224
    assert (config.xe.steps, config.xe.lr, config.train.keep_checkpoints) == (400, 2e-3, 2)


def test_the_captioner_of_the_example_says_what_an_engine_says(here, tiny_folder, prompts, capsys):

    from rayrl.config import EngineConfig, Part
    from rayrl.engine.base import EngineSetup
    from rayrl.engine.hf import HfEngine
    from rayrl.vlm import load_captioner
    from rayrl.weights import pack

    setup = EngineSetup(folder=tiny_folder, config=EngineConfig(backend="hf"), group_size=1)
    engine = HfEngine(setup)
    engine.load_weights(pack(load_captioner(tiny_folder).model, 0), changed=Part.__args__)
    (here / "photo.jpg").write_bytes(prompts[0].image)
    (block,) = blocks(AFTER, "python")
    block = block.replace("runs/coco/checkpoints/latest", str(tiny_folder))
    block = block.replace("Describe the image.", prompts[0].text)
    exec(block, {})
    said = capsys.readouterr().out.removesuffix("\n")
    assert said and said == engine.greedy(prompts[:1], 25)[0].text


def test_the_example_of_the_learner_gives_the_naive_log_probs_and_a_gradient(
    here, tiny_folder, prompts
):
    import torch

    (here / "photo.jpg").write_bytes(prompts[0].image)
    (block,) = blocks((DOCS / "learner.md").read_text(encoding="utf-8"), "python")
    space: dict = {}
    exec(block.replace("runs/coco/checkpoints/latest", str(tiny_folder)), space)
    policy, mask = space["policy"], space["mask"]
    assert policy.shape == mask.shape and policy.shape[:2] == (1, 3)
    torch.testing.assert_close(policy.detach(), space["naive"], atol=1e-5, rtol=1e-5)
    assert bool((policy[mask] < 0).all())
    # Rewards minus their mean of 0.4, over their spread; a loss of tokens, at ratio 1.
    rewards = space["rewards"]
    advantages = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-5)
    want = -(advantages[..., None] * mask).sum() / mask.sum()
    assert float(space["loss"].detach()) == pytest.approx(float(want), rel=1e-4)
    assert max(float(p.grad.abs().max()) for p in space["model"].parameters()) > 0


def test_the_example_of_the_readme_scores(capsys):
    (block,) = blocks(README, "python")
    space: dict = {}
    exec(block, space)
    first, second = space["scores"]
    assert first > second > 0
    assert capsys.readouterr().out == f"{space['scores']}\n"


def test_messages_in_the_table_of_failures_are_in_the_code():
    code = "".join(
        re.sub(r'"\s*f?"', "", file.read_text(encoding="utf-8"))
        for file in (DOCS.parent / "rayrl").rglob("*.py")
    )
    for message in (
        "does not compute with the weights of version",
        "groups of the step were dropped",
        "the rewards cannot score",
        "gave up after",
        "s are ready, want at least",
        "waiting for room for",
        "are longer than engine.max_model_len",
    ):
        assert message in code, message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page.name}: {target}"


FOLDER = ["--data.source", "coco", "--data.path", "{split}.json", "--data.images", "photos"]
SHARDS = ["--data.source", "parquet", "--data.path", "{split}.parquet"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.path", "elsewhere", *FOLDER], True),
        (["--model.path", "elsewhere", *FOLDER, "--data.image_size", "48"], False),
        (["--model.path", "elsewhere", *SHARDS], False),
        (["--model.path", "elsewhere"], False),
        (FOLDER, False),
    ],
)
@pytest.mark.parametrize("job", [commands.grpo, commands.xe])
def test_photographs_of_the_size_of_scenes_are_spoken_of(job, flags, said, here, capsys):
    (here / "photos").mkdir()
    for name in ("train.json", "val.json", "train.parquet", "val.parquet"):
        (here / name).touch()
    job([*flags, "--dry-run"])
    told = capsys.readouterr().err
    assert ("photographs of photos are resized to data.image_size 48, that of the" in told) == said


@pytest.mark.parametrize("given", [[], ["--data.image_size", "64"]])
def test_so_they_are_where_a_folder_from_elsewhere_is_evaluated(here, given, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "main", lambda *_: None)
    (here / "config.json").write_text("{}")
    commands.evaluate(["--checkpoint", ".", *FOLDER, *given])
    assert ("photographs of photos" in capsys.readouterr().err) == (not given)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], False),
        (["--model.path", "elsewhere"], True),
        (["--model.path", "elsewhere", "--xe.steps", "50"], True),
        (["--model.path", "elsewhere", "--xe.lr", "1e-5"], False),
        (["--model.path", "elsewhere", "--xe.steps", "0"], False),
    ],
)
def test_a_rate_for_the_tiny_captioner_is_spoken_of_where_it_would_train_another(
    flags, said, capsys
):
    commands.grpo([*flags, "--dry-run"])
    told = capsys.readouterr().err
    assert ("xe.lr 0.002, a rate for the tiny captioner" in told) == said
    assert ("--xe.steps 0" in told) == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.steps", "200"], True),
        (["--train.steps", "201"], False),
        (["--objective.set", "phase_steps=20+5"], False),
    ],
)
def test_a_phase_that_a_run_never_reaches_is_spoken_of(capsys, flags, said):
    commands.grpo(["--objective.preset", "veripo_schedule", *flags, "--dry-run"])
    told = capsys.readouterr().err
    assert ("the last phase of veripo_schedule begins after 200 steps and is never" in told) == said
