"""The last layer computes what is read: values and gradients are the naive ones in
``test_logprobs.py``, and here is how much runs."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, build, gradients, make_batch, qwen3_vl

from rayrl.learner.families import FAMILIES
from rayrl.learner.last_layer import unread_weights
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from rayrl.learner.recompute import recompute_layers
from rayrl.learner.tree import build_tree

KNOWN = ["idefics3", "llava", "blip-2 qwen", "qwen2.5-vl"]
OTHERS = ["blip-2 opt", "blip-2 softcap", "paligemma", "paligemma2", "qwen3-vl"]


def slots_computed(model, inputs):
    """Slots of a row that each layer's feed-forward part sees, and K + n and 1 + n."""
    decoder = FAMILIES[model.config.model_type].decoder(model)
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
        for layer in decoder.layers
    ]
    prefix_shared_outputs(model, *inputs)
    for hook in hooks:
        hook.remove()
    prompts, ids, mask = inputs
    tree = build_tree(prompts["attention_mask"].bool(), ids, mask)
    return seen, tree.source.shape[1], 1 + tree.nodes.shape[1]


@pytest.mark.parametrize("case", KNOWN)
def test_a_prompts_tokens_go_through_all_layers_but_the_last(case):
    model, inputs = build(CASES[case][0]()), make_batch(case)
    seen, everything, read = slots_computed(model, inputs)
    assert seen == [everything, read] and read < everything


def shallow_qwen3_vl():
    """Features of one vision layer alone enter the decoder, after its first layer."""
    config = qwen3_vl()
    config.vision_config.deepstack_visual_indexes = [0]
    return build(config)


def test_features_that_enter_before_the_last_layer_do_not_need_it_whole():
    model, inputs = shallow_qwen3_vl(), make_batch("qwen3-vl")
    seen, everything, read = slots_computed(model, inputs)
    assert seen == [everything, read]
    want = naive_outputs(model, *inputs, with_entropy=True)
    got = prefix_shared_outputs(model, *inputs, with_entropy=True)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    want_gradient = gradients(model, want)
    assert (gradients(model, got) - want_gradient).norm() / want_gradient.norm() < 1e-5


def test_features_that_enter_after_the_last_layer_need_it_whole():
    model, inputs = build(CASES["qwen3-vl"][0]()), make_batch("qwen3-vl")
    seen, everything, _ = slots_computed(model, inputs)
    assert seen == [everything, everything]


def test_completions_of_one_token_are_read_from_the_prompt():
    model, (prompts, ids, mask) = build(CASES["idefics3"][0]()), make_batch("idefics3")
    mask = mask & (torch.arange(mask.shape[2]) < 1)
    want = naive_outputs(model, prompts, ids, mask).logprobs
    got = prefix_shared_outputs(model, prompts, ids, mask).logprobs
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", KNOWN)
def test_everywhere_else_the_model_computes_what_it_did(case):
    model, inputs = build(CASES[case][0]()), make_batch(case)
    want = naive_outputs(model, *inputs).logprobs
    prefix_shared_outputs(model, *inputs)
    assert torch.equal(naive_outputs(model, *inputs).logprobs, want)


@pytest.mark.parametrize("case", KNOWN[:1] + KNOWN[-1:])
def test_a_last_layer_that_recomputes_has_the_same_gradients(case):
    """Whether it recomputed before it was first used, or does since."""
    model, inputs = build(CASES[case][0]()), make_batch(case)
    want = gradients(model, prefix_shared_outputs(model, *inputs, with_entropy=True))
    recompute_layers(model)
    after = gradients(model, prefix_shared_outputs(model, *inputs, with_entropy=True))
    model = build(CASES[case][0]())
    recompute_layers(model)
    before = gradients(model, prefix_shared_outputs(model, *inputs, with_entropy=True))
    for got in (after, before):
        assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("case", KNOWN + OTHERS)
def test_what_need_not_run_is_known(case):
    model = build(CASES[case][0]())
    decoder = FAMILIES[model.config.model_type].decoder(model)
    found = unread_weights(decoder)
    if case in OTHERS[:-1]:
        assert found == 0
        return
    layer = decoder.layers[-1]
    mine = (layer.self_attn.q_proj, layer.self_attn.o_proj)
    mine += (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    assert found == sum(module.weight.numel() for module in mine)
