"""Configuration of the rewards: which terms, with what weights, against which frequencies.

A term is a weight (``cider_d: 1.0``) or a section (``cider_d: {weight: 1.0}``).  Its name is its
kind unless ``kind`` says otherwise, so that one kind can serve twice:

    reward:
      terms:
        cider_d: 1.0
        bad_ending: 0.5
        judge: {kind: chat, url: "http://judge:8000/v1/chat/completions", model: qwen, weight: 0.2}
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayrl.credentials import server_address, variable_name
from rayrl.rewards.deadline import longest_wait_s
from rayrl.rewards.placed import Asks, PlacedConfig, TermConfig, whole_or_fraction
from rayrl.section import LocalPath, Section

DF_MODES = ("train", "caption", "batch")
DF_FILES = (".npz", ".p", ".pkl")

CONSTRAINT = r"^(>=|<=|>|<) *-?\d+(\.\d+)?$"
"""A bound on a term's score."""

NOT_TERMS = frozenset({"mean", "std_in_group", "best_in_group", "greedy"})
"""What `reward/...` metrics are called that are no term's."""


class CiderConfig(TermConfig):
    """CIDEr-D, 0..10."""

    kind: Literal["cider_d"] = "cider_d"

    @property
    def counts_ngrams(self) -> bool:
        return True


class BleuConfig(TermConfig):
    """BLEU of each caption, 0..1."""

    kind: Literal["bleu"] = "bleu"
    n: Annotated[int, Field(ge=1, le=4)] = 4
    """The longest n-grams."""


class RougeConfig(TermConfig):
    """ROUGE-L, 0..1."""

    kind: Literal["rouge_l"] = "rouge_l"


class JavaConfig(PlacedConfig):
    """A term in Java, always in an actor of its own."""

    cpus: float = Field(default=0.5, ge=0)
    """CPUs that its own actor asks Ray for; fractions are allowed."""

    @property
    def asks(self) -> Asks:
        return Asks(self.cpus, self.gpus)


class MeteorConfig(JavaConfig):
    """METEOR, 0..1; about 1 ms a caption."""

    kind: Literal["meteor"] = "meteor"
    timeout_s: PositiveFloat = 45.0
    """Longest wait for an answer, of which there are two attempts."""

    @property
    def longest_wait_s(self) -> float:
        return 2 * self.timeout_s


class SpiceConfig(JavaConfig):
    """SPICE, 0..1; slow."""

    kind: Literal["spice"] = "spice"
    timeout_s: PositiveFloat = 90.0
    """Longest wait for a batch."""

    @property
    def longest_wait_s(self) -> float:
        return self.timeout_s


class ClipScoreConfig(PlacedConfig):
    """CLIPScore, 0..2.5, or RefCLIPScore; on a GPU if it has ``gpus``, else on the CPU."""

    kind: Literal["clip_score"] = "clip_score"
    folder: LocalPath
    """A local CLIP model."""
    references: bool = False
    """RefCLIPScore: the harmonic mean with the likeness to the closest reference."""


class LengthConfig(TermConfig):
    """Minus the words outside a range."""

    kind: Literal["length"] = "length"
    min_words: NonNegativeInt = 4
    """Shorter captions are punished."""
    max_words: PositiveInt = 20
    """Longer captions are punished."""

    @model_validator(mode="after")
    def _some_length_is_right(self) -> LengthConfig:
        if self.min_words > self.max_words:
            raise ValueError(
                f"min_words {self.min_words} with max_words {self.max_words}: every caption would "
                "be punished, want max_words at least as large"
            )
        return self


class RepetitionConfig(TermConfig):
    """Minus the share of repeated n-grams."""

    kind: Literal["repetition"] = "repetition"
    n: PositiveInt = 2
    """The length of the n-grams."""


class BadEndingConfig(TermConfig):
    """-1 for captions that end in "a", "with" and their like."""

    kind: Literal["bad_ending"] = "bad_ending"


class FunctionConfig(PlacedConfig):
    """A user's function of the captions of an image and its prompt; apart if it has ``cpus`` or
    ``gpus``."""

    kind: Literal["function"] = "function"
    path: str
    """package.module:function."""
    retries: NonNegativeInt = 0
    """How often a group is tried again for which it raises."""


class ServerConfig(PlacedConfig):
    """A term that asks a server, always in an actor of its own, which mostly waits."""

    url: Annotated[str, AfterValidator(server_address)]
    """Where to post, http or https; it is named in full, and redirects are not followed."""
    timeout_s: PositiveFloat = 30.0
    """Longest wait for an answer."""
    retries: NonNegativeInt = 2
    """Further attempts for a request that failed."""
    in_flight: PositiveInt = 16
    """Most requests at a time."""
    api_key_variable: Annotated[str, AfterValidator(variable_name)] = ""
    """The environment variable that holds the key."""

    @property
    def asks(self) -> Asks:
        return Asks(self.cpus, self.gpus)

    @property
    def longest_wait_s(self) -> float:
        return longest_wait_s(self.timeout_s, self.retries)


class HttpConfig(ServerConfig):
    """A reward server; ``rayrl.rewards.http.HttpTerm`` says what is posted."""

    kind: Literal["http"] = "http"
    items_per_request: PositiveInt = 8
    """Images in a request."""


class ChatConfig(ServerConfig):
    """An LLM judge behind an OpenAI-compatible chat endpoint."""

    kind: Literal["chat"] = "chat"
    model: str
    """The name the server knows it by."""
    question: str = (
        "Rate from 0 to 10 how well this caption describes the image: {caption}\n"
        "Answer with the number alone."
    )
    """What to ask; {caption} and {references} are filled in."""
    scale: PositiveFloat = 10.0
    """The highest answer, by which the number is divided; one beyond it drops the image."""
    max_tokens: PositiveInt = 256
    """Longest answer; one that is cut there drops the image, as its number may be yet to come."""

    @field_validator("question")
    @classmethod
    def _asks_about_the_caption(cls, question: str) -> str:
        if "{caption}" not in question:
            raise ValueError(
                f"question {question!r:.80} says nothing of the caption, want {{caption}} in it"
            )
        return question


class EnsembleConfig(TermConfig):
    """Several terms as one; a member's weight brings it to the common scale.  If any member is
    apart, all run in one actor, which asks for the sum of their CPUs and GPUs."""

    kind: Literal["ensemble"] = "ensemble"
    members: dict[str, AnyTermConfig] = Field(min_length=1)
    """The members by name."""
    rule: Literal["worst_case", "uncertainty"] = "worst_case"
    """The least of the members, or their mean minus the penalty times their variance."""
    penalty: PositiveFloat = 1.0
    """Of the variance, under "uncertainty"."""

    @property
    def asks(self) -> Asks | None:
        asked = [member.asks for member in self.members.values() if member.asks is not None]
        if not asked:
            return None
        return Asks(sum(one.cpus for one in asked), sum(one.gpus for one in asked))

    @property
    def longest_wait_s(self) -> float:
        return sum(member.longest_wait_s for member in self.members.values())

    @model_validator(mode="after")
    def _placeable(self) -> EnsembleConfig:
        if self.asks is not None:
            whole_or_fraction(self.asks.gpus)
        return self

    @property
    def counts_ngrams(self) -> bool:
        return any(member.counts_ngrams for member in self.members.values())

    _complete = field_validator("members", mode="before")(lambda value: complete_terms(value))


AnyTermConfig = Annotated[
    CiderConfig
    | BleuConfig
    | RougeConfig
    | MeteorConfig
    | SpiceConfig
    | ClipScoreConfig
    | LengthConfig
    | RepetitionConfig
    | BadEndingConfig
    | FunctionConfig
    | HttpConfig
    | ChatConfig
    | EnsembleConfig,
    Field(discriminator="kind"),
]

KINDS = tuple(kind.model_fields["kind"].default for kind in get_args(get_args(AnyTermConfig)[0]))


def complete_terms(terms: Any) -> Any:
    """Terms by name with a number for a weight, or without a kind, spelled out."""
    if not isinstance(terms, dict):
        return terms
    return {name: _complete_term(name, term) for name, term in terms.items()}


def _complete_term(name: str, term: Any) -> Any:
    if isinstance(term, TermConfig):
        return term
    fields = {"weight": term} if isinstance(term, int | float | str) else term
    if not isinstance(fields, dict):
        raise ValueError(f"term {name}: {term!r}, want a weight or a section")
    kind = fields.get("kind", name)
    if kind not in KINDS:
        near = get_close_matches(str(kind), KINDS, n=3)
        raise ValueError(
            f"term {name}: kind {kind!r}, want one of {', '.join(near or KINDS)}; a term of "
            "another name says which it is with kind"
        )
    return {**fields, "kind": kind}


class RewardConfig(Section):
    """What a caption is rewarded for: a weighted sum of terms."""

    terms: dict[str, AnyTermConfig] = Field(default={"cider_d": CiderConfig()})
    """The terms by name."""
    eos: bool = True
    """Whether CIDEr-D counts the end of the caption as a word, so that stopping in the middle of
    a sentence costs something."""
    df: LocalPath = "train"
    """Where document frequencies come from.  train: the training references, an image each;
    caption: the same, every caption a document of its own; batch: the images of each step, however
    many reward workers share it; or a file, .npz of DocumentFrequency.save or .p of
    self-critical.pytorch."""

    constraints: dict[str, Annotated[str, Field(pattern=CONSTRAINT)]] = Field(default={})
    """What a caption must satisfy, by term, such as `length: ">= 0"`; some objectives learn from
    whether it does."""

    _complete = field_validator("terms", mode="before")(complete_terms)

    @model_validator(mode="after")
    def _constrained_terms_exist(self) -> RewardConfig:
        for name in self.constraints:
            if name not in self.terms:
                near = get_close_matches(name, self.terms, n=1) or list(self.terms)
                raise ValueError(f"constraints: no term {name!r}, want one of {', '.join(near)}")
        return self

    @field_validator("terms")
    @classmethod
    def _some(cls, terms: dict[str, TermConfig]) -> dict[str, TermConfig]:
        if taken := [name for name in terms if name in NOT_TERMS]:
            raise ValueError(
                f"term {taken[0]}: the metric reward/{taken[0]} is another number, want another "
                "name; a term says which kind it is with kind"
            )
        if not any(term.weight for term in terms.values()):
            raise ValueError("no term has a weight, want at least one")
        return terms

    @field_validator("df")
    @classmethod
    def _known(cls, df: str) -> str:
        if df not in DF_MODES and not df.endswith(DF_FILES):
            want = ", ".join(get_close_matches(df, DF_MODES, n=1) or DF_MODES)
            files = " or ".join(DF_FILES)
            raise ValueError(f"df {df!r}, want one of {want} or a file that ends in {files}")
        return df

    @property
    def weights(self) -> dict[str, float]:
        """By the terms' names."""
        return {name: term.weight for name, term in self.terms.items()}

    @property
    def counts_ngrams(self) -> bool:
        """Whether any term scores against document frequencies."""
        return any(term.counts_ngrams for term in self.terms.values())
