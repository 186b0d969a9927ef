"""Captions sampled after prompts that are computed once: those of ``generate``, with the log-probs
of the learner."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, EOS, IMAGE, PAD, VOCABULARY, build, make_batch

from rayrl.config import EngineConfig, Part
from rayrl.engine import hf, shared
from rayrl.engine.base import EngineSetup, Sampling
from rayrl.engine.copies import sample_copies
from rayrl.engine.draw import choose, uniforms
from rayrl.engine.shared import sample_groups
from rayrl.learner.logprobs import prefix_shared_logprobs
from rayrl.vlm import load_captioner
from rayrl.weights import pack

SEEDS = [0, 1024, 2048]
FORCED = [[], [7, 8], []]
SETTINGS = {
    "group_size": 4,
    "max_tokens": 8,
    "temperature": 0.8,
    "banned_ids": (PAD, IMAGE),
    "eos_ids": (EOS,),
}


def draw(sample, model, prompts, *, forced=FORCED, uniform=None, **options):
    return sample(model, prompts, uniform=uniform, forced=forced, **{**SETTINGS, **options})


def up_to_the_end(ids, eos=(EOS,)):
    """True on every caption's tokens, its first end token included."""
    ended = torch.isin(ids, torch.tensor(eos)).long()
    return ended.cumsum(-1) - ended == 0


def whole_captions(ids):
    """Captions [G, T] without what comes after their ends."""
    return [row[keep].tolist() for row, keep in zip(ids, up_to_the_end(ids), strict=True)]


def assert_same(got, want):
    """The same captions; ``generate`` stops when all have ended, and so is no longer."""
    length = want.ids.shape[2]
    there = up_to_the_end(got.ids)
    assert not there[..., length:].any()
    there = there[..., :length]
    assert torch.equal(got.ids[..., :length][there], want.ids[there])
    torch.testing.assert_close(
        got.logprobs[..., :length][there], want.logprobs[there], rtol=0, atol=1e-5
    )


def likely_to_end(model):
    """Make the end token about as likely as all others together."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.weight.mul_(0.2)
        head.bias[EOS] = 3.5
    return model


@pytest.mark.parametrize("case", CASES)
def test_captions_are_those_of_generate_and_logprobs_those_of_the_learner(case):
    model = build(CASES[case][0]())
    uniform = uniforms(SEEDS, 4, 8)
    prompts, _, _ = make_batch(case)
    got = draw(sample_groups, model, prompts, uniform=uniform)
    assert_same(got, draw(sample_copies, model, prompts, uniform=uniform))
    # ``generate`` wants prompts padded on the left; nothing here does.
    right, _, _ = make_batch(case, side="right")
    assert_same(draw(sample_groups, model, right, uniform=uniform), got)
    there = up_to_the_end(got.ids)
    with torch.no_grad():
        want = prefix_shared_logprobs(model, prompts, got.ids, there, 0.8, (PAD, IMAGE))
    assert got.ids[1, :, :2].tolist() == [[7, 8]] * 4
    assert got.logprobs[1, :, :2].tolist() == [[0.0, 0.0]] * 4
    there[1, :, :2] = False
    torch.testing.assert_close(got.logprobs[there], want[there], rtol=0, atol=1e-5)
    assert want[there].std() > 0.5


@pytest.mark.parametrize("case", ["idefics3", "paligemma2 window", "qwen2.5-vl"])
def test_captions_that_end_early_leave_the_batch(case, monkeypatch):
    model = likely_to_end(build(CASES[case][0]()))
    prompts, _, _ = make_batch(case)
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, output: rows.append(given[0].shape[0])
    )
    uniform = uniforms(SEEDS, 16, 8)
    got = draw(sample_groups, model, prompts, uniform=uniform, group_size=16)
    lengths = up_to_the_end(got.ids).sum(-1)
    assert 1 < lengths.float().mean() < 5
    # 3 prompts, then 47 tokens of captions at most: those after each first token, unless it ended.
    assert rows[0] == 3
    assert rows[1] <= 48 and rows[-1] < 24
    assert rows == sorted(rows[:1]) + sorted(rows[1:], reverse=True)
    assert sum(rows[1:]) >= int((lengths - 1).sum())
    assert_same(got, draw(sample_copies, model, prompts, uniform=uniform, group_size=16))
    monkeypatch.setattr(shared, "_SHRINK_AT", -1.0)
    rows.clear()
    assert_same(draw(sample_groups, model, prompts, uniform=uniform, group_size=16), got)
    assert rows == [3] + [48] * (int(lengths.max()) - 1)


def test_a_caption_depends_on_its_own_seed_only():
    model = build(CASES["qwen3-vl"][0]())
    prompts, _, _ = make_batch("qwen3-vl")
    together = draw(sample_groups, model, prompts, uniform=uniforms(SEEDS, 4, 8))
    first = prompts["image_grid_thw"][0].prod()
    alone = {
        "input_ids": prompts["input_ids"][:1],
        "attention_mask": prompts["attention_mask"][:1],
        "mm_token_type_ids": prompts["mm_token_type_ids"][:1],
        "pixel_values": prompts["pixel_values"][:first],
        "image_grid_thw": prompts["image_grid_thw"][:1],
    }
    one = draw(sample_groups, model, alone, uniform=uniforms(SEEDS[:1], 4, 8), forced=[[]])
    captions = whole_captions(together.ids[0])
    assert whole_captions(one.ids[0]) == captions
    # The second caption of a group of seed s is the first of a group of seed s + 1.
    other = draw(
        sample_groups, model, alone, uniform=uniforms([1], 1, 8), forced=[[]], group_size=1
    )
    assert whole_captions(other.ids[0]) == captions[1:2]
    assert len(set(map(tuple, captions))) > 2


def test_the_most_probable_caption():
    model = build(CASES["llava"][0]())
    prompts, _, _ = make_batch("llava")
    options = {"forced": [[]] * 3, "group_size": 1}
    got = draw(sample_groups, model, prompts, **options)
    assert_same(got, draw(sample_copies, model, prompts, **options))
    # Any other token in the place of any is less probable.
    there = up_to_the_end(got.ids)
    place = int(there[0, 0].sum()) - 1
    variants = got.ids[:1].repeat(1, VOCABULARY, 1)
    variants[0, :, place] = torch.arange(VOCABULARY)
    allowed = [i for i in range(VOCABULARY) if i not in (PAD, IMAGE)]
    with torch.no_grad():
        scores = prefix_shared_logprobs(
            model,
            {name: value[:1] for name, value in prompts.items()},
            variants[:, allowed, : place + 1],
            torch.ones(1, len(allowed), place + 1, dtype=torch.bool),
            0.8,
            (PAD, IMAGE),
        )[0, :, place]
    assert allowed[int(scores.argmax())] == int(got.ids[0, 0, place])


def test_a_token_is_chosen_where_its_number_falls():
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    logprobs = probabilities.log().expand(7, 4)
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-9, 1 - 2**-53], dtype=torch.float64)
    assert choose(logprobs, numbers).tolist() == [0, 0, 2, 2, 3, 3, 3]
    # An id of probability 0 is not chosen, not even at the edges.
    banned = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log().expand(3, 4)
    edges = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert choose(banned, edges).tolist() == [1, 2, 2]
    assert choose(logprobs, None).tolist() == [2] * 7


def test_frequencies_are_the_probabilities():
    logprobs = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(10_000, 4)
    numbers = uniforms(range(10_000), 1, 1).flatten()
    counts = torch.bincount(choose(logprobs, numbers), minlength=4) / 10_000
    # Four standard deviations of the largest are 0.0196.
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.0196)


@pytest.fixture
def engine(tiny_folder):
    engine = hf.HfEngine(
        EngineSetup(folder=tiny_folder, config=EngineConfig(backend="hf"), group_size=4)
    )
    engine.load_weights(pack(load_captioner(tiny_folder).model, 0), changed=Part.__args__)
    return engine


def encoded_images(engine):
    """How many images go through the vision tower, call by call."""
    images = []
    engine._model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: images.append(len(kwargs.get("pixel_values", *args))),
        with_kwargs=True,
    )
    return images


def test_the_engine_computes_each_image_once(engine, prompts):
    images = encoded_images(engine)
    sampling = Sampling(group_size=4, temperature=1.0, max_tokens=6)
    engine.generate(prompts, sampling, range(0, 6 * 1024, 1024))
    assert images == [6]


def test_the_engine_keeps_features_while_the_vision_tower_is_frozen(engine, tiny_folder, prompts):
    images = encoded_images(engine)
    sampling = Sampling(group_size=4, temperature=1.0, max_tokens=6)
    seeds = range(0, 6 * 1024, 1024)
    before = engine.generate(prompts, sampling, seeds)
    model = load_captioner(tiny_folder).model
    engine.load_weights(pack(model, 1), changed=("language",))
    for _ in range(2):
        again = engine.generate(prompts, sampling, seeds)
    assert sum(images) == 12
    assert [g.captions for g in again] == [g.captions for g in before]
    with torch.no_grad():
        for parameter in model.model.vision_model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    engine.load_weights(pack(model, 2), changed=("vision",))
    moved = engine.generate(prompts, sampling, seeds)
    assert sum(images) == 18
    assert [g.captions for g in moved] != [g.captions for g in before]


def test_a_model_that_cannot_share_gives_the_same_groups(engine, prompts, monkeypatch):
    sampling = Sampling(group_size=4, temperature=1.0, max_tokens=6, greedy_baseline=True)
    seeds = range(0, 6 * 1024, 1024)
    got = engine.generate(prompts, sampling, seeds)
    monkeypatch.setattr(hf, "refusal", lambda model: "a test says so")
    want = engine.generate(prompts, sampling, seeds)
    for one, other in zip(got, want, strict=True):
        assert one.prompt_token_ids.tolist() == other.prompt_token_ids.tolist()
        pairs = zip((*one.completions, one.greedy), (*other.completions, other.greedy), strict=True)
        for a, b in pairs:
            assert (a.token_ids.tolist(), a.text, a.finish_reason) == (
                b.token_ids.tolist(),
                b.text,
                b.finish_reason,
            )
            torch.testing.assert_close(
                torch.from_numpy(a.logprobs), torch.from_numpy(b.logprobs), rtol=0, atol=1e-5
            )
