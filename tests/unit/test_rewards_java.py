"""The metrics in Java with programs that stand in for Java: what they are told and what they do
when it goes wrong.  The real METEOR is in tests/java."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from rayrl.rewards import java, meteor, spice
from rayrl.rewards.java import JavaProcess, MetricUnavailable
from rayrl.rewards.meteor import Meteor
from rayrl.rewards.spice import Spice
from rayrl.rewards.suite import CaptionSet, evaluate


def program(folder: Path, body: str) -> Path:
    path = folder / "java"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}")
    path.chmod(0o755)
    return path


ECHO = "for line in sys.stdin: print('<' + line.strip() + '>', flush=True)"


def test_lines_are_answered_by_lines(tmp_path: Path) -> None:
    process = JavaProcess([str(program(tmp_path, ECHO))], timeout_s=10)
    assert process.ask("a man") == ["<a man>"]
    assert process.ask("größe\nsecond", num_answers=2) == ["<größe>", "<second>"]
    process.close()


def test_many_answers_in_one_piece_are_not_lost(tmp_path: Path) -> None:
    body = "sys.stdin.readline(); print('x' * 70000 + '\\ny\\nz', flush=True); time.sleep(60)"
    process = JavaProcess([str(program(tmp_path, body))], timeout_s=10)
    assert process.ask("go", num_answers=3) == ["x" * 70000, "y", "z"]
    process.close()


def test_its_folder_is_its_own_and_goes_with_it(tmp_path: Path) -> None:
    body = "open('made', 'w'); print(os.getcwd(), flush=True); sys.stdin.read()"
    first, second = (JavaProcess([str(program(tmp_path, body))], 10) for _ in range(2))
    folders = [Path(process.ask("")[0]) for process in (first, second)]
    assert folders[0] != folders[1]
    assert all((folder / "made").is_file() for folder in folders)
    first.close()
    second.close()
    assert not any(folder.exists() for folder in folders)


def test_a_program_that_nobody_holds_any_more_is_ended(tmp_path: Path) -> None:
    process = JavaProcess([str(program(tmp_path, ECHO))], timeout_s=10)
    assert process.ask("a man") == ["<a man>"]
    folder, running = process.folder, process._process
    del process
    gc.collect()
    assert running.returncode == -signal.SIGKILL
    assert not folder.exists()


def test_a_silent_program_times_out(tmp_path: Path) -> None:
    process = JavaProcess([str(program(tmp_path, "time.sleep(60)"))], timeout_s=0.05)
    with pytest.raises(TimeoutError, match=r"no answer from Java within 0.05 s"):
        process.ask("hello")
    process.close()


def test_a_dead_program_says_its_last_words(tmp_path: Path) -> None:
    body = "sys.stdin.readline(); sys.stderr.write('one\\nout of memory\\n'); sys.exit(3)"
    process = JavaProcess([str(program(tmp_path, body))], timeout_s=10)
    for _ in range(2):
        with pytest.raises(ChildProcessError, match="ended with status 3: one / out of memory"):
            process.ask("hello")
    process.close()


def test_without_java_or_jars_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MetricUnavailable, match="no java on the PATH"):
        Meteor()
    with pytest.raises(MetricUnavailable, match="no java on the PATH"):
        Spice()
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    with pytest.raises(MetricUnavailable, match="pycocoevalcap is not installed"):
        java.find_pycocoevalcap("meteor", "meteor-1.5.jar")
    monkeypatch.undo()
    with pytest.raises(MetricUnavailable, match=r"has no meteor/meteor-9\.jar"):
        java.find_pycocoevalcap("meteor", "meteor-9.jar")


def test_a_java_that_does_not_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has one that says where to get one."""
    stub = program(tmp_path, "sys.exit('Unable to locate a Java Runtime.')")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reason = f"{stub} does not run, status 1: Unable to locate a Java Runtime."
    for unavailable in (Meteor, Spice):
        with pytest.raises(MetricUnavailable, match=re.escape(reason)):
            unavailable()
    data = CaptionSet(["a dog", "a cat"], [["a dog"], ["the cat"]])
    evaluation = evaluate(data, ("meteor", "spice", "bleu"))
    assert evaluation.left_out == {"meteor": reason, "spice": reason}
    assert "bleu_4" in evaluation.scores


METEOR = """
for line in sys.stdin:
    kind, *parts = line.rstrip('\\n').split(' ||| ')
    if kind == 'SCORE':
        print(len(parts[-1].split()), flush=True)
    else:
        print('\\n'.join(str(int(p) / 10) for p in parts))
        print(0.5, flush=True)
"""


def test_meteor_speaks_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "find_java", lambda: str(program(tmp_path, METEOR)))
    with Meteor() as scorer:
        corpus, each = scorer.score(["a b", "||| c", ""], [["x ||| y"], ["z"], ["z"]])
    assert corpus == 0.5
    assert each.tolist() == [0.2, 0.1, 0.0]


SPICE = """
if sys.argv[1] == '-version':
    sys.stderr.write('openjdk version "%s"\\n')
    sys.exit(0)
if MISSING:
    sys.exit('one\\ntwo\\nno scene graph')
out = sys.argv[sys.argv.index('-out') + 1]
source = sys.argv[sys.argv.index('-jar') + 2]
cache = sys.argv[sys.argv.index('-cache') + 1]
assert os.path.isdir(cache) and os.path.dirname(cache) == os.path.dirname(out)
items = json.load(open(source))
opened = sum('--add-opens' in a for a in sys.argv)
scores = [{'image_id': i['image_id'], 'scores': {'All': {'f': len(i['refs']) / 10 + opened}}}
          for i in reversed(items)]
json.dump(scores, open(out, 'w'))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lib").mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(spice, "find_pycocoevalcap", lambda *_: tmp_path / "spice-1.0.jar")
    return tmp_path


@pytest.mark.parametrize(("version", "opened"), [("1.8.0_392", 0), ("17.0.15", 5), ("21", 5)])
def test_spice_reads_scores_by_image(
    models: Path, monkeypatch: pytest.MonkeyPatch, version: str, opened: int
) -> None:
    fake = program(models, SPICE.replace("%s", version).replace("MISSING", "False"))
    monkeypatch.setattr(spice, "find_java", lambda: str(fake))
    before = set(os.listdir(models))
    corpus, each = Spice().score(["a", "b"], [["x"], ["x", "y"]])
    assert each.tolist() == pytest.approx([0.1 + opened, 0.2 + opened])
    assert corpus == pytest.approx(0.15 + opened)
    assert set(os.listdir(models)) == before, "nothing is written beside the jar"


def test_spice_fails_with_what_java_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = program(models, SPICE.replace("%s", "17").replace("MISSING", "True"))
    monkeypatch.setattr(spice, "find_java", lambda: str(fake))
    with pytest.raises(ChildProcessError, match=r"status \d+: one / two / no scene graph"):
        Spice().score(["a"], [["x"]])


def test_spice_names_the_models_it_lacks(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice, "find_java", lambda: "java")
    (models / "lib" / "stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(MetricUnavailable, match=r"no stanford-corenlp-3.6.0-models.jar in .*lib"):
        Spice()


def test_a_read_only_package_folder_does_no_harm(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = program(models, SPICE.replace("%s", "17").replace("MISSING", "False"))
    monkeypatch.setattr(spice, "find_java", lambda: str(fake))
    models.chmod(0o555)
    try:
        assert Spice().score(["a"], [["x"]])[1].tolist() == pytest.approx([5.1])
    finally:
        models.chmod(0o755)
