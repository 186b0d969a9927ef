"""The main job: sample groups, score them, update, hand the weights back.

Run by ``jobs/grpo_coco.py``.  :func:`train` is the loop; what surrounds it prepares the stage-1
model, starts the workers, evaluates on held-out images and writes the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray

from rayrl.actors.cluster import SPARE_CPUS, connect, cpus_of, failing_in_one_line, gpus_of
from rayrl.actors.fleet import Fleet
from rayrl.actors.learner_group import LearnerGroup
from rayrl.actors.pending import Pending
from rayrl.actors.pool import RestartBudget
from rayrl.actors.reward import check_terms
from rayrl.actors.telemetry import RayMetrics
from rayrl.actors.tracing import Tracer
from rayrl.backup import Backup
from rayrl.canary import Canary
from rayrl.checkpoint import list_checkpoints
from rayrl.cli import Invocation
from rayrl.config import Config
from rayrl.data import Dataset, load_train_and_val
from rayrl.given import check_given
from rayrl.heldout import Heldout
from rayrl.interrupt import StopRequest
from rayrl.learner.provided import check_objective
from rayrl.metrics import Phases, RunLog, write_summary
from rayrl.objectives import build
from rayrl.only_logged import only_logged
from rayrl.outline import Results
from rayrl.reference_rewards import ReferenceRewards
from rayrl.remote import RemoteCopies
from rayrl.report import write_report
from rayrl.resume import goes_on, open_run_folder
from rayrl.rewards.statistics import Statistics, reward_signature, reward_statistics
from rayrl.rollout_metrics import SAMPLED_GROUPS, group_metrics, sample_records, summarize
from rayrl.rounds import Rounds
from rayrl.run_lock import sole_driver
from rayrl.saving import SavedWhereItFails, close, is_due, restore, save
from rayrl.skipped import Skipped
from rayrl.stage1 import Snapshot, run_stage1
from rayrl.types import StepReport
from rayrl.weights import read_model_files
from rayrl.xe_curve import XeCurve


@dataclass
class Run:
    """The parts of a run: workers, data, logs.  The driver owns it and is the only writer of the
    run folder.  ``base`` is the folder of the stage-1 model; ``unlogged`` a step that was trained
    and is not logged yet, with its metrics so far."""

    config: Config
    folder: Path
    base: Path
    train_data: Dataset
    heldout: Heldout
    rounds: Rounds
    fleet: Fleet
    learner: LearnerGroup
    log: RunLog
    skipped: Skipped
    backup: Backup
    signatures: Mapping[str, str]
    phases: Phases
    tracer: Tracer
    reference: ReferenceRewards = field(default_factory=ReferenceRewards)
    stop: StopRequest = field(default_factory=StopRequest)
    canary: Canary | None = None
    saved_step: int = -1
    unlogged: tuple[int, Mapping[str, float]] | None = None


def train(run: Run, start: int) -> int:
    """The loop, from step ``start``; returns the step that it ended after.

    Batch k is sampled with version max(start, k - max_staleness): exactly so, because everything
    is submitted from here and workers keep the order.  Further rounds of a batch, where the
    objective asks for them, are sampled with the newest version.  A resumed run samples each prompt
    that was not trained on, and no other; ahead of the learner it catches up as a new run does.
    """
    steps, ahead = run.config.train.steps, run.config.train.max_staleness
    pending: list[Pending] = []
    version, started = start, run.fleet.begin_step()
    _send(run, pending, version)
    while version < steps and not run.stop.requested:
        if ahead == 0:
            # After the batch was sent: it waits behind the weights in each worker, and in none
            # for the others.
            with run.phases("sync"):
                run.fleet.confirm(version)
        # Where cores are shared this keeps workers from them, so not before they have begun.
        run.learner.prepare(pending[0])
        _read_ahead(run, version + len(pending))
        batch = pending.pop(0)
        _all_rounds(run, batch, version)
        with run.phases("learner"):
            run.fleet.sleep()
            drawn = run.rounds.complete(batch.step)
            report = run.learner.update(drawn.results)
            # Not before: a run that fails until here is saved with the step's prompts to go.
            run.rounds.finish(batch.step)
        version = report.weight_version
        run.unlogged = (version, report.metrics)
        with run.phases("sync"):
            publish(run, version)
        outline = drawn.results.outline
        metrics = {**report.metrics, **group_metrics(outline, version - 1), **drawn.metrics()}
        run.unlogged = (version, metrics)
        metrics.update(run.fleet.reward_seconds() | run.fleet.gauges(pending))
        run.fleet.adapt()
        metrics["captions_per_second"] = drawn.num_captions / (time.perf_counter() - started)
        last = version == steps or run.stop.requested
        _log(run, report, metrics, drawn.results, last=last)
        started = run.fleet.begin_step()
        # Before the checkpoint is written, which then keeps no worker waiting.
        _send(run, pending, version)
        run.skipped.check(report, run.learner.replay)
        if last or is_due(run, version):
            with run.phases("save"):
                save(run, last=last)
    if version > start and run.saved_step != version:
        # The request to stop came after the step had decided that it was not the last.
        save(run, last=True)
    run.fleet.confirm(version)
    return version


def _send(run: Run, pending: list[Pending], version: int) -> None:
    """Send workers the batches up to the last one that may be sampled with ``version``;
    ``pending`` holds those from batch ``version`` on that are on their way."""
    steps, ahead = run.config.train.steps, run.config.train.max_staleness
    while not run.stop.requested and len(pending) <= ahead and version + len(pending) < steps:
        step = version + len(pending)
        pending.append(run.fleet.submit(step, version, run.rounds.begin(step)))


def _read_ahead(run: Run, step: int) -> None:
    """Have the images of the next step, if the run has one, at hand while workers sample: they
    would wait for that later."""
    if step >= run.config.train.steps:
        return
    try:
        prompts = run.rounds.read_ahead(step)
    except (OSError, ValueError):
        # Whoever needs the image that cannot be read will say so.
        return
    run.fleet.stage(prompts)


def _all_rounds(run: Run, batch: Pending, version: int) -> None:
    """Wait for a batch, and sample and score what its rewards make the objective ask for."""
    while True:
        with run.phases("rollout"):
            run.fleet.wait_rollouts(batch)
        with run.phases("reward"):
            results = run.reference.joined(run.fleet.collect(batch))
        requests = run.rounds.go_on(batch.step, results)
        if not requests:
            return
        batch = run.fleet.submit(batch.step, version, requests, before=batch)


def train_or_save(run: Run, start: int) -> int:
    """:func:`train`, saved where it fails, and where it is asked to stop in a wait for workers."""
    with SavedWhereItFails(run):
        return train(run, start)
    return run.saved_step


def publish(run: Run, version: int, *, first: bool = False) -> None:
    """Hand the learner's weights to the workers; with the first version all of them, and every
    ``canary_every``-th time the proof that an engine computes what the learner does."""
    learner = run.learner
    frozen = learner.weights(trained_only=False) if first else None
    if first or not run.fleet.send(version, learner):
        trained = learner.weights(trained_only=True)
        run.fleet.publish(version, trained, frozen=frozen, source=learner)
    # The learner makes it: a driver that knew the model's tokens would be slow to start.
    run.canary = run.canary or learner.canary(run.heldout.prompts[0])
    if first or version % run.config.rollout.canary_every == 0:
        run.fleet.probe(version, run.canary, learner.score(run.canary))


def _log(
    run: Run, report: StepReport, metrics: dict[str, float], results: Results, *, last: bool
) -> None:
    """Log a step, with an evaluation and examples where they are due."""
    train, version = run.config.train, report.weight_version
    if last or version % train.eval_every == 0:
        metrics["eval/cider_d"] = evaluate(run, version)
    metrics.update(run.phases.take())
    if version % train.samples_every == 0 or version == 1:
        groups = results.first(SAMPLED_GROUPS)
        run.log.samples(sample_records(groups, report.advantages, version))
    run.log.step(version, metrics)
    run.unlogged = None


def evaluate(run: Run, version: int) -> float:
    """Held-out CIDEr-D (x100) of greedy captions at a version that the workers hold."""
    with run.phases("eval"):
        captions = [c.text for c in run.fleet.greedy(run.heldout.prompts, version)]
        return run.heldout.record(version, captions, attempt=run.log.attempt)


def main(invocation: Invocation) -> None:
    """Do what :func:`rayrl.commands.grpo` was asked for."""
    if invocation.replay is not None:
        # Imported late: only this needs the learner's own modules in the driver.
        from rayrl.learner.examine import examine_folder

        with failing_in_one_line("grpo_coco.py"):
            for line in examine_folder(invocation.replay, invocation.config):
                print(line, flush=True)
        return
    with failing_in_one_line("grpo_coco.py"), sole_driver(invocation.config.run_folder, print):
        resume = goes_on(invocation.config, invocation.resume)
        finished = run_job(invocation.config, resume=resume, trace=invocation.trace)
    if not finished:
        raise SystemExit(130)


def run_job(config: Config, *, resume: bool, trace: bool = False) -> bool:
    """From data to report; returns whether all steps were done (a stop between steps is not)."""
    folder = Path(config.run_folder)
    # What is missing is said before hours of stage 1, not after.
    check_objective(config)
    check_given(config, "train", "val", model=not resume)
    train_data, val_data = load_train_and_val(config.data)
    copies = open_run_folder(folder, config, train_data.fingerprint(), resume=resume, say=print)
    heldout = Heldout.first(config.train.eval_images, val_data, folder)
    statistics = reward_statistics(train_data.references(), config.reward)
    gpus = gpus_of(config, stage1=not (folder / "stage1" / "final").is_dir())
    local = connect(cpus_of(config), gpus, spare_cpus=SPARE_CPUS)
    try:
        check_terms(config, statistics, train_data, only_logged(config))
        snapshots = run_stage1(config, folder, train_data, resume=resume)
        stage1 = snapshots[-1]
        run = _start(
            config, train_data, heldout, statistics, stage1, copies, resume=resume, trace=trace
        )
        run.backup.base(resumed=resume)
        try:
            run.fleet.heed(run.stop)
            run.learner.stop = run.stop
            with run.stop.listening(run.log.message):
                return _train_and_report(run, snapshots, resume=resume)
        finally:
            close(run)
    finally:
        if local:
            ray.shutdown()


def _start(
    config: Config,
    train_data: Dataset,
    heldout: Heldout,
    statistics: Statistics,
    stage1: Snapshot,
    copies: RemoteCopies | None,
    *,
    resume: bool,
    trace: bool,
) -> Run:
    """Start the workers and the learner from the stage-1 model."""
    folder, files = Path(config.run_folder), read_model_files(stage1.folder)
    objective = build(config.objective, max_tokens=config.sampling.max_tokens)
    last = list_checkpoints(folder / "checkpoints")[-1] if resume else None
    budget = RestartBudget(config.rollout.max_restarts)
    # First, so that it has its place before rollout workers, of which a run can have fewer.
    learner = LearnerGroup(config, files, budget)
    greedy = "greedy_rewards" in objective.needs
    fleet = Fleet(config, files, statistics, budget, greedy_baseline=greedy, learner=learner)
    tracer = Tracer(folder if trace else None, fleet.workers, learner.workers)
    log = RunLog(
        folder,
        total_steps=config.train.steps,
        tensorboard=config.train.tensorboard,
        resume_from=last,
        heldout=heldout.name,
        also=[RayMetrics(folder.name), tracer],
    )
    return Run(
        config=config,
        folder=folder,
        base=stage1.folder,
        train_data=train_data,
        heldout=heldout,
        rounds=Rounds.of_run(config, objective.planners, train_data, stage1.folder),
        reference=ReferenceRewards.of_run(config, objective.needs),
        fleet=fleet,
        learner=learner,
        log=log,
        skipped=Skipped(folder, config, log.message),
        backup=Backup(copies, folder, keep=config.train.keep_checkpoints, say=log.message),
        signatures={
            "reward": reward_signature(config.reward, statistics),
            "eval/cider_d": heldout.signature,
        },
        phases=Phases(listener=tracer.phase),
        tracer=tracer,
    )


def _train_and_report(run: Run, snapshots: Sequence[Snapshot], *, resume: bool) -> bool:
    """Score stage 1, train, score a control that got more of stage 1, and write it all up."""
    curve = XeCurve(run.config, run.folder, run.train_data, run.fleet, run.heldout, run.log.message)
    if resume:
        run.learner.wait()  # vLLM takes what another process gets meanwhile for its own
        run.fleet.sleep()  # an engine on the learner's GPU, which needs room for all that is read
        start = restore(run)
    else:
        start = 0
        curve.stage1(snapshots)
    run.reference.sample(run.fleet, run.rounds.prompts(), run.base, run.config, run.log.message)
    # Those that have no weights yet are given them, and this version, when they are constructed.
    run.fleet.wait()
    publish(run, start, first=True)
    run.fleet.confirm(start)
    if not resume:
        run.log.step(0, {"eval/cider_d": evaluate(run, 0)})
    run.phases.take()
    end = train_or_save(run, start)
    finished = end == run.config.train.steps
    summary = {**summarize(run.config, run.log.history()), "signatures": dict(run.signatures)}
    write_summary(run.folder, summary)
    if finished and run.config.xe.control and run.config.xe.steps and not run.stop.requested:
        write_report(run.folder)  # in case that the control does not come to its end
        seconds = sum(summary["seconds_by_phase"].values()) - summary["seconds_by_phase"]["eval"]
        run.log.attempt("trace.json", run.tracer.collect)
        run.learner.shutdown()
        summary |= curve.control(snapshots[-1], seconds, run.stop)
        write_summary(run.folder, summary)
    run.log.message(f"report: {write_report(run.folder)}")
    run.backup.report()
    return finished
