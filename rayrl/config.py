"""The configuration tree: one frozen section a part, no unknown keys, defaults for a laptop.

The defaults are a complete run: the tiny captioner on generated pictures, two cores, no GPU.
:mod:`rayrl.cli` reads it from YAML and dotted command-line overrides.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayrl.credentials import refuse_credentials
from rayrl.data.config import DataConfig
from rayrl.learner.config import LearnerConfig, LoraConfig
from rayrl.objectives.config import ObjectiveConfig
from rayrl.parts import Part
from rayrl.rewards.config import RewardConfig
from rayrl.rollout_config import RolloutConfig, check_sync
from rayrl.section import LocalPath, Section

__all__ = ["LearnerConfig", "LoraConfig", "Part", "RolloutConfig"]

Backend = Literal["auto", "vllm", "hf"]


class TinyConfig(Section):
    """Sizes of the tiny captioner, an Idefics3 built here; head sizes of 32 suit vLLM on CPU."""

    image_size: int = 48
    """Pixels a side; pictures are resized to this square."""
    patch_size: int = 12
    """Pixels a side of a vision patch."""
    pixel_shuffle: int = 1
    """Patches a side that are folded into one image token."""
    vision_width: int = 96
    """Hidden size of the vision tower."""
    vision_layers: int = 3
    """Layers of the vision tower."""
    text_width: int = 128
    """Hidden size of the language model."""
    text_layers: int = 4
    """Layers of the language model."""
    vocab_size: int = Field(default=1024, ge=300)
    """Size of the BPE vocabulary; never more than the captions support."""
    max_positions: int = 256
    """Longest sequence, image tokens included."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> TinyConfig:
        grid = self.image_size // self.patch_size
        if self.image_size % self.patch_size or grid % self.pixel_shuffle:
            raise ValueError(
                f"image_size {self.image_size}: {self.patch_size}-pixel patches folded "
                f"{self.pixel_shuffle} by {self.pixel_shuffle} do not tile it"
            )
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % 32:
                raise ValueError(f"{name} {getattr(self, name)}: want a multiple of 32 (head size)")
        return self

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size // self.pixel_shuffle) ** 2


class ModelConfig(Section):
    """Which captioner is trained."""

    path: LocalPath = "tiny"
    """`tiny` (built from `tiny`), a local folder, or a hub name; all load with from_pretrained."""
    tiny: TinyConfig = TinyConfig()
    """Sizes of the tiny captioner."""
    image_processor: dict[str, Any] = Field(default={})
    """Settings of a given model's image processor that differ from its own, as
    `{"do_image_splitting": false}` (Idefics3, SmolVLM) or `{"max_pixels": 200704}` (Qwen): fewer
    image tokens make every step cheaper."""
    trainable: tuple[Part, ...] = ("vision", "connector", "language")
    """Parts that train; a frozen vision tower keeps its cached image features valid."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the learner; bfloat16 trains through float32 masters."""
    trust_remote_code: bool = False
    """Run code that a model folder brings along.  Only for folders you trust."""

    @model_validator(mode="after")
    def _something_trains(self) -> ModelConfig:
        if not self.trainable:
            raise ValueError("trainable is empty: name at least one of vision, connector, language")
        if self.image_processor and self.path == "tiny":
            raise ValueError(
                f"image_processor {self.image_processor} with path tiny: want model.tiny, from "
                "which its image processor is made"
            )
        return self


class EngineConfig(Section):
    """How captions are sampled."""

    backend: Backend = "auto"
    """`vllm`, `hf` (transformers, for machines without vLLM), or `auto`: vLLM where it is there,
    finds a device, and computes the same model (PaliGemma's it does not)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the engine."""
    kv_cache_mb: PositiveInt = 128
    """Memory of one engine's key-value cache, in MiB; never guessed from the machine."""
    max_model_len: PositiveInt = 128
    """Longest sequence of vLLM: image tokens, instruction and caption together."""
    max_concurrency: PositiveInt = 256
    """Captions that one engine decodes at once."""
    enforce_eager: bool = True
    """Skip graph capture and compilation: starts sooner, decodes large models slower."""


class SamplingConfig(Section):
    """How training captions are drawn; top-k and top-p do not exist here on purpose."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in the engine and in the learner alike."""
    max_tokens: PositiveInt = 24
    """Longest caption in tokens, the end token included."""


class XeConfig(Section):
    """Stage 1: cross-entropy on the reference captions (skipped when `steps` is 0)."""

    steps: NonNegativeInt = 400
    """Optimizer steps."""
    images_per_step: PositiveInt = 32
    """Images of a step, over all workers; each brings `captions_per_image` captions."""
    captions_per_image: PositiveInt = 5
    """References of an image that a step trains on."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate; 10 % linear warm-up, then cosine to a tenth."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """AdamW weight decay."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    snapshot_every: PositiveInt = 100
    """Steps between weight snapshots, from which the cross-entropy line of the report is drawn."""
    num_workers: PositiveInt = 1
    """Data-parallel Ray Train workers."""
    control: bool = True
    """After the run, train on with cross-entropy for as long as the objective trained, so that
    the report shows what more of stage 1 would have given."""


class TrainConfig(Section):
    """The loop."""

    steps: PositiveInt = 90
    """Steps of the objective; every step is one weight version."""
    images_per_step: PositiveInt = 32
    """Images of a step."""
    group_size: PositiveInt = 8
    """Captions sampled for an image."""
    max_staleness: NonNegativeInt = 0
    """0: sample with the newest weights; s: sampling runs s steps ahead of the learner."""
    eval_every: PositiveInt = 15
    """Steps between held-out evaluations (greedy captions, CIDEr-D)."""
    eval_images: PositiveInt = 200
    """Held-out images of an evaluation."""
    checkpoint_every: PositiveInt = 30
    """Steps between checkpoints; the last step is always one."""
    keep_checkpoints: PositiveInt = 2
    """The newest checkpoints, that stay on disk and at `checkpoint_uri`."""
    keep_best: bool = True
    """Save whenever a held-out evaluation is the best so far, and keep that checkpoint too, as
    `checkpoints/best`."""
    checkpoint_uri: LocalPath = ""
    """Copy checkpoints there too, so that `--resume` works on a fresh machine: `s3://…`, `gs://…`,
    `file:///…` or an absolute path, one a run; empty: nowhere."""
    samples_every: PositiveInt = 10
    """Steps between logged groups."""
    reward_workers: PositiveInt = 1
    """Reward actors."""
    reward_cpus: PositiveFloat = 0.25
    """CPUs of a reward actor."""
    reward_timeout_s: PositiveFloat = 300.0
    """Longest wait for a batch of rewards; a term with an actor of its own has a third of it, and
    what it has not got by then is dropped."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""

    @field_validator("checkpoint_uri")
    @classmethod
    def _remote_place(cls, uri: str) -> str:
        if uri and "://" not in uri and not uri.startswith("/"):
            raise ValueError("want s3://…, gs://…, file:///… or an absolute path")
        return refuse_credentials(uri)


class Config(Section):
    """Everything a run depends on; saved resolved in the run folder."""

    run_folder: LocalPath = "runs/grpo_coco"
    """Where metrics, samples, checkpoints and the report go."""
    seed: NonNegativeInt = 0
    """Seed of everything that is random."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    xe: XeConfig = XeConfig()
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    # The KL weight of arXiv 2503.01333, 0.04, holds a captioner this small down.
    objective: ObjectiveConfig = ObjectiveConfig(set={"kl_coef": 0.001})
    learner: LearnerConfig = LearnerConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _sizes_divide(self) -> Config:
        images = self.train.images_per_step
        if images % self.learner.minibatches:
            raise ValueError(
                f"train.images_per_step {images} does not divide into "
                f"learner.minibatches {self.learner.minibatches}"
            )
        if images // self.learner.minibatches < self.learner.num_workers:
            raise ValueError(
                f"learner.num_workers {self.learner.num_workers}, but a minibatch has only "
                f"{images // self.learner.minibatches} images to share"
            )
        if self.xe.images_per_step % self.xe.num_workers:
            raise ValueError(
                f"xe.images_per_step {self.xe.images_per_step} does not divide into "
                f"xe.num_workers {self.xe.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _batch_counts(self) -> Config:
        reward, images = self.reward, self.train.images_per_step
        if reward.df == "batch" and reward.counts_ngrams and images < 2:
            raise ValueError(
                f"reward.df batch over train.images_per_step {images}: with one image every "
                "CIDEr-D is 0; take more images, or reward.df train"
            )
        return self

    @model_validator(mode="after")
    def _caption_fits(self) -> Config:
        if self.model.path != "tiny":
            return self
        image = self.model.tiny.image_tokens
        want = image + self.sampling.max_tokens
        have = min(self.engine.max_model_len, self.model.tiny.max_positions)
        if want >= have:
            raise ValueError(
                f"{image} image tokens and captions of {self.sampling.max_tokens} tokens leave no "
                f"room for the instruction within {have} positions "
                "(engine.max_model_len, model.tiny.max_positions)"
            )
        return self

    @model_validator(mode="after")
    def _weights_arrive(self) -> Config:
        check_sync(self.rollout, self.learner, max_staleness=self.train.max_staleness)
        if self.rollout.colocate and self.xe.steps and self.xe.control:
            raise ValueError(
                "rollout.colocate with xe.control: the control trains on the GPU where the engine "
                "is; want xe.control false"
            )
        return self

    @property
    def sleep_level(self) -> int:
        """How deep a colocated engine sleeps.  2: its weights are dropped, for every one of them
        comes with the next version; 1: they wait in host memory, since some do not."""
        everything = set(self.model.trainable) == set(get_args(Part)) and not self.learner.lora.rank
        return 2 if self.rollout.colocate and everything else 1

    @property
    def canary_tolerance(self) -> float:
        """What engine and learner may differ by, given the types that they compute in."""
        coarse = "bfloat16" in (self.model.dtype, self.engine.dtype)
        return self.rollout.canary_tolerance * (10.0 if coarse else 1.0)

    @property
    def captions_per_step(self) -> int:
        return self.train.images_per_step * self.train.group_size
