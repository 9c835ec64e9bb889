"""Puts a run together: in this process, or as Ray actors. The one file that knows actors and learner both."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from tora.config import RunConfig
from tora.config_loader import dump_yaml
from tora.errors import ConfigError
from tora.loop import Outcome, train
from tora.metrics import MetricLog
from tora.protocols import Engine, Learner, Rollouts
from tora.report import print_summary, reward_curve
from tora.run_state import Checkpoints, RunState
from tora.tasks.dataset import PromptStream
from tora.tasks.text import load_tokenizer, stop_token_ids
from tora.types import Prompt, Sampling


def run(cfg: RunConfig) -> bool:
    """Train, evaluate, export, report; False when a signal ended it before its last step.

    Errors: ConfigError for what only shows once data and model are opened.
    """
    cfg = with_engine(cfg)
    folder = Path(cfg.output_dir).absolute()
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep)
    resume = checkpoints.newest() if cfg.resume_from_checkpoint else None
    if cfg.resume_from_checkpoint and resume is None:
        raise ConfigError(f"resume_from_checkpoint=true, but {folder / 'checkpoints'} holds no checkpoint")
    prompts = _Prompts(cfg)
    if resume is None:
        _move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(cfg))
    cfg = replace(cfg, output_dir=str(folder))  # a Ray actor may have another working directory
    with (_on_ray if cfg.async_rl else _here)(cfg) as site, _stop_signals() as stop_requested:
        learner = site.learner()
        state = Checkpoints.load(resume, learner) if resume else RunState()
        rollouts = site.rollouts(prompts, state)
        log = MetricLog(cfg, folder, first_step=state.step)
        try:
            outcome = train(cfg, learner, rollouts, log, checkpoints, state, stop_requested)
            learner.export(folder / "adapter")
        finally:
            log.close()
            rollouts.close()
            shutil.rmtree(folder / _ROLLOUT_BASE, ignore_errors=True)
    curve = folder / "reward_curve.png"
    reward_curve(folder / "metrics.jsonl", curve)
    _report(cfg, outcome, state, folder, curve)
    return state.step == cfg.num_steps


def with_engine(cfg: RunConfig) -> RunConfig:
    """`rollout.engine: auto` decided. Errors: ConfigError where what the run needs is not installed."""
    extra = "pip install -e '.[async_rl]', or '.[async_rl_cpu]' without a GPU"
    if cfg.async_rl and find_spec("ray") is None:
        raise ConfigError(f"async_rl=true needs Ray: {extra}.")
    has_vllm = find_spec("vllm") is not None
    if cfg.rollout.engine == "vllm" and not has_vllm:
        raise ConfigError(f"rollout.engine=vllm needs vLLM: {extra}; or set rollout.engine=torch.")
    if cfg.rollout.engine != "auto":
        return cfg
    engine = "vllm" if has_vllm and cfg.model.lora_type != "full" else "torch"
    return replace(cfg, rollout=replace(cfg.rollout, engine=engine))


class _Prompts:
    """Tokenizer, prompt stream and evaluation set of a run."""

    def __init__(self, cfg: RunConfig) -> None:
        from tora.components import instantiate

        model = Path(cfg.model.path)
        self.tokenizer = load_tokenizer(model)
        self.stop_token_ids = stop_token_ids(model, self.tokenizer)
        stream = PromptStream(instantiate(cfg.dataset), self.tokenizer, cfg.max_prompt_tokens, cfg.seed)
        self.at: Callable[[int], Prompt] = stream.prompt
        self.held_out: list[Prompt] = []
        if cfg.eval is not None:
            held_out = PromptStream(instantiate(cfg.eval.dataset), self.tokenizer, cfg.max_prompt_tokens, cfg.seed)
            self.held_out = held_out.sequential(cfg.eval.num_prompts)


def _worker_arguments(cfg: RunConfig, prompts: _Prompts) -> dict[str, Any]:
    """Keyword arguments of `RolloutWorker` that do not depend on where it runs."""
    from tora.tasks.rewarder import build_rewarder

    sampling = Sampling(
        max_tokens=cfg.max_generated_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop_token_ids=prompts.stop_token_ids,
    )
    greedy_or_not = cfg.eval.temperature if cfg.eval else 0.0
    return {
        "make_rewarder": partial(build_rewarder, cfg.rewards),
        "tokenizer": prompts.tokenizer,
        "sampling": sampling,
        "eval_sampling": Sampling(sampling.max_tokens, greedy_or_not, stop_token_ids=sampling.stop_token_ids),
        "group_size": cfg.grpo_samples,
        "seed": cfg.seed,
    }


_ROLLOUT_BASE = "rollout_base"
"""In `output_dir` while the run lasts: a worker that is restarted, or a run that is resumed, needs it again."""


def _rollout_base(cfg: RunConfig) -> str:
    """The folder that vLLM loads its base from: the learner's own weights, unless the config says otherwise."""
    if not cfg.model.quantize_base or cfg.rollout.base == "checkpoint":
        return cfg.model.path
    from learner.model import DTYPES, device_of
    from tora.models.dequantized import dequantized_folder

    cache = Path(cfg.output_dir) / _ROLLOUT_BASE
    return str(dequantized_folder(Path(cfg.model.path), cache, dtype=DTYPES[cfg.dtype], device=device_of(cfg)))


def _make_vllm_engine(cfg: RunConfig) -> Engine:
    from actors.engine import VLLMEngine

    return VLLMEngine(
        _rollout_base(cfg),
        dtype=cfg.rollout.dtype or cfg.dtype,
        max_model_len=cfg.rollout.max_model_len,
        lora_rank=cfg.model.lora_rank,
        lora_targets=cfg.model.lora_targets,
        num_slots=cfg.max_staleness + 1 if cfg.async_rl else 1,
        seed=cfg.seed,
        gpu_memory_utilization=cfg.rollout.gpu_memory_utilization,
        kv_cache_gib=cfg.rollout.kv_cache_gib,
        enforce_eager=cfg.rollout.enforce_eager,
    )


def _make_torch_engine(cfg: RunConfig, learner: Any | None = None) -> Engine:
    """On the learner's own model where it is in this process, else on a copy of it."""
    from learner.model import build_policy, device_of
    from tora.generate import TorchEngine

    device = device_of(cfg)
    model = learner.model if learner is not None else build_policy(cfg, device)
    max_rows = cfg.rollout.concurrency * cfg.grpo_samples
    return TorchEngine(model, device=device, shared=learner is not None, max_rows=max_rows)


class _Here:
    """Everything in this process."""

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg

    def learner(self) -> Learner:
        from learner.learner import Learner as OneRank

        self._learner = OneRank(self._cfg)
        return self._learner

    def rollouts(self, prompts: _Prompts, state: RunState) -> Rollouts:
        from actors.local import LocalRollouts
        from actors.worker import RolloutWorker

        vllm = self._cfg.rollout.engine == "vllm"
        make_engine = partial(_make_vllm_engine, self._cfg) if vllm else self._shared_torch_engine
        worker = RolloutWorker(make_engine, **_worker_arguments(self._cfg, prompts))
        return LocalRollouts(self._cfg, worker, prompts.at, prompts.held_out, state.rollouts)

    def _shared_torch_engine(self) -> Engine:
        return _make_torch_engine(self._cfg, self._learner)


@contextmanager
def _here(cfg: RunConfig) -> Iterator[_Here]:
    yield _Here(cfg)


class _OnRay:
    """One learner rank and the rollout workers, each a Ray actor. All are started before any is waited for."""

    def __init__(self, cfg: RunConfig) -> None:
        import ray

        from learner.learner import Learner as OneRank

        self._cfg = cfg
        self._gpus = _gpus_each(ray.cluster_resources().get("GPU", 0), 1 + cfg.rollout.num_workers)
        self._rank = ray.remote(OneRank).options(num_cpus=1, num_gpus=self._gpus).remote(cfg)
        self._workers: list[Any] = []

    def _start_workers(self, prompts: _Prompts) -> None:
        import ray

        from actors.worker import RolloutWorker

        make = _make_vllm_engine if self._cfg.rollout.engine == "vllm" else _make_torch_engine
        # one thread for each group in flight, one for evaluation, one for snapshots
        options = {"num_cpus": 1, "num_gpus": self._gpus, "max_concurrency": self._cfg.rollout.concurrency + 2}
        remote = ray.remote(RolloutWorker).options(**options)
        arguments = _worker_arguments(self._cfg, prompts)
        self._workers = [
            remote.remote(partial(make, self._cfg), **arguments) for _ in range(self._cfg.rollout.num_workers)
        ]

    def learner(self) -> Learner:
        from learner.group import LearnerGroup

        return LearnerGroup([self._rank])

    def rollouts(self, prompts: _Prompts, state: RunState) -> Rollouts:
        from actors.pool import AsyncRollouts
        from actors.ray_worker import RayWorker

        self._start_workers(prompts)
        handles = [RayWorker(actor) for actor in self._workers]
        return AsyncRollouts(self._cfg, handles, prompts.at, prompts.held_out, state.rollouts, version=state.step)


def _gpus_each(total: float, sharers: int) -> float:
    """A GPU each where there are enough, an equal part where not, none without GPUs."""
    return 1.0 if total >= sharers else total / sharers


_LOCAL_OBJECT_STORE_BYTES = 1 << 30
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray then keeps 127.0.0.1 instead of the network card's address
    "RAY_AUTH_MODE": "disabled",  # a token file would be written to the home folder; nothing listens off loopback
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def _on_ray(cfg: RunConfig) -> Iterator[_OnRay]:
    """Inside a cluster or a submitted job where one is named by RAY_ADDRESS, else a private one on loopback."""
    if "RAY_ADDRESS" in os.environ:
        import ray

        ray.init(log_to_driver=False)
        try:
            yield _OnRay(cfg)
        finally:
            ray.shutdown()
        return
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    scratch = tempfile.mkdtemp(prefix="tora-")  # sockets live here, and their paths must be short
    ray.init(
        num_cpus=max(os.cpu_count() or 1, 1 + cfg.rollout.num_workers),
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=scratch,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield _OnRay(cfg)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run after the present step, with a checkpoint; a second one ends it at once."""
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _move_aside(folder: Path) -> None:
    """An earlier run's folder gets the first free `.1`, `.2`, ...: a run never mixes with another or deletes it."""
    if folder.exists() and any(folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)


def _report(cfg: RunConfig, outcome: Outcome, state: RunState, folder: Path, curve: Path) -> None:
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
