"""The learner's part of the configuration; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayrl.section import Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) in place of the weights themselves."""

    rank: NonNegativeInt = 0
    """Rank of the adapters on the linear layers of `model.trainable`; 0 trains the weights."""
    alpha: PositiveInt = 32
    """Scale of what adapters add, over the rank."""
    publish: Literal["merged", "adapters"] = "merged"
    """What engines pull after a step: whole weights with the adapters in them, or the adapters
    alone, which they add to the base that they hold."""

    @model_validator(mode="after")
    def _adapters_to_publish(self) -> LoraConfig:
        if self.publish == "adapters" and not self.rank:
            raise ValueError(
                "publish adapters with rank 0, which trains the weights themselves: want a rank "
                "above 0, or publish merged"
            )
        return self


class LearnerConfig(Section):
    """The update."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW moment decays."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up, to 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    max_skipped: PositiveInt = 3
    """Optimizer steps in a row without a finite loss and gradient that end the run; each is
    skipped, counted, and kept for `--replay`."""
    inner_epochs: PositiveInt = 1
    """Passes over the captions of a step."""
    minibatches: PositiveInt = 1
    """Optimizer steps a pass; the images of a step are shuffled into this many parts."""
    micro_batch_images: PositiveInt = 32
    """Images whose groups go through the model at once; changes memory, not results."""
    micro_batch_tokens: NonNegativeInt = 0
    """Tokens of prompts and captions that go through the model at once, padding included; 0 counts
    images alone.  An image above it goes alone."""
    lora: LoraConfig = LoraConfig()
    activation_checkpointing: bool = False
    """Keep only the inputs of layers for the backward pass and run the layers again in it."""
    compile: bool = False
    """Compile the layers with torch.compile; refused at the start, with the reason, where that does
    not work."""
    input_cache_mb: PositiveInt = 512
    """Host memory of a rank, in MiB, for decoded and normalized images, those of the next step
    first; of its share of a step, what does not fit is decoded again at every pass.  An image, or a
    tile of it, of 512 x 512 pixels takes 3 to 5 MiB."""
    feature_cache_mb: NonNegativeInt = 1024
    """Host memory, in MiB, for image features, which are computed once per image and run while
    vision tower and connector are frozen; 0 computes them at every pass."""
    prefix_shared: bool = True
    """Run image and prompt once a group; off is the naive way, for comparison."""
    num_workers: PositiveInt = 1
    """Ranks: processes that share each step's images and take one step together."""
    parallel: Literal["data", "fsdp"] = "data"
    """With several ranks: each holds the whole model, or they split parameters, gradients and
    optimizer state between them (FSDP2).  Changes memory, not results."""
    cpus: PositiveFloat = 2.0
    """CPUs of a rank, and its threads."""
    gpus: float = Field(default=0.0, ge=0)
    """The GPU of a rank, or a share of one; with 0 it computes on CPUs, whatever the machine
    has."""
    timeout_s: PositiveFloat = 600.0
    """A rank that keeps the others waiting for this long counts as dead, and so does one alone that
    has not answered a call, a step for example."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        for which, beta in zip(("first", "second"), betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(
                    f"{list(betas)}: the {which} moment decays by {beta:g} a step, want at least 0 "
                    "and less than 1"
                )
        return betas

    @model_validator(mode="after")
    def _a_gpu_each(self) -> LearnerConfig:
        if self.gpus > 1:
            raise ValueError(
                f"gpus {self.gpus:g}: a rank computes on one GPU and would leave the others idle; "
                "want at most 1, and num_workers for more"
            )
        if self.num_workers > 1 and self.gpus not in (0, 1):
            raise ValueError(
                f"gpus {self.gpus:g} with num_workers {self.num_workers}: a rank runs on one GPU "
                "of its own, want 0 or 1"
            )
        return self
