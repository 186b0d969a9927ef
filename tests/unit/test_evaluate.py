"""The evaluation job without an engine: numbers by hand, and every wrong input in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayrl import commands, evaluate
from rayrl.config import Config
from rayrl.data import load_split
from rayrl.data.references import load_captions, load_references, only
from rayrl.eval_cli import load_config, parse

REFERENCES = {
    "7": ["A man rides a brown horse."],
    "8": ["Three small birds"],
    "9": ["a boat on a lake at sunset"],
}
CAPTIONS = {7: "a man rides a brown horse", 8: "three small birds", 9: "nothing alike"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with references.json (a COCO captions file) and results.json, to work in."""
    monkeypatch.chdir(tmp_path)
    coco = {
        "images": [{"id": int(i), "file_name": f"{i}.jpg"} for i in REFERENCES],
        "annotations": [
            {"id": k, "image_id": int(i), "caption": text}
            for k, (i, texts) in enumerate(REFERENCES.items())
            for text in texts
        ],
    }
    write("references.json", coco)
    write("results.json", results())
    return tmp_path


def write(name: str, content: object) -> None:
    Path(name).write_text(json.dumps(content))


def results(captions: dict = CAPTIONS) -> list[dict]:
    return [{"image_id": image, "caption": caption} for image, caption in captions.items()]


def run(*flags: str) -> int:
    """The exit code of the job."""
    try:
        commands.evaluate(flags)
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    return 0


def test_a_results_file_is_scored_times_100_and_written_as_the_server_takes_it(folder, capsys):
    flags = ("--results", "results.json", "--references", "references.json")
    assert run(*flags, "--metrics", "cider_d", "health", "clip_score") == 0
    out = capsys.readouterr().out
    # Copies of a reference score 10, those of three words 7.5 (no 4-gram), the third 0.
    want = 100 * (10 + 7.5 + 0) / 3
    assert f"cider_d  {want:11.2f}".split() == next(
        line.split() for line in out.splitlines() if line.startswith("cider_d")
    )
    assert "3 captions, x100" in out and "clip_score: left out" in out
    metrics = json.loads(Path("results_eval_val/metrics.json").read_text())
    assert metrics["scores"]["cider_d"] == pytest.approx(want, abs=1e-9)
    assert metrics["scores"]["length"] == pytest.approx((6 + 3 + 2) / 3)
    assert metrics["scores"]["bad_ending"] == 0
    assert metrics["scale"].startswith("x100")
    assert metrics["signature"].startswith("Cider-D[n4,s6.0]+eos:no+df:corpus[3]#")
    assert (metrics["df"], metrics["num_captions"]) == ("corpus", 3)
    assert list(metrics["left_out"]) == ["clip_score"]
    assert (
        metrics["data"]["fingerprint"]
        == load_references(Path("references.json"), "val").fingerprint()
    )
    written = json.loads(Path("results_eval_val/captions_val_results.json").read_text())
    assert written == results()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({7: "a", 8: "b"}, "1 of 3 images have no caption, such as ['9']"),
        ({**CAPTIONS, 10: "c"}, "1 captions are of images without references, such as ['10']"),
        ([*results(), {"image_id": 7, "caption": "again"}], "image 7 has two captions"),
        ([{"image_id": 7, "caption": ["a list"]}], "image 7 has caption ['a list'], want one str"),
        ([{"image_id": 1.5, "caption": "a"}], "entry 0 has image_id 1.5, want an int or a str"),
        ([{"image": 7}], "entry 0 is {'image': 7}, want image_id and caption"),
        ([{"image_id": 7, "caption": ["long"] * 99}], f"{['long'] * 99!r:.60}, want one str"),
        (["long" * 99], f"{'long' * 99!r:.60}, want image_id and caption"),
        ("text", "holds str, want a list of results"),
    ],
)
def test_a_wrong_results_file_is_one_line_and_exit_code_2(folder, capsys, content, message):
    write("results.json", results(content) if isinstance(content, dict) else content)
    assert run("--results", "results.json", "--references", "references.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval_coco.py: ") and message in line
    assert not Path("results_eval_val").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--results", "no.json", "--references", "references.json"), "no.json: No such file"),
        (
            ("--results", "references.json", "--references", "references.json"),
            "is it for --references?",
        ),
        (("--results", ".", "--references", "references.json"), ".: Is a directory"),
        (("--results", "results.json", "--references", "no.json"), "no.json: no such file"),
        (("--results", "results.json", "--references", "one.json"), "1 image: CIDEr-D counts"),
        (("--results", "results.json", "--references", "broken"), "broken: not JSON"),
        (("--results", "results.json", "--references", "results.json"), "want the references"),
        (("--results", "results.json", "--references", "odd.json"), "image 7 has 'a', want a list"),
        (("--results", "results.json", "--data.pth", "x"), "did you mean 'data.path'?"),
        (("--results", "results.json", "--reference", "x"), "did you mean --references?"),
        (("--results", "results.json", "--metrics", "cider"), "want one of ['cider_d"),
        (("--results", "results.json", "--metrics", "no_such:f"), "no module 'no_such'; want it"),
        (("--results", "results.json", "--beam", "3"), "they need --checkpoint"),
        (("--compare", "results.json"), "expected 2 arguments"),
        (("--checkpoint", "no"), "no: no model folder (one with a config.json)"),
        (("--checkpoint", ".", "--references", "x"), "holds no images to caption"),
        (("--checkpoint", ".", "--subset"), "it needs --results or --compare"),
        (
            ("--results", "results.json", "--references", "references.json", "--clip", "x"),
            "--clip needs the images, which --references does not hold",
        ),
        (("--checkpoint", ".", "--samples", "1"), "at least 2 captions"),
        (("--checkpoint", ".", "--beam", "0"), "0, want at least 1"),
        (
            (
                *("--checkpoint", ".", "--beam", "3", "--engine.backend", "vllm"),
                *("--data.source", "scenes"),
            ),
            "needs --engine.backend",
        ),
        (
            ("--checkpoint", ".", "--data.max_val", "9"),
            "--checkpoint . lies in no run folder with a config.yaml, and nothing says which",
        ),
        (("--results", "results.json"), "no --references: want a COCO captions file"),
        (("--compare", "results.json", "results.json"), "no --references: want a COCO captions"),
        ((), "--checkpoint --results --compare --self-test is required"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(folder, capsys, flags, message):
    write("one.json", {"7": ["a man"]})
    write("odd.json", {"7": "a"})
    write("config.json", {})
    Path("broken").write_text("{")
    assert run(*flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.source", "scenes"],
        ["--data.source=scenes"],
        ["--data", '{"source": "scenes"}'],
        ["--data.scenes.num_val", "9"],
        ["--config", "some.yaml"],
    ],
)
def test_generated_scenes_are_scored_where_somebody_said_so(folder, flags):
    write("config.json", {})
    Path("some.yaml").write_text("seed: 3\n")
    assert load_config(*parse(["--checkpoint", ".", *flags])).data.source == "scenes"
    assert load_config(*parse(["--results", "results.json", *flags])).data.source == "scenes"


def test_of_more_references_the_captioned_images_are_scored_where_asked(folder, capsys):
    write("results.json", results({7: CAPTIONS[7], 9: CAPTIONS[9]}))
    flags = ("--results", "results.json", "--references")
    assert run(*flags, "references.json") == 2
    assert capsys.readouterr().err.endswith("or score the captioned images alone with --subset\n")
    metrics = ("--metrics", "cider_d")
    assert run(*flags, "references.json", "--subset", *metrics) == 0
    assert "of them the 2 that results.json captions (--subset)" in capsys.readouterr().out
    found = json.loads(Path("results_eval_val/metrics.json").read_text())
    assert found["subset"] == {"images": 2, "of": 3} and found["data"]["num_images"] == 2
    assert "+df:corpus[2]#" in found["signature"]
    # Just as against the references of these images alone.
    write("alone.json", {i: REFERENCES[i] for i in ("7", "9")})
    assert run(*flags, "alone.json", *metrics, "--output", "alone") == 0
    alone = json.loads(Path("alone/metrics.json").read_text())
    assert (alone["scores"], alone["signature"]) == (found["scores"], found["signature"])
    assert "subset" not in alone


def test_a_comparison_of_a_part_is_of_the_images_of_its_first_file(folder, capsys):
    write("some.json", results({7: CAPTIONS[7], 8: "birds"}))
    write("others.json", results({7: CAPTIONS[7], 9: "a boat"}))
    flags = ("--references", "references.json", "--subset", "--metrics", "bleu")
    assert run("--compare", "some.json", "some.json", *flags, "--output", "out") == 0
    written = json.loads(Path("out/comparison.json").read_text())
    assert written["subset"] == {"images": 2, "of": 3}
    assert run("--compare", "some.json", "others.json", *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "eval_coco.py: others.json: 1 of 2 images have no caption, such as ['8'], and 1 captions "
        "are of images without references, such as ['9']: are they of another --split?"
    )


def test_the_pictures_of_a_part_are_its_own():
    data = load_split(Config.model_validate({"data": {"scenes": {"num_val": 9}}}).data, "val")
    for one, other in zip(only(data, [data.ids[5], data.ids[2]]), [data[2], data[5]], strict=True):
        assert (one.prompt_id, one.image) == (other.prompt_id, other.image)
        assert one.references == other.references


@pytest.mark.parametrize("subset", [False, True])
def test_clip_sees_the_original_files_of_a_folder(folder, monkeypatch, subset):
    from PIL import Image

    Path("photos").mkdir()
    for i, image in enumerate(REFERENCES):
        Image.new("RGB", (64, 40), (80 * i, 0, 0)).save(f"photos/{image}.jpg")
    seen = []

    class Clip:
        def __init__(self, *_):
            pass

        def both(self, images, captions, references):
            seen.extend(images)
            return np.ones(len(captions)), np.ones(len(captions))

    monkeypatch.setattr("rayrl.rewards.clipscore.ClipScore", Clip)
    monkeypatch.setattr("rayrl.rewards.clipscore.check_clip_folder", lambda _: None)
    captions = {image: text for image, text in CAPTIONS.items() if image != 7 or not subset}
    write("results.json", results(captions))
    data = ("--data.source", "coco", "--data.path", "references.json", "--data.images", "photos")
    flags = ("--results", "results.json", "--metrics", "clip_score", "--clip", "clip", *data)
    assert run(*flags, *["--subset"][: int(subset)]) == 0
    assert seen == [Path(f"photos/{image}.jpg").read_bytes() for image in captions]
    metrics = json.loads(Path("results_eval_val/metrics.json").read_text())
    assert metrics["data"]["clip_images"] == "original"


def test_clip_sees_what_other_sources_have(folder):
    config = Config.model_validate({"data": {"scenes": {"num_val": 9}}})
    data = load_split(config.data, "val")
    assert list(data.pictures()) == [prompt.image for prompt in data]
    assert data.pictures()[7:] == [data[7].image, data[8].image]
    assert evaluate._seen_by_clip(data) == f"{config.data.image_size}x{config.data.image_size}"


def test_what_is_scored_is_said(folder, capsys, monkeypatch):
    flags = ("--results", "results.json", "--references", "references.json", "--split", "test")
    assert run(*flags, "--metrics", "bleu") == 0
    assert "data: references.json, split test, 3 images\n" in capsys.readouterr().out
    write("config.json", {"model_type": "idefics3"})
    monkeypatch.setattr(evaluate, "check_first_prompt", refuse_to_begin)
    data = ("--data.scenes.num_val", "9", "--data.instruction", "Say it.")
    assert run("--checkpoint", ".", "--engine.backend", "hf", *data) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["data: scenes, split val, 9 images", "instruction: Say it."]


def test_captions_outlive_what_scores_them(folder, monkeypatch):
    def fails(*_):
        raise ValueError("no scores today")

    monkeypatch.setattr(evaluate, "evaluate", fails)
    assert run("--results", "results.json", "--references", "references.json") == 2
    written = json.loads(Path("results_eval_val/captions_val_results.json").read_text())
    assert written == results()


def test_a_clip_folder_is_looked_at_before_anything_is_captioned(folder, capsys, monkeypatch):
    write("config.json", {})
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", refuse_to_begin)
    flags = ("--checkpoint", ".", "--data.source", "scenes", "--clip", ".")
    assert run(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval_coco.py: --clip: no CLIP model at . (no model.safetensors or ")


def test_metrics_of_the_same_captions_are_added_and_of_others_take_their_place(folder, capsys):
    flags = ("--results", "results.json", "--references", "references.json", "--metrics")

    def scores(*metrics: str) -> tuple[dict, str]:
        capsys.readouterr()
        assert run(*flags, *metrics) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        return json.loads(Path("results_eval_val/metrics.json").read_text()), said

    first, said = scores("cider_d", "clip_score")
    assert said.startswith("written: ") and said.endswith("results_eval_val/metrics.json")
    both, said = scores("rouge_l")
    assert said.startswith("written, beside scores of the same captions (cider_d): ")
    assert list(both["scores"]) == ["cider_d", "rouge_l"]
    assert both["scores"]["cider_d"] == first["scores"]["cider_d"]
    assert both["signature"] == first["signature"] and list(both["left_out"]) == ["clip_score"]
    write("results.json", results({**CAPTIONS, 9: "a boat"}))
    other, said = scores("rouge_l")
    assert said.startswith("written in the place of scores that differ in captions: ")
    assert list(other["scores"]) == ["rouge_l"] and other["left_out"] == {}
    assert other["scores"]["rouge_l"] != both["scores"]["rouge_l"]
    Path("results_eval_val/metrics.json").write_text("{")
    assert scores("rouge_l")[1].startswith("written: ")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "step_2_eval_val"),
        (["--split", "test"], "step_2_eval_test"),
        (["--beam", "5"], "step_2_eval_val_beam5"),
        (["--samples", "3", "--beam", "2"], "step_2_eval_val_beam2_samples3"),
        (["--output", "here"], "here"),
    ],
)
def test_each_way_to_decode_has_a_folder_of_its_own(folder, flags, name):
    options, _ = parse(["--checkpoint", str(folder / "step_2"), *flags])
    assert evaluate._output_folder(options).name == name


def refuse_to_begin(*_: object) -> None:
    raise ValueError("enough was said")


def test_two_files_are_compared_by_the_paired_bootstrap(folder, capsys):
    write("worse.json", results(dict.fromkeys(CAPTIONS, "nothing alike")))
    write("better.json", results({int(i): texts[0] for i, texts in REFERENCES.items()}))

    def compared(*files: str) -> tuple[int, dict[str, list[str]]]:
        settings = ("--references", "references.json", "--output", "out")
        metrics = ("--metrics", "cider_d", "bleu", "health", "clip_score")
        code = run("--compare", *files, *settings, *metrics)
        rows = (line.split() for line in capsys.readouterr().out.splitlines())
        return code, {row[0]: row[1:] for row in rows}

    code, rows = compared("worse.json", "better.json")
    assert code == 0 and rows["3"][:2] == ["images,", "x100;"]
    # One of the 27 ways to draw three images has the birds alone, who score 750.
    assert rows["cider_d"] == ["0.00", "916.67", "+916.67", "[+750.00,", "+1000.00]", "0.0000"]
    assert rows["bleu_1"][1] == "100.00" and rows["bleu_1"][-1] == "0.0000"
    assert rows["length"][:3] == ["2.00", "5.33", "+3.33"]
    assert rows["clip_score:"][:2] == ["left", "out,"]
    written = json.loads(Path("out/comparison.json").read_text())
    assert written["metrics"]["cider_d"]["difference"] == pytest.approx(100 * 27.5 / 3)
    assert written["metrics"]["length"]["num_images"] == 3
    assert written["signature"].startswith("Cider-D[n4,s6.0]+eos:no+df:corpus[3]#")
    assert list(written["left_out"]) == ["clip_score"]
    _, rows = compared("better.json", "better.json")
    assert rows["cider_d"][2:] == ["+0.00", "[+0.00,", "+0.00]", "1.0000"]
    assert rows["bleu_4"][2:] == ["+0.00", "[+0.00,", "+0.00]", "1.0000"]


def test_a_comparison_says_which_file_is_wrong(folder, capsys):
    write("short.json", results({7: "a"}))
    assert run("--compare", "results.json", "short.json", "--references", "references.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval_coco.py: short.json: 2 of 3 images have no caption")


def test_the_self_test_prints_the_golden_values(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run("--self-test") == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("cider_d of the good"))
    assert line.split()[-3:] == ["0.5637412592", "0.5637412592", "ok"]
    assert "meteor: left out, no java on the PATH" in out


def test_the_self_test_fails_with_one_wrong_value(capsys, monkeypatch):
    from rayrl.rewards.selftest import Check

    checks = [Check("one", 0.25, 0.25), Check("other", 0.25, 0.2500001)]
    monkeypatch.setattr(evaluate, "selftest", lambda: checks)
    monkeypatch.setenv("PATH", "")
    assert run("--self-test") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["one", "0.2500000000", "0.2500000000", "ok"]
    assert out[2].split() == ["other", "0.2500000000", "0.2500001000", "WRONG"]
    assert out[-1] == "1 of 2 values agree"


def test_a_java_that_fails_leaves_the_self_test_the_other_values(capsys, monkeypatch):
    def dies():
        raise ChildProcessError("Java ended with status 137")

    monkeypatch.setattr(evaluate, "meteor_checks", dies)
    assert run("--self-test") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == "meteor: left out, Java ended with status 137"
    assert out[-1].endswith("values agree") and len(out) > 5


def test_references_come_from_coco_karpathy_or_plain_files(folder):
    sentences = {i: [{"raw": text} for text in texts] for i, texts in REFERENCES.items()}
    images = [
        {"filename": f"{i}.jpg", "cocoid": int(i), "split": "test", "sentences": sentences[i]}
        for i in REFERENCES
    ]
    write("karpathy.json", {"images": images})
    write("plain.json", REFERENCES)
    # As pycocoevalcap's scorers take it, and as TextCaps writes it.
    held = {i: [{"caption": text, "id": 1} for text in texts] for i, texts in REFERENCES.items()}
    write("held.json", held)
    entries = [{"image_id": i, "reference_strs": texts} for i, texts in REFERENCES.items()]
    write("textcaps.json", {"dataset_type": "val", "data": [*entries, *entries]})
    coco = json.loads(Path("references.json").read_text())
    # As it is written for pycocoevalcap alone, which looks at no file.
    write("no_files.json", {**coco, "images": [{"id": image["id"]} for image in coco["images"]]})
    found = [
        load_references(Path(name), "test")
        for name in (
            *("references.json", "no_files.json", "karpathy.json"),
            *("plain.json", "held.json", "textcaps.json"),
        )
    ]
    for data in found:
        assert dict(zip(data.ids, data.references(), strict=True)) == REFERENCES
        assert data.fingerprint() == found[0].fingerprint()
    with pytest.raises(ValueError, match="no image of split val; its splits are test"):
        load_references(Path("karpathy.json"), "val")
    with pytest.raises(ValueError, match="references of 8, not its image"):
        found[0][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"7": ["a"], "8": ["b"], "7": ["c"]}', "image 7 is there twice"),
        ('{"7": [{"text": "a"}]}', r"image 7 has \[{'text': 'a'}\], want a list of captions"),
        ('{"7": {"caption": "a"}}', r"image 7 has {'caption': 'a'}, want a list of captions"),
        ('{"7\\ud83d": ["a"]}', r"image: '7\\ud83d' holds half a character"),
        ("[" * 100_000, "nested too deeply"),
        ('{"data": [{"image_id": 7}]}', r"data\[0\]: no reference_strs; it has image_id"),
    ],
)
def test_references_that_are_wrong_name_the_place(folder, content, message):
    Path("wrong.json").write_text(content)
    with pytest.raises(ValueError, match=f"^wrong.json: {message}"):
        load_references(Path("wrong.json"), "val")


def test_references_need_no_path_of_their_split(folder):
    data = ("--data.source", "parquet", "--data.path", "a", "--data.val_path", "b")
    flags = ("--results", "results.json", "--references", "references.json", "--split", "test")
    write("results.json", results(CAPTIONS))
    assert run(*flags, *data, "--metrics", "cider_d") == 0


def test_references_are_parsed_once(folder, monkeypatch):
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda *a, **k: parsed.append(a) or loads(*a, **k))
    assert len(load_references(Path("references.json"), "val")) == len(REFERENCES)
    assert len(parsed) == 1


def test_empty_references_count_as_in_pycocoevalcap(folder, capsys):
    from pycocoevalcap.cider.cider import Cider

    plain = {"1": ["a man rides", ""], "2": ["   ", "x y"], "3": ["two dogs"], "4": [""]}
    captions = {"1": "a man", "2": "y", "3": "two dogs", "4": "a man"}
    coco = {
        "images": [{"id": int(i)} for i in plain] + [{"id": 5}],
        "annotations": [
            {"id": 0, "image_id": int(i), "caption": text} for i in plain for text in plain[i]
        ],
    }
    sentences = [[{"raw": text} for text in plain[i]] for i in plain]
    karpathy = {
        "images": [
            {"filename": f"{i}.jpg", "cocoid": int(i), "split": "val", "sentences": some}
            for i, some in zip(plain, sentences, strict=True)
        ]
    }
    want, _ = Cider().compute_score(
        {i: [text.strip() for text in plain[i]] for i in plain}, {i: [captions[i]] for i in plain}
    )
    write("captions.json", captions)
    for name, content in (("plain", plain), ("coco", coco), ("karpathy", karpathy)):
        write(f"{name}.json", content)
        flags = ("--results", "captions.json", "--references", f"{name}.json")
        assert run(*flags, "--metrics", "cider_d", "bleu", "rouge_l", "--output", name) == 0
        scores = json.loads(Path(name, "metrics.json").read_text())["scores"]
        assert scores["cider_d"] == pytest.approx(100 * want, abs=1e-9)
        left_out = "left out: 1 image without captions (5)\n" in capsys.readouterr().out
        assert left_out == (name == "coco")


def test_what_is_left_out_is_said_of_a_file_that_does_not_match(folder, capsys):
    content = json.loads(Path("references.json").read_text())
    content["annotations"][0]["caption"] = " "
    write("references.json", content)
    flags = ("--data.source", "coco", "--data.path", "references.json", "--data.images", ".")
    from PIL import Image

    for image in REFERENCES:
        Image.new("RGB", (8, 8)).save(f"{image}.jpg")
    assert run("--results", "results.json", *flags) == 2
    said = capsys.readouterr()
    left_out = "1 empty caption (7), 1 image without captions (7)"
    assert f"left out: {left_out}\n" in said.out
    assert "1 captions are of images without references, such as ['7']" in said.err
    assert said.err.endswith(f"; left out of the data: {left_out}\n")


def test_captions_of_an_annotated_folder_are_read_without_its_images(folder):
    from rayrl.data.config import DataConfig

    config = DataConfig(source="coco", path="references.json", images="nowhere")
    assert load_captions(config, "train") == [
        text for texts in REFERENCES.values() for text in texts
    ]


def test_captions_of_shards_are_read_without_their_images(tmp_path):
    from rayrl.data.config import DataConfig

    for split, first in (("a", 0), ("b", 2)):
        rows = {
            "image_id": [str(first), str(first + 1)],
            "image": [b"not", b"read"],
            "captions": [[f" a\n{first} ", ""], [f"b {first}"]],
        }
        pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
    config = DataConfig(source="parquet", path=str(tmp_path))
    assert load_captions(config, "train") == ["a 0", "b 0", "a 2", "b 2"]


def test_a_reader_takes_the_images_of_the_data_that_was_loaded(monkeypatch):
    from rayrl.actors import captioner
    from rayrl.config import Config
    from rayrl.data import load_split

    data = load_split(Config.model_validate({"data": {"scenes": {"num_val": 9}}}).data, "val")
    # It travels by reference.
    monkeypatch.setattr(captioner.ray, "get", {"of the data": data}.__getitem__)
    table = captioner._Reader(["of the data"])({"data": [4, 7]})
    assert table.column("image").to_pylist() == [data[4].image, data[7].image]
    assert table.column("prompt_id").to_pylist() == [data.ids[4], data.ids[7]]


def test_the_captions_that_are_scored_are_not_taken_for_those_of_training(folder):
    from rayrl.config import Config

    data = {"source": "coco", "path": "references.json", "images": "nowhere"}
    options, _ = parse(["--results", "results.json", "--metrics", "health"])
    captions, missing = evaluate._training(options, Config.model_validate({"data": data}))
    assert captions == []
    assert missing["novel"].endswith("(data.path references.json is the same for train and val)")


def test_a_checkpoint_brings_the_configuration_of_its_run(tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint.parent / "latest").symlink_to("step_2")
    text = "data: {instruction: Caption this.}\nsampling: {max_tokens: 9}\n"
    (tmp_path / "run" / "config.yaml").write_text(text)
    flags = ["--checkpoint", str(checkpoint.parent / "latest"), "--sampling.max_tokens", "7"]
    config = load_config(*parse(flags))
    assert (config.data.instruction, config.sampling.max_tokens) == ("Caption this.", 7)
    assert str(tmp_path / "run" / "config.yaml") in capsys.readouterr().out
    (tmp_path / "other.yaml").write_text("seed: 4\n")
    config = load_config(*parse([*flags, "--config", str(tmp_path / "other.yaml")]))
    assert (config.seed, config.data.instruction) == (4, "Describe the image.")


@pytest.mark.parametrize(
    ("kind", "cuda", "gpus", "want"),
    [
        ("idefics3", None, 0.0, "vllm"),
        ("paligemma", None, 0.0, "hf"),
        # A build for GPUs, for workers without and with one.
        ("idefics3", "13.0", 0.0, "hf"),
        ("idefics3", "13.0", 1.0, "vllm"),
        ("paligemma", "13.0", 1.0, "hf"),
    ],
)
@pytest.mark.parametrize("adapters", [False, True])
def test_the_engine_that_is_left_open_is_one_that_can_caption_with_the_model(
    tmp_path, monkeypatch, kind, cuda, gpus, want, adapters
):
    from rayrl import cli
    from rayrl.decoding import Decoding
    from rayrl.engine import base

    folder = base_of = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if adapters:
        folder = tmp_path / "adapters"
        folder.mkdir()
        named = json.dumps({"base_model_name_or_path": str(base_of)})
        (folder / "adapter_config.json").write_text(named)
    monkeypatch.setattr(base, "vllm_importable", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    config = cli.load(None, ["--rollout.gpus", str(gpus)])
    one = Decoding(beams=1, max_tokens=5, samples=0, temperature=1.0)
    assert evaluate._with_backend(config, one, folder).engine.backend == want
    several = Decoding(beams=3, max_tokens=5, samples=0, temperature=1.0)
    assert evaluate._with_backend(config, several, folder).engine.backend == "hf"


def test_damaged_weights_are_named_with_their_folder(tiny_folder, tmp_path):
    from rayrl.actors.captioner import share_model
    from rayrl.config import Config

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged: damaged weights: "):
        share_model(Config(), folder)


def test_beam_search_finds_the_best_of_all_captions_of_two_tokens(tiny_folder, prompts):
    from rayrl.config import EngineConfig, Part
    from rayrl.engine.base import EngineSetup
    from rayrl.engine.hf import HfEngine
    from rayrl.vlm import load_captioner, prompt_inputs
    from rayrl.weights import pack

    captioner = load_captioner(tiny_folder)
    model, processor = captioner.model, captioner.processor
    engine = HfEngine(
        EngineSetup(folder=tiny_folder, config=EngineConfig(backend="hf"), group_size=1)
    )
    engine.load_weights(pack(model, 0), changed=Part.__args__)
    assert engine.beam(prompts, 6, 1) == [c.text for c in engine.greedy(prompts, 6)]

    inputs = prompt_inputs(processor, [prompts[0].image], [prompts[0].text])
    vocabulary = model.config.text_config.vocab_size
    banned, (end,) = list(captioner.banned_ids), captioner.eos_ids
    tree = {name: torch.cat([value] * vocabulary) for name, value in inputs.items()}
    tree["input_ids"] = torch.cat([tree["input_ids"], torch.arange(vocabulary)[:, None]], dim=1)
    tree["attention_mask"] = torch.ones_like(tree["input_ids"])
    with torch.inference_mode():
        first = model(**inputs).logits[0, -1].float()
        allowed = [i for i in range(vocabulary) if i not in banned]
        # The image placeholder as a caption's token has no image feature.
        second = model(**{k: v[allowed] for k, v in tree.items()}).logits[:, -1].float()
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    second[:, banned] = -torch.inf
    best = (first[allowed, None] + second) / 2
    one, other = divmod(int(best.argmax()), vocabulary)
    want = [allowed[one], other] if best.max() > first[end] else [end]
    text = processor.tokenizer.decode(want, skip_special_tokens=True).strip()
    assert engine.beam(prompts[:1], 2, vocabulary) == [text]
