"""What travels between the parts: frozen dataclasses of numpy arrays.

Axes: P prompts (images) of a step, G completions of a prompt, T completion tokens, S prompt
tokens, K reward terms.  Every invariant is checked on construction, and a violation names the
item, what it had and what was wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrl.packing import pack, unpack

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One image with its instruction and its reference captions.

    ``image`` is the encoded file (JPEG, PNG, ...), once per image and never pixels, so that a
    prompt weighs kilobytes wherever it travels.
    """

    prompt_id: str
    image: bytes
    text: str
    references: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError(f"prompt {self.prompt_id}: no reference caption, want at least one")
        if not self.image:
            raise ValueError(f"prompt {self.prompt_id}: empty image")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """One sampled caption: token ids [T] (the EOS included when it was sampled), the log-prob of
    each under the engine that sampled it [T] (nats, at the sampling temperature), the text.

    The first ``num_forced`` tokens were given and not sampled, such as the beginning of a
    reference: they are certain, so their log-prob is 0."""

    token_ids: IntArray
    logprobs: FloatArray
    text: str
    finish_reason: str
    weight_version: int
    num_forced: int = 0

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or len(self.token_ids) < 1:
            raise ValueError(
                f"completion {self.text!r}: token_ids of shape {self.token_ids.shape}, "
                "want [T] with T >= 1"
            )
        if self.logprobs.shape != self.token_ids.shape:
            raise ValueError(
                f"completion {self.text!r}: {self.logprobs.shape} log-probs for "
                f"{len(self.token_ids)} tokens"
            )
        if not np.isfinite(self.logprobs).all():
            bad = int(np.flatnonzero(~np.isfinite(self.logprobs))[0])
            raise ValueError(
                f"completion {self.text!r}: log-prob {self.logprobs[bad]} at token {bad}, "
                "want a finite one"
            )
        if not 0 <= self.num_forced < len(self.token_ids):
            raise ValueError(
                f"completion {self.text!r}: {self.num_forced} of {len(self.token_ids)} tokens "
                "forced, want at least one that was sampled"
            )
        if self.finish_reason not in ("stop", "length"):
            raise ValueError(
                f"completion {self.text!r}: finish_reason {self.finish_reason!r}, "
                "want 'stop' or 'length'"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutGroup:
    """A prompt and its G completions; ``prompt_token_ids`` [S] is expanded, as the engine used it
    (one id per image token), and is what the learner must use.  ``greedy`` is the arg-max caption
    where the objective asks for one (SCST), else None."""

    prompt: Prompt
    prompt_token_ids: IntArray
    completions: tuple[Completion, ...]
    group_size: int
    greedy: Completion | None = None

    def __post_init__(self) -> None:
        if len(self.completions) != self.group_size:
            raise ValueError(
                f"prompt {self.prompt.prompt_id}: {len(self.completions)} completions, "
                f"want {self.group_size}; a group is whole or it is dropped"
            )

    @property
    def captions(self) -> list[str]:
        return [completion.text for completion in self.completions]

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "completions"}
        return _unpacked_group, (rest, pack(self.completions))


def _unpacked_group(rest: dict[str, Any], completions: dict[str, Any]) -> RolloutGroup:
    return RolloutGroup(completions=tuple(unpack(Completion, completions)), **rest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredGroup:
    """A group with its reward terms (each [G]) and their weighted sum ``rewards`` [G].

    ``greedy_reward`` is the reward of ``group.greedy`` where there is one, else None; ``logged``
    are terms that nothing but the log reads, each [G] with NaN where it has no score.  Some
    objectives want more:

    fields: by the objective's name for them, arrays whose first axis is G, or N for
        ``reference_rewards`` [N]
    wrong_spans: for each caption the (start, end) characters of its text that a judge calls wrong
    prefix_rewards: for each caption the rewards of its first 0, 1, ... words, but not all of them
    """

    group: RolloutGroup
    terms: Mapping[str, FloatArray]
    rewards: FloatArray
    greedy_reward: float | None = None
    logged: Mapping[str, FloatArray] = field(default_factory=dict)
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    wrong_spans: tuple[tuple[tuple[int, int], ...], ...] | None = None
    prefix_rewards: tuple[FloatArray, ...] | None = None

    def __post_init__(self) -> None:
        who, size = self.group.prompt.prompt_id, self.group.group_size
        for name, values in {**self.terms, "reward": self.rewards}.items():
            if values.shape != (size,):
                raise ValueError(f"prompt {who}: {name} of shape {values.shape}, want ({size},)")
            if not np.isfinite(values).all():
                raise ValueError(f"prompt {who}: {name} {values.tolist()}, want finite values")
        if self.greedy_reward is not None and not np.isfinite(self.greedy_reward):
            raise ValueError(f"prompt {who}: greedy reward {self.greedy_reward}, want a finite one")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """What the learner trains on: P images with up to G completions each.

    ``mask`` [P,G,T] is True on the tokens of captions; it comes from lengths, never from pad ids,
    and the EOS counts once.  A group of fewer than G captions has rows without a token at its end.
    ``forced`` [P,G,T] marks tokens that were given and not sampled; None where there is none.
    ``truncated`` [P,G] marks captions that ran into the length limit.
    ``prompt_token_ids`` and ``images`` hold one entry per image.
    ``terms`` maps a reward term to [P,G]; ``greedy_rewards`` is [P] or None.
    ``texts`` and ``references`` are captions and references of each image.
    ``fields``, ``wrong_spans`` and ``prefix_rewards`` are those of ``ScoredGroup``, an image each;
    ``fields`` have a first axis P and NaN where an image has fewer references.
    """

    prompt_ids: tuple[str, ...]
    images: tuple[bytes, ...]
    prompt_token_ids: tuple[IntArray, ...]
    token_ids: IntArray
    mask: BoolArray
    rollout_logprobs: FloatArray
    rewards: FloatArray
    weight_versions: IntArray
    truncated: BoolArray
    terms: Mapping[str, FloatArray] = field(default_factory=dict)
    greedy_rewards: FloatArray | None = None
    texts: tuple[tuple[str, ...], ...] = ()
    references: tuple[tuple[str, ...], ...] = ()
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    wrong_spans: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] | None = None
    prefix_rewards: tuple[tuple[FloatArray, ...], ...] | None = None
    forced: BoolArray | None = None

    def __post_init__(self) -> None:
        p, g, t = self.token_ids.shape
        for name, want in (
            ("mask", (p, g, t)),
            ("rollout_logprobs", (p, g, t)),
            ("rewards", (p, g)),
            ("weight_versions", (p, g)),
            ("truncated", (p, g)),
        ):
            got = getattr(self, name).shape
            if got != want:
                raise ValueError(f"batch: {name} of shape {got}, want {want}")
        for name in ("prompt_ids", "images", "prompt_token_ids"):
            if len(getattr(self, name)) != p:
                raise ValueError(f"batch: {len(getattr(self, name))} {name}, want {p}")
        sizes = self.valid.sum(-1, keepdims=True)
        holes = (self.valid != (np.arange(g) < sizes)).any(-1) | (sizes[:, 0] < 1)
        if holes.any():
            which = self.prompt_ids[int(np.flatnonzero(holes)[0])]
            raise ValueError(f"batch: prompt {which} has a completion without tokens")
        if self.forced is not None:
            self._check_forced(self.forced)

    def _check_forced(self, forced: BoolArray) -> None:
        if forced.shape != self.mask.shape:
            raise ValueError(f"batch: forced of shape {forced.shape}, want {self.mask.shape}")
        if (wrong := (forced & ~self.mask).any((1, 2))).any():
            which = self.prompt_ids[int(np.flatnonzero(wrong)[0])]
            raise ValueError(f"batch: prompt {which} has a forced token beyond a caption's end")

    @property
    def shape(self) -> tuple[int, int, int]:
        p, g, t = self.token_ids.shape
        return p, g, t

    @property
    def valid(self) -> BoolArray:
        """[P,G] which captions exist: a group may have fewer than others."""
        return np.asarray(self.mask.any(-1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepReport:
    """What a learner step says of itself; ``weight_version`` grows by exactly one a step.
    ``advantages`` [P,G] are those that it trained with (means over tokens where they vary);
    ``problem`` says why the first optimizer step that was skipped was, where one was, and
    ``first_problem`` why the longest streak of them began, in this step or before it."""

    step: int
    weight_version: int
    metrics: Mapping[str, float]
    advantages: FloatArray
    problem: str = ""
    first_problem: str = ""
