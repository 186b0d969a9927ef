"""From YAML and flags to a configuration, and the one line that every mistake gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from rayrl import cli, commands, config_keys, eval_cli, grpo, prepare
from rayrl.config import Config
from rayrl.yaml_file import parse_yaml

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def write(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, "seed: 5\nlearner: {lr: 0.1, inner_epochs: 2}\n")
    config = cli.load(file, ["--learner.lr", "1e-5", "--train.steps=7"])
    assert (config.seed, config.learner.lr, config.learner.inner_epochs) == (5, 1e-5, 2)
    assert config.train.steps == 7
    assert config.train.group_size == Config().train.group_size


def test_lists_nested_sections_and_booleans_are_read_from_flags():
    flags = ["--model.trainable", '["language"]', "--data.scenes.num_train", "50"]
    config = cli.load(None, [*flags, "--xe.control", "false"])
    assert config.model.trainable == ("language",)
    assert config.data.scenes.num_train == 50
    assert config.xe.control is False


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["--reward.terms", '{"bleu": 2}'], {"bleu": 2.0}),
        (['--reward.terms={"bleu": 2}'], {"bleu": 2.0}),
        (["--reward", '{"terms": {"bleu": 2}}'], {"bleu": 2.0}),
        (["--reward.terms", "bleu=2"], {"cider_d": 1.0, "rouge_l": 0.5, "bleu": 2.0}),
        (["--reward.terms", "rouge_l=2"], {"cider_d": 1.0, "rouge_l": 2.0}),
        # A section is not such a mapping: what it does not name stays.
        (["--reward", '{"eos": false}'], {"cider_d": 1.0, "rouge_l": 0.5}),
    ],
)
def test_a_mapping_given_whole_takes_the_place_of_the_files(tmp_path, flags, want):
    file = write(tmp_path, "reward: {df: caption, terms: {cider_d: 1.0, rouge_l: 0.5}}\n")
    reward = cli.load(file, flags).reward
    assert {name: term.weight for name, term in reward.terms.items()} == want
    assert reward.df == "caption"


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ("", {"kl_coef": 0.001}),
        ("advantage=leave_one_out", {"kl_coef": 0.001, "advantage": "leave_one_out"}),
        ("kl_coef=0.1", {"kl_coef": "0.1"}),
        ("{}", {}),
        ('{"eps": 0.1}', {"eps": 0.1}),
        # What takes out the part that the default changes takes that change out too.
        ("regularizers=", {"regularizers": ""}),
    ],
)
def test_a_flag_changes_one_thing_of_the_default_objective(tmp_path, flags, want):
    given = ["--objective.set", flags] if flags else []
    for file in (None, write(tmp_path, "objective: {sources: {head_lr: 0.1}}\n")):
        objective = cli.load(file, given).objective
        assert (objective.preset, objective.set) == ("grpo", want)


def test_who_names_a_preset_or_its_changes_has_nothing_of_the_default(tmp_path):
    assert cli.load(None, ["--objective.preset", "grpo"]).objective.set == {}
    assert cli.load(write(tmp_path, "objective: {preset: nsc}\n")).objective.set == {}
    file = write(tmp_path, "objective: {set: {eps: 0.1}}\n")
    changed = cli.load(file, ["--objective.set", "advantage=leave_one_out+over_batch_std"])
    assert "kl_coef" not in changed.objective.set
    with pytest.raises(cli.UsageError, match="unknown slot or parameter 'kl_coeff'"):
        cli.load(None, ["--objective.set", "kl_coeff=0"])


@pytest.mark.parametrize("given", ["grpo", "[a]", "3", "null"])
def test_an_objective_that_is_none_is_said_in_a_line(tmp_path, given):
    with pytest.raises(cli.UsageError, match=r"^objective: .*ObjectiveConfig"):
        cli.load(write(tmp_path, f"objective: {given}\n"))
    with pytest.raises(cli.UsageError):
        cli.load(None, ["--objective", '{"set": 5}'])


def test_an_empty_mapping_clears_the_files():
    flags = ["--model.path", "elsewhere", "--model.image_processor", "{}", "--objective.set", "{}"]
    config = cli.load(JOBS / "coco.yaml", flags)
    assert config.model.image_processor == {} and config.objective.set == {}
    assert config.model.trainable == ("connector", "language")
    several = ["--model.image_processor", '{"max_pixels": 200704}']
    assert cli.load(JOBS / "coco.yaml", several).model.image_processor == {"max_pixels": 200704}


def test_the_mappings_are_those_of_the_configuration():
    found = {"model.image_processor", "reward.terms", "reward.constraints", "objective.set"}
    assert set(config_keys.mapping_keys()) == found


def test_the_resolved_file_reads_back_as_the_same_configuration(tmp_path):
    config = cli.load(None, ["--learner.lr", "3e-5", "--seed", "9"])
    assert cli.load(write(tmp_path, cli.dump(config))) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learner.lrr", "1"], "unknown option --learner.lrr; did you mean 'learner.lr'?"),
        (["--lr", "1"], "did you mean 'learner.lr'?"),
        (["--objective.set", "kl_coef"], "--objective.set: cannot be read; .* wants name=value"),
        (
            ["--objective.set.kl_coef", "0"],
            "unknown option --objective.set.kl_coef; want --objective.set kl_coef=0",
        ),
        (["--reward.terms.bad_ending=0.5"], "; want --reward.terms bad_ending=0.5"),
        (
            ["--reward.terms.short.weight", "2"],
            '; want --reward.terms \'{"short": {"weight": 2}}\', with all its other entries',
        ),
        (["--train.steps.more", "1"], "unknown option --train.steps.more; did you mean"),
        (["--train.steps"], "argument --train.steps: expected one argument"),
        (["--train.steps", "5", "more"], "unrecognized arguments: more"),
        (["--data.path", "a", __file__], "test_cli.py; quote a path with * in it, or the shell"),
        (["--data.columns", "{image_id: a}"], "{image_id: a} cannot be read; a section wants"),
        (
            ["--sampling.top_k", "10"],
            "unknown option --sampling.top_k: captions are drawn from the",
        ),
        (["--train.step", "1"], "did you mean 'train.steps'?"),
        (["train.steps=3"], "train.steps=3 is no option; write --train.steps=3"),
        (["--seed", "5", "train.steps=3"], "write --train.steps=3"),
        (["--seed=5", "train.steps", "3"], "write --train.steps"),
        (["actor_rollout_ref.rollout.n=5"], "is no option; here that is --train.group_size"),
        (["data.train_files=x"], "is no option; here that is --data.path, with {split} in it"),
        (["trainer.total_epochs=3"], "is no option; here that is --train.steps"),
        (["--output_dir", "x"], "--output_dir; here that is --run_folder"),
        (
            ["--gradient_accumulation_steps", "2"],
            "; here that is --learner.micro_batch_images, the part of a step's images",
        ),
        (["actor_rollout_ref.model.path=x"], "is no option; here that is --model.path"),
        (["--another.model.path", "x"], "did you mean 'model.path'?"),
        (["--max_staleness", "1"], "did you mean 'train.max_staleness'?"),
        (["--num_generations", "4"], "--num_generations; here that is --train.group_size"),
        (["--beta", "0.04"], "unknown option --beta; here that is --objective.set kl_coef=VALUE"),
        (["--temperature=0.7"], "--temperature; here that is --sampling.temperature"),
        (["--train.steps", "many"], "train.steps: .*(got 'many')"),
        (["--train.steps", "0"], "train.steps: .*greater than 0"),
        (["--train.images_per_step", "33", "--learner.minibatches", "2"], "33 does not divide"),
        (["--xe.images_per_step", "5", "--xe.num_workers", "2"], "5 does not divide"),
        (["--model.trainable", "[]"], "name at least one of vision, connector, language"),
        (["--model.tiny.text_width", "100"], "text_width 100: want a multiple of 32"),
        (["--model.tiny.patch_size", "7"], "do not tile it"),
        (["--objective.preset", "grop"], "'grop'"),
        (["--objective.set", "kl_coeff=0"], "kl_coef"),
        (["--engine.max_model_len", "32"], "leave no room for the instruction within 32"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(flags, message):
    with pytest.raises(cli.UsageError) as raised:
        cli.load(None, flags)
    text = str(raised.value)
    assert all(part in text for part in message.split(".*"))
    assert len(str(raised.value).splitlines()) == 1


def test_what_other_programs_call_otherwise_is_there():
    keys = set(config_keys.known_keys())
    for name, here in config_keys._ELSEWHERE.items():
        assert name not in keys and here.split()[0].rstrip(",") in keys
    assert cli.load(None, ["--objective.set", "kl_coef=0.04"])


def test_a_home_folder_is_meant_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = """
        run_folder: ~/run
        data: {source: coco, path: "~/{split}.json", images: ~/images}
        model: {path: ~/model}
        reward: {df: ~/df.npz, terms: {clip_score: {folder: ~/clip}}}
        objective: {preset: scst, sources: {guide: ~/guide, auxiliaries: [~/one, two]}}
        train: {checkpoint_uri: ~/copies}
    """
    file = write(tmp_path, text)
    for flags in ([], ["--run_folder=~/run", "--model.path=~/model"]):
        config = cli.parse(["--config", str(file), *flags], program="p", description="d").config
        sources = config.objective.sources
        found = {
            "run": config.run_folder,
            "val.json": config.data.path_of("val"),
            "images": config.data.images,
            "model": config.model.path,
            "df.npz": config.reward.df,
            "clip": config.reward.terms["clip_score"].folder,
            "guide": sources.guide,
            "one": sources.auxiliaries[0],
            "copies": config.train.checkpoint_uri,
        }
        assert found == {name: f"/home/me/{name}" for name in found}
        assert sources.auxiliaries[1] == "two"


def test_so_it_is_in_options_of_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "seed: 5")
    run = tmp_path / "run"
    run.mkdir()
    (run / cli.RUN_CONFIG).write_text("seed: 6")
    for flags, seed in (["--config=~/job.yaml"], 5), (["--resume", "--run_folder=~/run"], 6):
        assert cli.parse(flags, program="p", description="d").config.seed == seed
    options, _ = eval_cli.parse(["--checkpoint=~/m", "--config=~/c", "--clip=~/d", "--output=~/o"])
    found = [str(options.checkpoint), str(options.config), options.clip, str(options.output)]
    assert found == [f"{tmp_path}/{name}" for name in "mcdo"]
    options, _ = eval_cli.parse(["--compare", "~/a", "b", "--references=~/r"])
    assert [*map(str, options.compare), str(options.references)] == [
        f"{tmp_path}/a",
        "b",
        f"{tmp_path}/r",
    ]
    assert str(eval_cli.parse(["--results=~/r"])[0].results) == f"{tmp_path}/r"
    needed = ["--source", "coco", "--path", "a.json", "--images", "im", "--image-size", "8"]
    assert str(prepare._parser().parse_args([*needed, "--output=~/d"]).output) == f"{tmp_path}/d"


@pytest.mark.parametrize("word", ["banana", "ddp_timeout", "report_to", "trainer.logger"])
def test_what_is_like_no_key_is_not_taken_for_one(word):
    with pytest.raises(cli.UsageError, match=rf"^unknown option --{word}$"):
        cli.load(None, [f"--{word}", "1"])


def test_a_value_may_look_like_a_key():
    assert cli.load(None, ["--run_folder", "train.steps=3"]).run_folder == "train.steps=3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {lrr: 1}", "unknown key 'learner.lrr'; did you mean 'learner.lr'"),
        ("lerner: {lr: 1}", "unknown key 'lerner'; did you mean 'learner'"),
        ("- a\n- b", "want a mapping of sections, got list"),
        ("a: [", "not YAML"),
        (
            "data: {source: coco}\nseed: 1\ndata: {image_size: 64}\n",
            r"job\.yaml: data is there twice, in lines 1 and 3",
        ),
        ("train:\n  steps: 10\n  steps: 20\n", r"train\.steps is there twice, in lines 2 and 3"),
        ("model: {trainable: [{a: 1, a: 2}]}", r"model\.trainable\.a is there twice"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(cli.UsageError, match=message):
        cli.load(write(tmp_path, text))


def test_a_key_that_overrides_a_merged_one_is_there_once(tmp_path):
    text = "xe: &sizes {images_per_step: 8}\ntrain: {<<: *sizes, images_per_step: 4}\n"
    config = cli.load(write(tmp_path, text))
    assert (config.xe.images_per_step, config.train.images_per_step) == (8, 4)
    # Two that are merged, and keys of two types.
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b, 1: p, '1': q}\n"
    assert parse_yaml(text, "f")["c"] == {"x": 1, "y": 2, 1: "p", "1": "q"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(cli.UsageError, match=r"nothing\.yaml: no such file"):
        cli.load(tmp_path / "nothing.yaml")


def test_an_error_on_the_command_line_exits_with_2_and_says_it_once(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.parse(["--lr", "1"], program="grpo_coco.py", description="d")
    assert raised.value.code == 2
    assert capsys.readouterr().err == (
        "grpo_coco.py: unknown option --lr; did you mean 'learner.lr'?\n"
    )


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.parse(["--help"], program="grpo_coco.py", description="d")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    leaves = [key for key in config_keys.known_keys() if f"--{key} " not in text]
    keys = list(config_keys.known_keys())
    sections = {key for key in leaves if any(k.startswith(f"{key}.") for k in keys)}
    assert set(leaves) == sections
    assert "'{}' empties it" in " ".join(text.split())
    assert "--dry-run" in text and "--resume" in text and "--config" in text


@pytest.mark.parametrize(
    ("flags", "resume"),
    [([], "never"), (["--resume"], "always"), (["--resume", "auto"], "auto")],
)
def test_a_run_is_continued_when_asked(flags, resume):
    argv = [*flags, "--train.steps", "7"]
    invocation = cli.parse(argv, program="grpo_coco.py", description="d")
    assert (invocation.resume, invocation.config.train.steps) == (resume, 7)


@pytest.mark.parametrize(
    "flags", [["--resume"], ["--resume", "auto"], ["--trace"], ["--replay", "x"]]
)
def test_stage_1_alone_refuses_what_it_would_not_do(flags, capsys):
    with pytest.raises(SystemExit) as raised:
        commands.xe([*flags, "--dry-run"])
    assert raised.value.code == 2
    assert f"xe_coco.py: {flags[0]} is for grpo_coco.py" in capsys.readouterr().err
    commands.xe(["--dry-run"])
    with pytest.raises(SystemExit):
        commands.xe(["--help"])
    text = capsys.readouterr().out
    assert "--dry-run" in text and "--trace" not in text


def test_a_dry_run_says_the_sizes_in_words():
    flags = ["--train.images_per_step", "64", "--train.group_size", "8"]
    flags += ["--learner.minibatches", "2", "--learner.micro_batch_images", "16"]
    config = cli.load(None, flags)
    text = cli.describe(config)
    assert "64 images x 8 captions = 512 captions" in text
    assert "2 optimizer steps a step, each of 32 images in 2 micro-batches" in text


def test_a_dry_run_of_stage_1_says_nothing_of_the_objective(capsys):
    flags = ["--xe.steps", "70", "--xe.lr", "1e-4", "--xe.num_workers", "2"]
    commands.xe([*flags, "--dry-run"])
    stage1 = capsys.readouterr().out
    assert "70 cross-entropy steps of 32 images" in stage1
    assert "0.0001, by 2 workers" in stage1
    assert "GRPO" not in stage1.upper().replace("GRPO_COCO", "") and "rollout" not in stage1
    commands.grpo([*flags, "--dry-run"])
    assert stage1 in capsys.readouterr().out


MISSING = [
    (
        ["--data.source", "coco", "--data.path", "{split}.json", "--data.images", "."],
        "data.path {split}.json: no such file of annotations: train.json",
    ),
    (
        ["--data.source", "karpathy", "--data.path", "a.json", "--data.images", "im"],
        "data.images im: no such image folder: im",
    ),
    (
        ["--data.source", "parquet", "--data.path", "no/{split}"],
        "data.path no/{split}: no/train: no such Parquet file or folder of shards",
    ),
    (
        ["--data.source", "parquet", "--data.path", "{split}-*.parquet"],
        "data.path {split}-*.parquet: train-*.parquet: no such Parquet file",
    ),
    (
        ["--model.path", "./mistyped", "--xe.steps", "0"],
        "model.path ./mistyped: no such folder here, and not a name of the hub",
    ),
    (["--model.path", "no_model", "--xe.steps", "0"], "model.path no_model: no config.json or"),
]


def test_a_dry_run_of_a_run_that_may_go_on_looks_at_the_model_where_it_begins(place):
    flags = ["--model.path", "./mistyped", "--xe.steps", "0", "--resume=auto", "--dry-run"]
    with pytest.raises(SystemExit, match=r"failed: model\.path \./mistyped: no such folder here"):
        commands.grpo([*flags, "--run_folder", "new"])


def test_held_out_shards_that_are_not_here_are_named_by_their_own_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train-0.parquet").touch()
    flags = ["--data.source", "parquet", "--data.path", "train-*.parquet"]
    flags += ["--data.val_path", "valid-*.parquet", "--dry-run"]
    with pytest.raises(SystemExit, match=r"data\.val_path valid-\*\.parquet: .* no such Parquet"):
        commands.grpo(flags)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with an annotation file and a folder that is no model's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "no_model").mkdir()
    return tmp_path


@pytest.mark.parametrize(("flags", "message"), MISSING)
@pytest.mark.parametrize("job", [commands.grpo, commands.xe])
def test_a_dry_run_names_what_is_not_here_after_the_sizes(place, job, flags, message, capsys):
    with pytest.raises(SystemExit, match=rf"^\w+\.py: failed: {re.escape(message)}"):
        job([*flags, "--dry-run"])
    assert "stage 1: " in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), MISSING)
def test_so_does_a_run_before_it_reads_anything(place, monkeypatch, flags, message):
    monkeypatch.setattr(grpo, "load_train_and_val", None)
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        grpo.run_job(cli.load(None, flags), resume=False)


def test_what_may_lie_elsewhere_is_left_to_who_reads_it(place, capsys):
    flags = ["--data.source", "parquet", "--data.path", "s3://bucket/{split}", "--dry-run"]
    commands.grpo([*flags, "--model.path", "who/what", "--xe.steps", "0"])
    # A run that goes on has its model.
    commands.grpo([*flags, "--model.path", "/gone", "--xe.steps", "0", "--resume"])
    said = capsys.readouterr().out
    assert "model: who/what" in said and "model: /gone" in said


WAITING = {
    "http": {"url": "http://judge"},
    "chat": {"url": "http://judge", "model": "m"},
    "meteor": 1.0,
    "spice": 1.0,
}


@pytest.mark.parametrize("kind", WAITING)
def test_a_term_that_can_wait_longer_than_it_has_is_spoken_of(kind, capsys):
    flags = ["--reward.terms", json.dumps({"cider_d": 1.0, kind: WAITING[kind]}), "--dry-run"]
    commands.grpo(flags)
    assert capsys.readouterr().err == ""
    commands.grpo([*flags, "--train.reward_timeout_s", "120"])
    told = capsys.readouterr().err
    assert f"reward term {kind} can wait 9" in told
    assert "under train.reward_timeout_s 120 it has 38.4 s for a batch" in told
    want = told.split()[-1]
    assert int(want) in (282, 286)
    commands.grpo([*flags, "--train.reward_timeout_s", want])
    assert capsys.readouterr().err == ""


def test_a_single_caption_is_enough_where_the_baseline_is_not_the_group():
    config = cli.load(None, ["--train.group_size", "1", "--objective.preset", "scst"])
    assert config.train.group_size == 1


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 1


@pytest.mark.parametrize("file", sorted(JOBS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_job_file_loads(file):
    assert isinstance(cli.load(file), Config)


def test_the_laptop_job_is_the_embedded_default():
    assert cli.load(JOBS / "laptop.yaml") == Config()
    # And it says so itself, rather than being empty.
    assert len(yaml.safe_load((JOBS / "laptop.yaml").read_text())) >= 4
