"""docs/rewards.md is true: its examples run, and its tables name what there is."""

from __future__ import annotations

import importlib
import pickle
import re
import shlex
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rayrl.config import Config
from rayrl.eval_cli import parse
from rayrl.rewards.bootstrap import compare
from rayrl.rewards.clipscore import ClipScore
from rayrl.rewards.config import KINDS, RewardConfig
from rayrl.rewards.java import MetricUnavailable
from rayrl.rewards.score import Scorer
from rayrl.rewards.statistics import reward_statistics
from rayrl.rewards.suite import METRICS, CaptionSet, evaluate
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup
from tests.unit.test_rewards_clipscore import picture, tiny_clip

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
REFERENCES = [("A brown dog on a red sofa", "a dog lies down"), ("A boat on a lake",)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def terms_with(kind: str) -> dict:
    """The rewards of the first example that has a term of ``kind``."""
    found = [yaml.safe_load(block)["reward"] for block in blocks("yaml")]
    return next(r for r in found if any(kind in (n, k) for n, k in kinds(r)))


def kinds(reward: dict) -> list[tuple[str, str]]:
    terms = reward["terms"].items()
    return [(name, term["kind"] if isinstance(term, dict) and "kind" in term else name)
            for name, term in terms]  # fmt: skip


def groups() -> list[RolloutGroup]:
    def completion(text: str) -> Completion:
        return Completion(
            token_ids=np.array([1], np.int32),
            logprobs=np.zeros(1, np.float32),
            text=text,
            finish_reason="stop",
            weight_version=0,
        )

    texts = ("a brown dog on a sofa", "a boat")
    return [
        RolloutGroup(
            prompt=Prompt(prompt_id=f"{i}", image=b"image", text="Describe.", references=some),
            prompt_token_ids=np.array([1], np.int32),
            completions=tuple(completion(text) for text in texts),
            group_size=2,
        )
        for i, some in enumerate(REFERENCES)
    ]


def scored(reward: dict) -> list[ScoredGroup]:
    config = RewardConfig.model_validate(reward)
    results = Scorer(config, reward_statistics(REFERENCES, config)).score(groups())
    assert all(isinstance(result, ScoredGroup) for result in results), results
    return results


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The examples that begin with a file's name, as files that can be imported."""
    for block in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_every_yaml_example_is_a_configuration() -> None:
    found = blocks("yaml")
    assert len(found) == 7
    for block in found:
        config = Config.model_validate(yaml.safe_load(block))
        assert len(config.reward.terms) >= 1


def test_a_judge_says_where_a_caption_is_wrong(modules) -> None:
    modules("my_judge")
    (block,) = [block for block in blocks("yaml") if "constraints" in block]
    first, _ = scored(yaml.safe_load(block)["reward"])
    # "a brown dog on a sofa" says nothing new; "a boat" does, once.
    assert first.wrong_spans == ((), ((2, 6),))
    assert first.fields["judge_ok"].tolist() == [True, True]
    assert first.fields["reward_versions"].tolist() == [1, 1]


def test_the_table_of_kinds_has_every_kind_and_its_settings() -> None:
    table = TEXT.split("| settings |\n")[1].split("\n\n")[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[1:]]
    settings = {row[0].strip(" `"): row[3] for row in rows}
    assert set(settings) == set(KINDS)
    terms = {
        "clip_score": {"folder": "x"},
        "function": {"path": "a:b"},
        "http": {"url": "http://x"},
        "chat": {"url": "http://x", "model": "m"},
        "ensemble": {"members": {"bleu": 1.0}},
    }
    for kind, text in settings.items():
        term = RewardConfig.model_validate({"terms": {kind: terms.get(kind, 1.0)}}).terms[kind]
        for name, value in re.findall(r"`(\w+)`: ([\w.]+)", text):
            given = getattr(term, name)
            assert str(given).lower() == value or float(value) == given, (kind, name)


def test_the_python_examples_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    table = {"document_frequency": {("a",): 2.0, ("<eos>",): 2.0}, "ref_len": 3}
    (tmp_path / "coco-train-words.p").write_bytes(pickle.dumps(table))
    space: dict = {}
    for block in blocks("python"):
        if not block.startswith("# "):
            exec(block, space)
    assert space["df"].num_documents == 2 and (tmp_path / "mine.npz").is_file()
    assert "cider_d" in capsys.readouterr().out
    np.testing.assert_allclose(
        space["scores"].mean(), space["evaluation"].scores["cider_d"], rtol=1e-12
    )


def test_a_clip_model_of_pickles_is_written_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_clip(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MetricUnavailable, match=r"no model\.safetensors"):
        ClipScore(folder)
    (block,) = (b for b in blocks("python") if b.startswith("# to_safetensors.py"))
    exec(block.replace('"openai/clip-vit-base-patch32"', repr(str(folder))), {})
    written = ClipScore("models/clip-vit-base-patch32")
    assert np.isfinite(written.score([picture(0)], ["a dog"])).all()


def test_the_function_of_the_example_scores(modules) -> None:
    first, second = scored(terms_with("function"))
    assert first.terms["colours"].tolist() == [0.5, 0.0]  # brown of brown and red
    assert second.terms["colours"].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(
        first.rewards, first.terms["cider_d"] + 0.5 * first.terms["colours"], rtol=1e-6
    )


def test_the_server_of_the_example_scores(modules) -> None:
    server = modules("reward_server").serve(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reward = terms_with("http")
        reward["terms"]["mine"]["url"] = f"http://127.0.0.1:{server.server_port}"
        for result in scored(reward):
            assert result.terms["mine"].tolist() == [0.5, 0.5]
    finally:
        server.shutdown()
        server.server_close()


def test_the_ensemble_of_the_example_scores() -> None:
    for result in scored(terms_with("ensemble")):
        assert (result.terms["cautious"] <= 1.0).all()
        assert result.terms["cautious"].max() > 0


def test_every_command_is_understood() -> None:
    (block,) = blocks("sh")
    lines = block.strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        program, script, *flags = shlex.split(line)
        assert (program, script) == ("python", "jobs/eval_coco.py")
        parse(flags)


def test_every_name_that_metrics_takes_is_there() -> None:
    (names,) = re.findall(r"^`--metrics` computes some of them: (.*?); all", TEXT, re.M | re.S)
    assert re.findall(r"`(\w+)`", names) == list(METRICS)


def test_a_metric_of_ones_own_is_scored_and_compared(modules) -> None:
    modules("my_metrics")
    (line,) = re.findall(r"^    python jobs/eval_coco.py (.*)$", TEXT, re.MULTILINE)
    names = parse(shlex.split(line))[0].metrics
    assert names == ["cider_d", "my_metrics:colours"]
    a = CaptionSet(["a brown dog", "a boat"], REFERENCES)
    b = CaptionSet(["a blue dog", "a boat"], REFERENCES)
    assert evaluate(a, names).scores["right_colours"] == 1.0
    evaluation = evaluate(b, names)
    assert evaluation.captions["right_colours"].tolist() == [0.0, 1.0]
    assert re.search(r"^right_colours +50\.00$", evaluation.table(), re.MULTILINE)
    assert compare(a, b, names)[0]["right_colours"].difference == -0.5


def test_the_flag_in_the_text_is_understood() -> None:
    from rayrl import cli

    (flag,) = re.findall(r"`(--reward\.terms '\{[^`]*')`", TEXT)
    config = cli.load(None, shlex.split(flag))
    assert {name: term.weight for name, term in config.reward.terms.items()} == {
        "cider_d": 1.0,
        "bad_ending": 0.5,
    }
