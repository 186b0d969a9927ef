"""Prefix-shared log-probs against G full copies, on a tiny Idefics3."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from rayrl.learner.logprobs import (
    naive_logprobs,
    naive_outputs,
    prefix_shared_logprobs,
    prefix_shared_outputs,
)

P, G, T = 3, 4, 6
PAD, EOS, IMAGE, VOCABULARY = 0, 2, 3, 60
IMAGE_TOKENS = 4
PATHS = {"shared": prefix_shared_outputs, "naive": naive_outputs}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Idefics3Config(
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 64,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "tie_word_embeddings": True,
        },
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # spread out, so that a wrong mask or position shows
            parameter.mul_(2.0)
    return model


def make_prompts(lengths=(9, 9, 9), side="left"):
    """Prompts of the given lengths, padded to the longest, with one image each."""
    torch.manual_seed(1)
    widest = max(lengths)
    rows, masks = [], []
    for length in lengths:
        text = torch.randint(4, VOCABULARY, (length - IMAGE_TOKENS - 1,))
        row = torch.cat([torch.tensor([1]), torch.full((IMAGE_TOKENS,), IMAGE), text])
        gap = (widest - length, 0) if side == "left" else (0, widest - length)
        rows.append(pad(row, gap, value=PAD))
        masks.append(pad(torch.ones(length, dtype=torch.long), gap))
    return {
        "input_ids": torch.stack(rows),
        "attention_mask": torch.stack(masks),
        "pixel_values": torch.randn(len(lengths), 1, 3, 64, 64),
    }


def make_completions():
    """Unequal lengths (one token to all T); in each group two are equal and two begin alike, in the
    last group two differ in their first token alone."""
    torch.manual_seed(2)
    ids = torch.randint(4, VOCABULARY, (P, G, T))
    ids[:, 1, :3] = ids[:, 0, :3]
    ids[:, 3] = ids[:, 2]
    ids[2, 1] = ids[2, 0]
    ids[2, 1, 0] = 9 if ids[2, 0, 0] != 9 else 10
    lengths = torch.tensor([[6, 5, 3, 3], [1, 6, 2, 6], [4, 4, 6, 6]])
    return ids, torch.arange(T) < lengths[..., None]


def gradients(model, logprobs, entropy=None):
    """All parameter gradients of a weighted sum, flattened in one vector."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = (logprobs * torch.randn(P, G, T)).sum()
    if entropy is not None:
        loss = loss + (entropy * torch.randn(P, G, T)).sum()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def one_by_one(model, prompts, ids, mask):
    """[P, G, T] from one unpadded sequence at a time through the model's own forward pass."""
    out = torch.zeros(ids.shape)
    for p in range(len(ids)):
        prompt = prompts["input_ids"][p][prompts["attention_mask"][p].bool()]
        for g in range(ids.shape[1]):
            caption = ids[p, g][mask[p, g]]
            row = torch.cat([prompt, caption])[None]
            logits = model(input_ids=row, pixel_values=prompts["pixel_values"][p : p + 1]).logits
            scores = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            out[p, g, : len(caption)] = scores.gather(1, caption[:, None])[:, 0]
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("path", PATHS)
def test_equals_one_sequence_at_a_time(model, path, side):
    prompts, (ids, mask) = make_prompts((9, 7, 12), side), make_completions()
    with torch.no_grad():
        want = one_by_one(model, prompts, ids, mask)
        got = PATHS[path](model, prompts, ids, mask).logprobs
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert got.dtype == torch.float32
    assert (got[~mask] == 0).all()
    assert want[mask].std() > 0.5  # the model is not flat, so that the comparison means something


@pytest.mark.parametrize("vision", ["trained", "frozen"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"temperature": 1.3, "banned_ids": (PAD, IMAGE, 1)}]
)
def test_values_and_gradients_equal_naive(model, sampling, vision):
    model.model.vision_model.requires_grad_(vision == "trained")
    model.model.connector.requires_grad_(vision == "trained")
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    want = naive_outputs(model, prompts, ids, mask, **sampling, with_entropy=True)
    want_gradient = gradients(model, *want[:2])
    got = prefix_shared_outputs(model, prompts, ids, mask, **sampling, with_entropy=True)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=1e-5)
    assert relative(gradients(model, *got[:2]), want_gradient) < 1e-5
    tower = model.model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert (tower.grad is not None) == (vision == "trained")


def test_every_parameter_gets_the_naive_gradient(model):
    prompts, (ids, mask) = make_prompts(), make_completions()
    gradients(model, naive_logprobs(model, prompts, ids, mask))
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    gradients(model, prefix_shared_logprobs(model, prompts, ids, mask))
    for name, parameter in model.named_parameters():
        if want[name].norm() > 1e-3:  # a key bias has no gradient but rounding
            assert relative(parameter.grad, want[name]) < 1e-4, name


@pytest.mark.parametrize("longest", [1, 2])
def test_shortest_captions(model, longest):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    mask = mask & (torch.arange(T) < longest)
    want = naive_logprobs(model, prompts, ids, mask)
    want_gradient = gradients(model, want)
    got = prefix_shared_logprobs(model, prompts, ids, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert relative(gradients(model, got), want_gradient) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_captions_without_a_token_have_log_probs_and_gradients_of_0(model, path):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    out = PATHS[path](model, prompts, ids, torch.zeros_like(mask), with_entropy=True)
    assert torch.equal(out.logprobs, torch.zeros(ids.shape))
    assert torch.equal(out.entropy, torch.zeros(ids.shape))
    assert not gradients(model, *out[:2]).any()


def test_chunks_change_nothing(model):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    sampling = {"temperature": 0.8, "banned_ids": (IMAGE,), "with_entropy": True}
    whole = prefix_shared_outputs(model, prompts, ids, mask, **sampling)
    want = gradients(model, *whole[:2])
    for rows in (1, 5, 16):
        parts = prefix_shared_outputs(
            model, prompts, ids, mask, **sampling, chunk_bytes=4 * VOCABULARY * rows
        )
        torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=0, atol=1e-6)
        torch.testing.assert_close(parts.entropy, whole.entropy, rtol=1e-6, atol=0)
        assert relative(gradients(model, *parts[:2]), want) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_columns_change_nothing(model, side):
    prompts, (ids, mask) = make_prompts(), make_completions()
    gap = (3, 0) if side == "left" else (0, 3)
    padded = {
        "input_ids": pad(prompts["input_ids"], gap, value=PAD),
        "attention_mask": pad(prompts["attention_mask"], gap),
        "pixel_values": prompts["pixel_values"],
    }
    want = prefix_shared_logprobs(model, prompts, ids, mask)
    for filler in (PAD, IMAGE):  # what stands in a pad column does not matter, even image ids
        wider = pad(ids, (0, 2), value=filler), pad(mask, (0, 2))
        got = prefix_shared_logprobs(model, padded, *wider)
        torch.testing.assert_close(got[..., :T], want, rtol=0, atol=1e-6)
        assert (got[..., T:] == 0).all()


def test_order_of_completions_and_prompts_does_not_matter(model):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    want = prefix_shared_logprobs(model, prompts, ids, mask)
    turn = torch.tensor([2, 0, 3, 1])
    got = prefix_shared_logprobs(model, prompts, ids[:, turn], mask[:, turn])
    torch.testing.assert_close(got, want[:, turn], rtol=0, atol=1e-5)
    rows = torch.tensor([2, 0, 1])
    swapped = {name: value[rows] for name, value in prompts.items()}
    got = prefix_shared_logprobs(model, swapped, ids[rows], mask[rows])
    torch.testing.assert_close(got, want[rows], rtol=0, atol=1e-5)


def test_equal_completions_score_bit_identically(model):
    ids, mask = make_completions()
    got = prefix_shared_logprobs(model, make_prompts(), ids[:, [2, 2, 2]], mask[:, [2, 2, 2]])
    assert torch.equal(got[:, 0], got[:, 1]) and torch.equal(got[:, 0], got[:, 2])


def test_sampled_tokens_have_the_probability_of_a_distribution(model):
    """Over all one-token completions the probabilities sum to one, banned ids left out."""
    banned = (PAD, IMAGE, 7)
    ids = torch.tensor([i for i in range(VOCABULARY) if i not in banned]).view(1, -1, 1)
    prompts = {name: value[:1] for name, value in make_prompts().items()}
    got = prefix_shared_outputs(
        model, prompts, ids, torch.ones_like(ids), 0.6, banned, with_entropy=True
    )
    assert got.logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    entropy = -(got.logprobs.exp() * got.logprobs).sum().item()
    assert got.entropy[0, 5, 0].item() == pytest.approx(entropy, abs=1e-5)


def test_image_and_prompt_run_once(model):
    """Rows hold each prompt once and each distinct token of its group once."""
    seen = []
    model.model.vision_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["pixel_values"])),
        with_kwargs=True,
    )
    model.model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(tuple(kwargs["inputs_embeds"].shape)),
        with_kwargs=True,
    )
    ids, mask = make_completions()
    prefix_shared_logprobs(model, make_prompts(), ids, mask)
    # 9 prompt tokens, then what a group's completions do not share, without each one's last token:
    # row 0 has 5 + 1 + 2 + 0, row 1 0 + 5 + 0 + 5 and row 2 3 + 3 + 5 + 0.
    assert seen == [3, (3, 9 + 11, 64)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda b: b["ids"][1, 2].fill_(IMAGE), "prompt row 1: completion 2 .*placeholder id 3"),
        (lambda b: b["ids"][0, 3, 0].fill_(7), r"prompt row 0: completion 3 .*banned ids \[7\]"),
        (lambda b: b["ids"][2, 0, 0].fill_(60), "row 2: completion 0 .*the vocabulary of 60"),
        (lambda b: b["ids"][1, 1, 0].fill_(-1), "row 1: completion 1 .*the vocabulary of 60"),
        (
            lambda b: b.update(ids=b["ids"][..., :0], mask=b["mask"][..., :0]),
            r"completion_ids \(3, 4, 0\), want P, G and T of at least 1",
        ),
        (lambda b: b["mask"][2, 1, 0].fill_(False), "prompt row 2: completion 1 .*hole"),
        (lambda b: b["prompts"]["attention_mask"][1].fill_(0), "prompt row 1: no token"),
        (lambda b: b.update(temperature=0.0), "temperature 0.0"),
        (lambda b: b.update(banned=(7, 99)), r"banned ids \[99\] .*vocabulary of 60"),
        (lambda b: b.update(ids=b["ids"][:2]), "want both"),
        (lambda b: b["prompts"].pop("attention_mask"), r"attention_mask .*want \[3, S\]"),
    ],
)
def test_bad_input_names_the_row(model, path, break_it, message):
    ids, mask = make_completions()
    ids[ids == 7] = 8
    batch = {
        "prompts": make_prompts(),
        "ids": ids,
        "mask": mask,
        "temperature": 1.0,
        "banned": (7,),
    }
    break_it(batch)
    with pytest.raises(ValueError, match=message):
        PATHS[path](
            model,
            batch["prompts"],
            batch["ids"],
            batch["mask"],
            batch["temperature"],
            batch["banned"],
        )


def test_placeholders_must_match_the_features(model):
    prompts, (ids, mask) = make_prompts(), make_completions()
    prompts["input_ids"][1, 2] = 9
    with pytest.raises(ValueError, match=r"prompt row 1: 3 image placeholder ids .* 4 image feat"):
        prefix_shared_logprobs(model, prompts, ids, mask)
    prompts["input_ids"][1:, 1:5] = 9
    with pytest.raises(ValueError, match="8 image features are left over"):
        prefix_shared_logprobs(model, prompts, ids, mask)


def test_the_reference_of_an_adapter_is_the_model_without_it(model):
    peft = pytest.importorskip("peft")
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    before = prefix_shared_logprobs(model, prompts, ids, mask).detach()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    want = naive_logprobs(adapted, prompts, ids, mask)
    want_gradient = gradients(adapted, want)
    got = prefix_shared_logprobs(adapted, prompts, ids, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert relative(gradients(adapted, got), want_gradient) < 1e-5
    assert (got - before).abs().max() > 1e-2
    with adapted.disable_adapter():
        reference = prefix_shared_logprobs(adapted, prompts, ids, mask)
    torch.testing.assert_close(reference, before, rtol=0, atol=1e-6)


def test_activation_checkpointing_changes_nothing(model):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    want = gradients(model, prefix_shared_logprobs(model, prompts, ids, mask))
    calls = []
    model.model.text_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    model.train()  # transformers checkpoints in training mode only; this model has no dropout
    got = gradients(model, prefix_shared_logprobs(model, prompts, ids, mask))
    assert len(calls) == 2  # once forward, once more in the backward pass
    assert relative(got, want) < 1e-6


def test_autocast_stays_near_full_precision(model):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    want = prefix_shared_logprobs(model, prompts, ids, mask)
    want_gradient = gradients(model, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = prefix_shared_logprobs(model, prompts, ids, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0.15)
    assert relative(gradients(model, got), want_gradient) < 0.1


def test_eager_attention_gives_the_same(model):
    prompts, (ids, mask) = make_prompts((9, 7, 12)), make_completions()
    model.set_attn_implementation("eager")
    want = prefix_shared_logprobs(model, prompts, ids, mask)
    model.set_attn_implementation("sdpa")
    got = prefix_shared_logprobs(model, prompts, ids, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_model_otherwise_computes_what_it_did(model, tmp_path):
    """The tree attention that stays in the decoder is sdpa on every other input, and no file
    knows of it."""
    prompts, (ids, mask) = make_prompts(), make_completions()
    with torch.no_grad():
        before = model(**prompts).logits
        prefix_shared_logprobs(model, prompts, ids, mask)
        assert torch.equal(model(**prompts).logits, before)
    generated = model.generate(**prompts, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, 9], before[:, -1].argmax(-1))
    model.save_pretrained(tmp_path)
    assert "rayrl" not in (tmp_path / "config.json").read_text()
