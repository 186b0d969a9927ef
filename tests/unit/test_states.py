"""Hidden states behind the log-probs: the same on both paths, and what is read from them."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, build, make_batch

from rayrl.learner.chunked import Sampling, row_collisions
from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs

PATHS = {"naive": naive_outputs, "shared": prefix_shared_outputs}
OPTIONS = {"temperature": 0.7, "banned_ids": (0, 2)}


@pytest.mark.parametrize("case", CASES)
def test_both_paths_have_the_same_states_and_gradients(case):
    model, batch = build(CASES[case][0]()), make_batch(case)
    seen = {}
    for path, outputs in PATHS.items():
        model.zero_grad()
        states = outputs(model, *batch, **OPTIONS, with_states=True).states
        hidden = states.spread(states.hidden)
        weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
        (hidden * weight).sum().backward()
        gradient = model.get_input_embeddings().weight.grad.clone()
        seen[path] = hidden.detach(), gradient, states.collisions()
    assert not seen["shared"][0][~batch[2]].any()
    for got, want in zip(seen["shared"], seen["naive"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_states_know_only_what_came_before_their_token(path):
    model = build(CASES["idefics3"][0]())
    prompts, ids, mask = make_batch("idefics3")
    changed = ids.clone()
    changed[0, 0, 2] += 1
    with torch.no_grad():
        one, other = (
            PATHS[path](model, prompts, x, mask, with_states=True).states for x in (ids, changed)
        )
    moved = (one.spread(one.hidden) - other.spread(other.hidden)).abs().amax(-1)[0, 0] > 1e-6
    # Token 2 is another one: the states that predict tokens 0, 1 and 2 have not seen it.
    assert moved.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("path", PATHS)
def test_log_probs_after_other_states(path):
    model, batch = build(CASES["idefics3"][0]()), make_batch("idefics3")
    with torch.no_grad():
        out = PATHS[path](model, *batch, **OPTIONS, with_states=True, with_entropy=True)
        again, entropy = out.states.logprobs(with_entropy=True)
        doubled, _ = out.states.logprobs(2 * out.states.hidden)
        # A linear head without bias: doubled states are logits at half the temperature.
        colder = PATHS[path](model, *batch, temperature=0.35, banned_ids=(0, 2)).logprobs
    torch.testing.assert_close(again, out.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, out.entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(doubled, colder, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_collisions_are_sums_of_squared_probabilities(rows):
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [1.0], [5.0]])
    hidden = torch.tensor([[0.0], [1.0], [2.0]])
    # Without the third id: 1/2, and with odds of 1 to e^2 and e^4 at temperature 1/2.
    odds = torch.tensor([1.0, 2.718281828**2, 2.718281828**4])
    want = (1 + odds**2) / (1 + odds) ** 2
    got = row_collisions(
        hidden, head, Sampling(temperature=0.5, banned=(2,)), chunk_bytes=4 * 3 * rows
    )
    torch.testing.assert_close(got, want)
    assert got[0] == 0.5
