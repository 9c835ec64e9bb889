"""Assemble a run from its config, train it, and report the outcome."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tora.config.components import import_from
from tora.config.load import read_tree
from tora.config.resuming import check_resumed
from tora.config.schema import RunConfig
from tora.distributed.process_group import World
from tora.errors import ComponentError, ConfigError, TrainingError, described
from tora.launch.banner import banner
from tora.launch.engines import ROLLOUT_BASE, with_engine
from tora.launch.eval_workers import with_eval_workers
from tora.launch.in_process import in_process
from tora.launch.memory import check_memory
from tora.launch.on_ray import on_ray
from tora.launch.ray_cluster import is_submitted_job, output_folder
from tora.launch.servable import with_served_model
from tora.launch.signals import Stop
from tora.models.hub import fetched, named
from tora.models.load import implementation_of, read_config
from tora.reporting.hub import HubRepo
from tora.reporting.metrics import MetricLog, NoLog
from tora.reporting.summary import print_summary, reward_curve
from tora.reporting.uploads import Uploads
from tora.run.canary import NUM_PROBES, Canary
from tora.run.checkpoints import Checkpoints, RunState, step_of
from tora.run.disk import disk_errors
from tora.run.folder import RunFolder, held
from tora.run.identity import CONFIG, is_finished, new_run_id, result_name, run_id_in, write_config
from tora.run.loop import Outcome
from tora.run.recovery import train_and_export
from tora.run.run import Run
from tora.tasks.prompts import RunPrompts

_log = logging.getLogger(__name__)


def run(cfg: RunConfig, stop: Stop | None = None) -> bool:
    """Train, evaluate, export and report; False if `stop` was requested before the end.

    A run whose checkpoint and adapter have all of `num_steps` says so and ends. Of several ranks every one calls this;
    only rank 0 writes and reports. Raises ConfigError if opening the data or the model reveals a mistake in the config,
    and TrainingError if `max_idle_steps` ended the run.
    """
    import_from(cfg.import_from or ())
    wanted, cfg = cfg.rollout.engine, with_engine(cfg)
    folder = output_folder(cfg.output_dir)
    cfg = replace(cfg, output_dir=str(folder))  # a Ray actor may have another working directory
    stop = stop or Stop()
    resumes = cfg.resume_from_checkpoint
    if resumes is None:
        resumes = "auto" if is_submitted_job() else False
        cfg = replace(cfg, resume_from_checkpoint=resumes)
    if not resumes:
        _check_inputs(cfg, folder)
    cfg = with_eval_workers(with_served_model(_with_model(cfg, folder / CONFIG), wanted))
    with (
        _held(folder, stop, resumes=resumes is True) as claim,
        (on_ray if cfg.async_rl else in_process)(cfg, stop) as site,
    ):
        world = site.world
        plan = check_memory(cfg, site.devices)
        if world.rank == 0 and plan is not None:
            print(plan.line(), flush=True)
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, is_writer=world.rank == 0)
        resume = checkpoints.to_resume(may_start=resumes == "auto") if resumes else None
        if resume is not None:
            changed = check_resumed(folder / CONFIG, _portable(cfg))
            if changed and world.rank == 0:
                _log.warning("resuming with changed settings: %s", ", ".join(map(str, changed)))
            has_all = resumes == "auto" or step_of(resume) >= cfg.num_steps
            if has_all and is_finished(folder / result_name(cfg), cfg.num_steps):
                if world.rank == 0:
                    told = "the run in %s has finished its %d steps; another needs another output_dir"
                    _log.warning(told, folder, cfg.num_steps)
                return not stop.requested
        elif resumes:
            _check_inputs(cfg, folder)
        uploads = _uploads(cfg, folder, must_connect=resume is None) if world.rank == 0 else None
        prompts = RunPrompts(cfg)
        learner = site.learner()
        state = RunState()
        if resume is not None:
            learner.restore(resume)
            state = checkpoints.read(resume, prompts.at)
            _check_identity(resume, state, run_id_in(folder))
            if resumes == "auto" and world.rank == 0:
                _log.warning("run %s goes on from step %d in %s", state.run_id, state.step, folder)
        state.run_id = state.run_id or new_run_id()
        ends = nullcontext() if uploads is None else closing(uploads)
        with ends, _undone_unless_trained(claim, state), disk_errors(cfg.output_dir, checkpoints):
            with ExitStack() as last:  # each is called whatever others raise
                log = NoLog() if claim is None else _open(cfg, claim, state, resumes=resume is not None)
                last.callback(_close, log)
                world.any(False)  # a barrier: no rank writes into the folder before rank 0 has opened it
                last.callback(shutil.rmtree, folder / ROLLOUT_BASE, ignore_errors=True)
                rollouts = site.rollouts(prompts, state)
                last.callback(rollouts.close)
                probes = prompts.probes(NUM_PROBES)
                assembled = Run(
                    cfg=cfg,
                    folder=folder,
                    learner=learner,
                    make_learner=site.learner,
                    rollouts=rollouts,
                    canary=Canary.from_config(cfg, probes, prompts.image_token),
                    log=log,
                    checkpoints=checkpoints,
                    state=state,
                    prompt_at=prompts.at,
                    is_alone=world.size == 1,
                    stop_requested=lambda: world.any(stop.requested),
                    let_save=stop.let_save,
                    tries_adapter=_is_untested(cfg) and state.step == 0,
                    eval_sets=prompts.eval_sets,
                    uploads=uploads,
                )
                outcome = train_and_export(assembled)
            if world.rank == 0:
                _report(assembled, outcome)
                if uploads is not None and outcome.end != "stopped":
                    uploads.finish(assembled.result_folder, state.step, lambda: stop.requested)
        stopped = world.any(stop.requested)  # a barrier: the first rank to end may end the others
    if outcome.end == "idle":
        raise TrainingError(outcome.reason)
    return not stopped


def _is_untested(cfg: RunConfig) -> bool:
    """Whether transformers' code runs the model, with an adapter that a canary can check."""
    has_adapter = cfg.model.lora_type != "full" and cfg.sync.canary_every > 0
    return has_adapter and implementation_of(read_config(Path(cfg.model.path)), cfg.model.implementation) != "native"


def _close(log: MetricLog | NoLog) -> None:
    """A logger that cannot say goodbye, to a server for instance, is not worth a finished run."""
    try:
        log.close()
    except Exception as error:
        _log.warning("a metric logger did not close: %s", described(error))


def _with_model(cfg: RunConfig, pinned: Path) -> RunConfig:
    """`model.path` as a folder. `pinned`: the config of the run that is resumed, whose revision is used again."""
    model = cfg.model
    if cfg.resume_from_checkpoint and model.revision is None and pinned.exists():
        before = read_tree(pinned).get("model", {})
        if before.get("path") == model.path:
            model = replace(model, revision=before.get("revision"))
    return replace(cfg, model=fetched(model))


def _portable(cfg: RunConfig) -> RunConfig:
    """The config with a hub model by name and commit."""
    return replace(cfg, model=named(cfg.model))


@contextmanager
def _held(folder: Path, stop: Stop, *, resumes: bool) -> Iterator[RunFolder | None]:
    """The run's folder, held by rank 0; None on other ranks."""
    if World.from_environment().rank > 0:
        yield None
        return
    with held(folder, resumes=resumes) as claim:
        stop.at_end(claim.leave)
        stop.at_end(lambda: shutil.rmtree(folder / ROLLOUT_BASE, ignore_errors=True))
        if stop.leftovers is not None:
            stop.leftovers.delete(folder / ROLLOUT_BASE)
        yield claim


@contextmanager
def _undone_unless_trained(claim: RunFolder | None, state: RunState) -> Iterator[None]:
    """A new run that a mistake of its user ends before the first step leaves no folder, and an earlier one in place."""
    try:
        yield
    except (ConfigError, ComponentError):
        if claim is not None and state.step == 0:
            claim.undo()
        raise


def _uploads(cfg: RunConfig, folder: Path, *, must_connect: bool) -> Uploads | None:
    """What uploads policies to the hub; None if the config does not ask for it.

    Raises ConfigError if the hub gives no access and the run `must_connect` before it trains; else it is asked again.
    """
    if not cfg.push_to_hub:
        return None
    uploads = Uploads(cfg, folder, lambda: HubRepo(uploads.name, private=cfg.hub_private_repo))
    try:
        uploads.connect()
    except ConfigError as error:
        if must_connect:
            raise
        _log.warning("%s", error)
    return uploads


def _check_inputs(cfg: RunConfig, folder: Path) -> None:
    """Raises ConfigError if a new run would rename, with its folder, a folder that it starts from."""
    for key, path in (("model.path", cfg.model.path), ("model.adapter_path", cfg.model.adapter_path)):
        if path and Path(path).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{key}={path} is in output_dir={folder}, which a new run renames; move one of them.")


def _check_identity(checkpoint: Path, state: RunState, run_id: str | None) -> None:
    """Raises ConfigError if a checkpoint is of another run than its folder. Either may have no id, from before there
    were any; the state then has the other's."""
    if state.run_id and run_id and state.run_id != run_id:
        raise ConfigError(
            f"checkpoint {checkpoint} is of run {state.run_id}, but {CONFIG} beside it is of run {run_id}. Move one of "
            "them to another folder."
        )
    state.run_id = state.run_id or run_id or ""


def _open(cfg: RunConfig, folder: RunFolder, state: RunState, *, resumes: bool) -> MetricLog:
    """Write the config and open the log. Unless the run is resumed, an earlier run in the folder is renamed."""
    if not resumes:
        folder.start_over()
    write_config(folder.path, _portable(cfg), state.run_id)
    console = Console()
    for line in banner(cfg, step=state.step):
        console.print(Text(line), soft_wrap=True)
    return MetricLog(_portable(cfg), folder.path, first_step=state.step, run_id=state.run_id)


def _report(finished: Run, outcome: Outcome) -> None:
    curve = finished.folder / "reward_curve.png"
    reward_curve(finished.folder / "metrics.jsonl", curve)
    print_summary(
        name=finished.cfg.name,
        outcome=_ending(finished, outcome),
        before=outcome.before,
        before_step=outcome.before_step,
        after=outcome.after,
        after_step=outcome.after_step,
        num_steps=finished.state.step,
        seconds=outcome.seconds,
        result=finished.result_folder,
        best=finished.best_folder if finished.best_folder.is_dir() else None,
        curve=curve,
        bytes_per_sync=outcome.bytes_per_sync,
    )


def _ending(finished: Run, outcome: Outcome) -> str:
    """How the run ended before its last step, or that no step trained anything, as a clause; empty otherwise."""
    of = f"after step {finished.state.step} of {finished.cfg.num_steps}"
    if outcome.end == "stopped" and finished.state.step < finished.cfg.num_steps:
        return f"stopped {of}; resume_from_checkpoint=true continues"
    if outcome.end == "early":
        assert finished.cfg.eval is not None
        return f"ended {of}: held-out reward did not rise in {finished.cfg.eval.early_stop} evaluations"
    if outcome.end == "idle":
        return f"ended {of}: nothing to train"
    return "trained nothing: in no group did rewards differ" if outcome.all_idle else ""
