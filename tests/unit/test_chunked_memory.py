"""Peak memory of log-probs over a large vocabulary, as torch's own allocator counts it."""

from __future__ import annotations

import pytest
import torch
from tiny_families import build, llava, make_batch

from rayrl.learner.logprobs import naive_outputs, prefix_shared_outputs
from tests.unit.allocated import peak_bytes

G, T, V = 16, 10, 8192
MIB = 2**20


@pytest.fixture(scope="module")
def problem():
    config = llava()
    config.text_config.vocab_size = V
    model, (prompts, _, _) = build(config), make_batch("llava")
    torch.manual_seed(0)
    ids = torch.randint(6, V, (3, G, T))
    return model, prompts, ids, torch.ones_like(ids, dtype=torch.bool)


def step(outputs, problem, **options):
    """Bytes at the peak of a forward and backward pass, the parameters' gradients included."""
    model = problem[0]

    def run():
        model.zero_grad(set_to_none=True)
        outputs(*problem, **options).logprobs.sum().backward()

    run()  # what is made once and kept
    return peak_bytes(run)


def test_the_peak_is_counted_as_the_allocator_does():
    def two_at_once():
        one = torch.zeros(256, 1024)
        two = one + 1
        del one
        return two * 2

    assert peak_bytes(two_at_once) == pytest.approx(2 * MIB, rel=0.01)


def test_logits_of_the_batch_are_never_in_memory(problem):
    model = problem[0]
    weights = sum(p.nbytes for p in model.parameters())
    # Every prompt's last token and all but the last of its completions' predict.
    logits = 3 * (1 + G * (T - 1)) * V * 4
    assert logits > 6 * weights
    plain = step(naive_outputs, problem)
    whole = step(prefix_shared_outputs, problem)
    chunked = step(prefix_shared_outputs, problem, chunk_bytes=MIB)
    # The usual way holds logits, log-probs and their gradients; one chunk, log-probs and one more.
    assert plain > 3 * logits
    assert logits < whole < plain
    # In chunks: gradients of the weights, a few chunks, and what the layers keep.
    assert chunked < logits
    assert plain > 5 * chunked
