"""Nodes of a tree attend to the trunk and to their own branch: values and gradients of one masked
attention over the whole row."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, build, gradients, make_batch

from rayrl.learner import branches
from rayrl.learner.attention import mark_branches, tree_attention
from rayrl.learner.branches import BranchAttention, branches_of
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from rayrl.learner.recompute import recompute_layers
from rayrl.learner.tree import build_tree

P, G, T = 3, 14, 8


def additive(seen, dtype=torch.float32):
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None]


def captions(prompts=P, size=G, seed=0):
    """Captions of unequal lengths; of each prompt a pair is equal, three begin alike, two differ in
    the first token alone, and the second prompt's all end after two tokens."""
    torch.manual_seed(seed)
    ids = torch.randint(6, 50, (prompts, size, T))
    ids[:, 1] = ids[:, 0]
    ids[:, 3:5, :4] = ids[:, 2:3, :4]
    ids[:, 6, 1:] = ids[:, 5, 1:]
    lengths = torch.randint(1, T + 1, (prompts, size))
    lengths[1] = 2
    return ids, torch.arange(T) < lengths[..., None]


def tree_of(prompt_lengths, ids, mask):
    widest = max(prompt_lengths)
    return build_tree(torch.arange(widest) < torch.tensor(prompt_lengths)[:, None], ids, mask)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(branches, "_WORTH_IT", -(10**9))


@pytest.fixture
def applied(monkeypatch):
    """One entry a call of ``BranchAttention``."""
    calls, apply = [], BranchAttention.apply

    def counting(*arguments):
        calls.append(arguments)
        return apply(*arguments)

    monkeypatch.setattr(BranchAttention, "apply", counting)
    return calls


def seen_by_blocks(where, count):
    """[P, n, n] which node sees which one, from the masks of their blocks."""
    size = where.within.shape[-1]
    seen = torch.zeros(len(where.unfold), count, count, dtype=torch.bool)
    for p, slots in enumerate(where.unfold.tolist()):
        for i, one in enumerate(slots):
            for j, other in enumerate(slots):
                if one // size == other // size:
                    seen[p, i, j] = where.within[one // size, 0, one % size, other % size] == 0
    return seen


@pytest.mark.parametrize("lengths", [(5, 3, 7), (4, 4, 4)])
def test_a_node_sees_in_its_block_what_it_sees_in_the_tree(always, lengths):
    ids, mask = captions()
    tree = tree_of(lengths, ids, mask)
    where = branches_of(tree, additive(tree.nodes))
    count = tree.nodes.shape[1]
    assert len(where.unfold.unique()) == P * count  # every node has one slot of its own
    kept = where.fold[where.unfold]
    assert torch.equal(kept, torch.arange(P * count).view(P, count))
    filler = ~tree.real[:, tree.trunk_slots :]
    want = tree.nodes[:, :, tree.trunk_slots :] | torch.diag_embed(filler)
    assert torch.equal(seen_by_blocks(where, count), want)
    assert filler.any()
    assert (where.below is None) == (len(set(lengths)) == 1)


def test_slots_that_are_left_over_see_themselves_and_nobody_sees_them(always):
    tree = tree_of((4, 4, 4), *captions())
    where = branches_of(tree, additive(tree.nodes))
    size = where.within.shape[-1]
    empty = torch.ones(where.within.shape[0] * size, dtype=torch.bool)
    empty[where.unfold.flatten()] = False
    empty = empty.view(-1, size)
    seen = where.within[:, 0] == 0
    alone = torch.eye(size, dtype=torch.bool)
    assert empty.any()
    assert torch.equal(seen[empty], alone.expand_as(seen)[empty])
    assert not (seen & empty[:, None] & ~alone).any()


def attention_inputs(tree, key_heads, dtype):
    torch.manual_seed(4)
    p, length = tree.source.shape
    shapes = [(p, length, heads, 8) for heads in (4, key_heads, key_heads)]
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return leaves, [leaf.transpose(1, 2) for leaf in leaves]


class Layer:
    """What attention reads of a layer."""

    def __init__(self, groups):
        self.num_key_value_groups = groups


@pytest.mark.parametrize("lengths", [(5, 3, 7), (4, 4, 4)])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_one_masked_attention(
    always, applied, lengths, key_heads, dtype, near
):
    tree = tree_of(lengths, *captions())
    leaves, heads = attention_inputs(tree, key_heads, dtype)
    wanted = tree.real[..., None, None] * torch.randn(*tree.source.shape, 4, 8)
    results = []
    for marked in (False, True):
        mask = additive(tree.nodes, dtype)
        if marked:
            mark_branches(mask, tree)
        output, _ = tree_attention(Layer(4 // key_heads), *heads, mask, scaling=0.3, dropout=0.0)
        output = output.masked_fill(~tree.real[..., None, None], 0.0)
        results.append((output, *torch.autograd.grad((output * wanted).sum(), leaves)))
    assert len(applied) == 1
    for got, want in zip(results[1], results[0], strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm().item() / want.norm().item() < near
        # What nobody wants something of gets no gradient, and filler's key is seen by nobody.
        assert (got[~tree.real] == 0).all()


def crowd(case):
    """The families' batch with many captions a prompt."""
    prompts, _, _ = make_batch(case)
    return prompts, *captions()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", ["idefics3", "llava", "blip-2 opt", "qwen2.5-vl", "qwen3-vl"])
def test_models_compute_what_the_naive_way_does(case, recompute, always, applied):
    model, inputs = build(CASES[case][0]()), crowd(case)
    want = naive_outputs(model, *inputs, with_entropy=True)
    want_gradient = gradients(model, want)
    if recompute:
        recompute_layers(model)
    assert not applied
    got = prefix_shared_outputs(model, *inputs, with_entropy=True)
    assert len(applied) == model.config.get_text_config().num_hidden_layers
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    difference = (gradients(model, got) - want_gradient).norm() / want_gradient.norm()
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("size", "begin_alike", "layers"), [(70, False, 2), (70, True, 0), (20, False, 0)]
)
def test_blocks_are_for_many_nodes_in_many_branches(applied, size, begin_alike, layers):
    model, (prompts, _, _) = build(CASES["idefics3"][0]()), make_batch("idefics3")
    ids, mask = captions(size=size)
    if begin_alike:
        ids[:, :, 0] = 7
    prefix_shared_outputs(model, prompts, ids, mask)
    assert len(applied) == layers


@pytest.mark.parametrize("given", [{"dropout": 0.1}, {"position_bias": torch.ones(4, 1, 1)}])
def test_what_blocks_do_not_know_of_is_left_to_one_masked_attention(always, applied, given):
    tree = tree_of((4, 4, 4), *captions())
    _, heads = attention_inputs(tree, 4, torch.float32)
    mask = additive(tree.nodes)
    mark_branches(mask, tree)
    tree_attention(Layer(1), *heads, mask, **given)
    assert not applied


def test_under_autocast_blocks_compute_in_its_type(always, applied):
    tree = tree_of((5, 3, 7), *captions())
    _, heads = attention_inputs(tree, 4, torch.float32)
    want, _ = tree_attention(Layer(1), *heads, additive(tree.nodes))
    with torch.autocast("cpu", torch.bfloat16):
        mask = additive(tree.nodes, torch.bfloat16)
        mark_branches(mask, tree)
        got, _ = tree_attention(Layer(1), *heads, mask)
    assert len(applied) == 1
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[tree.real].float(), want[tree.real], rtol=0, atol=3e-2)
