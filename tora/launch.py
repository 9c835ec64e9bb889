"""Puts a run together: in this process, or as Ray actors. The one file that knows actors and learner both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tora.config.load import dump_yaml
from tora.config.rules import check
from tora.config.schema import RunConfig
from tora.distributed.process_group import World
from tora.errors import ConfigError
from tora.models.vision.processor import ImageProcessor
from tora.protocols import Engine, Learner, Rollouts
from tora.ray_session import gpus_each, output_folder, place_of, ray_session
from tora.reporting.metrics import MetricLog, NoLog
from tora.reporting.summary import print_summary, reward_curve
from tora.run.canary import NUM_PROBES, Canary
from tora.run.checkpoints import Checkpoints, RunState
from tora.run.loop import Outcome
from tora.run.recovery import train_and_export
from tora.stop import stop_signals
from tora.tasks.prompts import RunPrompts

if TYPE_CHECKING:
    from actors.vllm_engine.weight_updates import WeightUpdate


def run(cfg: RunConfig) -> bool:
    """Train, evaluate, export, report; False when a signal ended it before its last step.

    Under torchrun every rank runs this; rank 0 alone writes and reports. Errors: ConfigError for what only shows once
    data and model are opened.
    """
    cfg = with_engine(cfg)
    folder = output_folder(cfg.output_dir)
    cfg = replace(cfg, output_dir=str(folder))  # a Ray actor may have another working directory
    with (_on_ray if cfg.async_rl else _here)(cfg) as site, stop_signals() as stop_requested:
        world = site.world
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, is_writer=world.rank == 0)
        resume = checkpoints.newest() if cfg.resume_from_checkpoint else None
        if cfg.resume_from_checkpoint and resume is None:
            raise ConfigError(f"resume_from_checkpoint=true, but {folder / 'checkpoints'} holds no checkpoint")
        prompts = RunPrompts(cfg)
        learner = site.learner()
        state = RunState()
        if resume is not None:
            learner.load(resume)
            state = checkpoints.read(resume, prompts.at)
        log = _open(cfg, folder, state, resumes=resume is not None) if world.rank == 0 else NoLog()
        world.any(False)  # nobody writes into the folder before rank 0 has opened it
        rollouts = site.rollouts(prompts, state)
        try:
            outcome = train_and_export(
                cfg,
                site.learner,
                learner,
                rollouts,
                Canary.of(cfg, [prompts.at(i) for i in range(NUM_PROBES)], prompts.image_token),
                log,
                checkpoints,
                state,
                prompts.at,
                lambda: world.any(stop_requested()),
                folder / "adapter",
            )
        finally:
            log.close()
            rollouts.close()
            shutil.rmtree(folder / _ROLLOUT_BASE, ignore_errors=True)
    if world.rank == 0:
        _report(cfg, outcome, state, folder)
    return state.step == cfg.num_steps


def _open(cfg: RunConfig, folder: Path, state: RunState, *, resumes: bool) -> MetricLog:
    """The run's folder; that of an earlier run gets the first free `.1`, `.2`, ... unless it is resumed."""
    if not resumes and folder.exists() and any(folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(cfg))
    return MetricLog(cfg, folder, first_step=state.step)


_INSTALL = "pip install -e '.[async_rl]', or '.[async_rl_cpu]' without a GPU"


def parity(model: str, *, as_json: bool) -> int:
    """See `tora.parity.run`. Errors: ConfigError without vLLM."""
    from tora.parity import run

    if find_spec("vllm") is None:
        raise ConfigError(f"--parity needs vLLM: {_INSTALL}.")
    from learner.learner import Learner

    return run(model, make_engine=_make_vllm_engine, make_learner=Learner, as_json=as_json)


def with_engine(cfg: RunConfig) -> RunConfig:
    """`rollout.engine: auto` decided. Errors: ConfigError where what the run needs is not installed."""
    if cfg.async_rl and find_spec("ray") is None:
        raise ConfigError(f"async_rl=true needs Ray: {_INSTALL}.")
    has_vllm = find_spec("vllm") is not None
    if cfg.rollout.engine == "vllm" and not has_vllm:
        raise ConfigError(f"rollout.engine=vllm needs vLLM: {_INSTALL}; or set rollout.engine=torch.")
    if cfg.rollout.engine != "auto":
        return cfg
    # The torch engine of a synchronous run is the learner itself, and whole weights need not travel.
    servable = cfg.async_rl if cfg.model.lora_type == "full" else cfg.model.train_vision != "full"
    engine = "vllm" if has_vllm and servable else "torch"
    cfg = replace(cfg, rollout=replace(cfg.rollout, engine=engine))
    check(cfg)  # what was asked for may need the other one
    return cfg


def _worker_arguments(cfg: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    """Keyword arguments of `RolloutWorker` that do not depend on where it runs."""
    from tora.rewards.processes import RewardProcesses

    return {
        "make_rewarder": partial(
            RewardProcesses, cfg.rewards, timeout_s=cfg.reward_timeout_s, num_processes=cfg.reward_processes
        ),
        "tokenizer": prompts.tokenizer,
        "sampling": prompts.sampling,
        "eval_sampling": prompts.eval_sampling,
        "group_size": cfg.grpo_samples,
        "seed": cfg.seed,
        "part_tokens": cfg.rollout.partial,
    }


_ROLLOUT_BASE = "rollout_base"
"""In `output_dir` while the run lasts, on every machine where that is another folder."""


def _rollout_base(cfg: RunConfig, uses: ExitStack) -> str:
    """The folder that vLLM loads its base from: the learner's own weights, unless the config says otherwise.

    It may be deleted once `uses` is closed.
    """
    if not cfg.model.quantize_base or cfg.rollout.base == "checkpoint":
        return cfg.model.path
    from learner.policy import DTYPES, device_of
    from tora.distributed.process_group import World
    from tora.models.dequantized import dequantized_folder, in_use

    cache, device = Path(cfg.output_dir) / _ROLLOUT_BASE, device_of(cfg, World.from_environment().local_rank)
    uses.enter_context(in_use(cache))
    return str(dequantized_folder(Path(cfg.model.path), cache, dtype=DTYPES[cfg.dtype], device=device))


def _make_vllm_engine(cfg: RunConfig) -> Engine:
    from actors.vllm_engine.engine import VLLMEngine

    uses = ExitStack()
    return VLLMEngine(
        _rollout_base(cfg, uses),
        uses=uses,
        dtype=cfg.rollout.dtype or cfg.dtype,
        max_model_len=cfg.rollout.max_model_len,
        lora_rank=cfg.model.lora_rank,
        lora_targets=cfg.model.lora_targets,
        adapt_vision=cfg.model.train_vision == "lora",
        max_pixels=cfg.rollout.max_pixels,
        update=_weight_update(cfg),
        seed=cfg.seed,
        gpu_memory_utilization=cfg.rollout.gpu_memory_utilization,
        kv_cache_gib=cfg.rollout.kv_cache_gib,
        enforce_eager=cfg.rollout.enforce_eager,
        tensor_parallel=cfg.rollout.tensor_parallel,
    )


def _weight_update(cfg: RunConfig) -> WeightUpdate:
    from actors.vllm_engine.weight_updates import BetweenRollouts, InFlight, WholeWeights

    if cfg.model.lora_type == "full":
        return WholeWeights()
    if cfg.rollout.update == "in_flight":
        return InFlight(recompute_kv=cfg.rollout.recompute_kv)
    return BetweenRollouts(cfg.max_staleness + 1 if cfg.async_rl else 1)


def _make_torch_engine(cfg: RunConfig) -> Engine:
    """On a copy of the learner's model."""
    from actors.torch_engine.engine import TorchEngine
    from learner.compile import compile_layers
    from learner.policy import build_policy, device_of

    device = device_of(cfg)
    model = build_policy(cfg, device)
    if cfg.compile:
        compile_layers(model)
    return TorchEngine(
        model,
        device=device,
        shared=False,
        max_rows=_max_rows(cfg),
        cuda_graphs=_cuda_graphs(cfg, device),
        processor=_image_processor(cfg),
    )


def _image_processor(cfg: RunConfig) -> Callable[[], ImageProcessor]:
    return partial(ImageProcessor, Path(cfg.model.path), cfg.rollout.max_pixels)


def _cuda_graphs(cfg: RunConfig, device: Any) -> bool:
    return device.type == "cuda" and not cfg.rollout.enforce_eager


def _max_rows(cfg: RunConfig) -> int:
    return cfg.rollout.concurrency * cfg.grpo_samples


class _Here:
    """Everything in this process; under torchrun, in each rank's."""

    def __init__(self, cfg: RunConfig) -> None:
        from tora.distributed.process_group import World

        world = World.from_environment()
        self._cfg, self.world = cfg, world

    def learner(self) -> Learner:
        from learner.learner import Learner as Rank

        self._learner = Rank(self._cfg, also_samples=self._cfg.rollout.engine == "torch")
        return self._learner

    def rollouts(self, prompts: RunPrompts, state: RunState) -> Rollouts:
        from actors.local import LocalRollouts
        from actors.worker import RolloutWorker

        vllm = self._cfg.rollout.engine == "vllm"
        make_engine = partial(_make_vllm_engine, self._cfg) if vllm else self._shared_torch_engine
        worker = RolloutWorker(make_engine, **_worker_arguments(self._cfg, prompts))
        return LocalRollouts(self._cfg, worker, prompts.at, prompts.held_out, state.rollouts, self.world)

    def _shared_torch_engine(self) -> Engine:
        """On the learner's own model."""
        from actors.torch_engine.engine import TorchEngine
        from learner.fsdp import unsharded

        return TorchEngine(
            self._learner.model,
            device=self._learner.device,
            shared=True,
            max_rows=_max_rows(self._cfg),
            while_generating=partial(
                unsharded, self._learner.model, reshard_after_forward=self._cfg.fsdp_reshard_after_forward
            ),
            cuda_graphs=_cuda_graphs(self._cfg, self._learner.device) and self._learner.world.size == 1,
            processor=_image_processor(self._cfg),
        )


@contextmanager
def _here(cfg: RunConfig) -> Iterator[_Here]:
    from tora.distributed.process_group import leave

    try:
        yield _Here(cfg)
    finally:
        leave()


class _OnRay:
    """The learner's ranks and the rollout workers, each a Ray actor. All are started before any is waited for."""

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg, self.world = cfg, World()
        self._gpus = gpus_each(_num_devices(cfg), cfg.device)
        if cfg.rollout.tensor_parallel > 1 and 0 < self._gpus < 1:
            raise ConfigError(
                f"rollout.tensor_parallel={cfg.rollout.tensor_parallel} needs whole GPUs: with rollout.num_workers="
                f"{cfg.rollout.num_workers} and learner_ranks={cfg.learner_ranks} they are {_num_devices(cfg)}, and "
                "the cluster has fewer."
            )

    def learner(self) -> Learner:
        from learner.ray_ranks import LearnerGroup

        return LearnerGroup(self._cfg, self._gpus, place_of("learner"))

    def rollouts(self, prompts: RunPrompts, state: RunState) -> Rollouts:
        from actors.pool import AsyncRollouts
        from actors.ray_worker import RayWorker

        make = _make_vllm_engine if self._cfg.rollout.engine == "vllm" else _make_torch_engine
        arguments = {"make_engine": partial(make, self._cfg), **_worker_arguments(self._cfg, prompts)}
        options = {
            "num_cpus": self._cfg.rollout.tensor_parallel,
            "num_gpus": self._gpus * self._cfg.rollout.tensor_parallel,
            "resources": place_of("rollout"),
            "scheduling_strategy": "SPREAD",
            # a thread for each group in flight, and one each for evaluation, scores, snapshots and the heartbeat
            "max_concurrency": self._cfg.rollout.concurrency + 4,
        }
        make_worker = partial(RayWorker, arguments, **options)
        return AsyncRollouts(self._cfg, make_worker, prompts.at, prompts.held_out, state.rollouts, version=state.step)


def _num_devices(cfg: RunConfig) -> int:
    """GPUs that the run wants, and CPUs."""
    return cfg.learner_ranks + cfg.rollout.num_workers * cfg.rollout.tensor_parallel


@contextmanager
def _on_ray(cfg: RunConfig) -> Iterator[_OnRay]:
    with ray_session(_num_devices(cfg), big_objects=cfg.model.lora_type == "full"):
        yield _OnRay(cfg)


def _report(cfg: RunConfig, outcome: Outcome, state: RunState, folder: Path) -> None:
    curve = folder / "reward_curve.png"
    reward_curve(folder / "metrics.jsonl", curve)
    print_summary(
        name=cfg.name,
        accuracy_before=outcome.before.accuracy if outcome.before else None,
        accuracy_after=outcome.after.accuracy if outcome.after else None,
        num_steps=state.step,
        seconds=outcome.seconds,
        adapter=folder / "adapter",
        curve=curve,
        bytes_per_sync=outcome.bytes_per_sync,
    )
