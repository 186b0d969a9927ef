"""The jobs' command lines.

Arguments and configuration are read before the job's own module is imported, which brings Ray and
PyTorch along: a mistake and ``--help`` are answered at once.  A dry run of an objective takes the
seconds that it needs to try it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import ceil

from rayrl import cli
from rayrl.config import Config
from rayrl.data.config import DataConfig
from rayrl.given import check_given
from rayrl.objectives.config import plan_with
from rayrl.objectives.plan import Phases
from rayrl.own_modules import NotHereError, find_here
from rayrl.rewards.deadline import call_limit_s


def grpo(argv: Sequence[str] | None = None) -> None:
    """`jobs/grpo_coco.py`."""
    find_here()
    invocation = cli.parse(
        sys.argv[1:] if argv is None else argv,
        program="grpo_coco.py",
        description="Fine-tune a vision-language model to caption images with GRPO, or any other "
        "objective, on CIDEr-D.",
    )
    _speak_of_defaults(invocation.config)
    _speak_of_phases(invocation.config)
    _speak_of_waits(invocation.config)
    if invocation.dry_run:
        from rayrl.actors.cluster import failing_in_one_line
        from rayrl.learner.provided import check_objective
        from rayrl.resume import goes_on
        from rayrl.rewards.function import check_functions

        with failing_in_one_line("grpo_coco.py"):
            check_objective(invocation.config)
            check_functions(invocation.config.reward.terms)
            invocation.config.data.check_validation_apart()
        print(cli.describe(invocation.config))
        with failing_in_one_line("grpo_coco.py"):
            begins = not goes_on(invocation.config, invocation.resume)
            check_given(invocation.config, "train", "val", model=begins)
        return
    from rayrl.grpo import main

    main(invocation)


def xe(argv: Sequence[str] | None = None) -> None:
    """`jobs/xe_coco.py`."""
    invocation = cli.parse(
        sys.argv[1:] if argv is None else argv,
        program="xe_coco.py",
        description="Stage 1: cross-entropy on reference captions, with Ray Train.",
        options=("--config", "--dry-run"),
    )
    _speak_of_defaults(invocation.config)
    if invocation.dry_run:
        print(cli.describe_stage1(invocation.config))
        try:
            check_given(invocation.config, "train")
        except (OSError, ValueError) as error:
            raise SystemExit(f"xe_coco.py: failed: {error}") from None
        return
    from rayrl.xe import main

    main(invocation.config)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """`jobs/eval_coco.py`."""
    from rayrl.eval_cli import parse, read_config

    find_here()
    options, overrides = parse(sys.argv[1:] if argv is None else argv)
    config = read_config(options, overrides)
    if options.checkpoint:
        _speak_of_size(config.data, str(options.checkpoint))
    from rayrl.evaluate import main

    main(options, config)


def _speak_of_defaults(config: Config) -> None:
    """Warn of what nobody chose and a pretrained model does not want."""
    xe, path = config.xe, config.model.path
    if path == "tiny":
        return
    if xe.steps and "lr" not in xe.model_fields_set:
        print(
            f"stage 1 trains {path} for {xe.steps} steps at xe.lr {xe.lr:g}, a rate for the tiny "
            "captioner; want --xe.steps 0 for a model that captions already, or an xe.lr",
            file=sys.stderr,
        )
    _speak_of_size(config.data, path)


def _speak_of_size(data: DataConfig, model: str) -> None:
    """Warn of photographs that would become as small as generated scenes."""
    if data.source in ("coco", "karpathy") and "image_size" not in data.model_fields_set:
        print(
            f"photographs of {data.images} are resized to data.image_size {data.image_size}, that "
            f"of the generated scenes; want the side that {model} looks at, as in "
            "--data.image_size 512",
            file=sys.stderr,
        )


def _speak_of_waits(config: Config) -> None:
    """Warn of reward terms that would still wait when their time for a batch is over."""
    limit_s = config.train.reward_timeout_s
    for name, term in config.reward.terms.items():
        if term.longest_wait_s > (call_s := call_limit_s(limit_s)):
            print(
                f"reward term {name} can wait {term.longest_wait_s:g} s for an answer, but under "
                f"train.reward_timeout_s {limit_s:g} it has {call_s:g} s for a batch, and what is "
                "late is dropped; want a shorter timeout_s, fewer retries, or "
                f"--train.reward_timeout_s {ceil(term.longest_wait_s * limit_s / call_s)}",
                file=sys.stderr,
            )


def _speak_of_phases(config: Config) -> None:
    """Warn of phases of the objective that begin after the run's last step."""
    preset, steps = config.objective.preset, config.train.steps
    try:
        plan = plan_with(preset, config.objective.set)
    except NotHereError:
        return  # which is said later
    if isinstance(plan, Phases) and steps <= (begins := sum(plan.steps[:-1])):
        lengths = "+".join(str(length) for length in plan.steps)
        print(
            f"train.steps {steps}: the last phase of {preset} begins after {begins} steps and is "
            f"never reached; want more steps, or other lengths than phase_steps={lengths}",
            file=sys.stderr,
        )
