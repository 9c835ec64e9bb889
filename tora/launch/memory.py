"""The memory plan of a run: what its config, its model and its devices say, for `tora.plan`."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tora.adapters.peft_config import PeftConfig, read_peft_config
from tora.config.schema import RunConfig
from tora.distributed.device import device_for, machine_memory
from tora.distributed.process_group import World
from tora.errors import ConfigError, first_line
from tora.launch.engines import GPU_MEMORY, MIN_SEQS, max_rows, shares_base, sleeps
from tora.models.load import implementation_of, read_config
from tora.models.released import shape_config, shape_of_folder
from tora.plan.activations import MicroBatch
from tora.plan.advice import advice
from tora.plan.engine import AWAKE, EngineLimits, EngineMemory, torch_memory, vllm_memory
from tora.plan.learner import LearnerMemory, learner_memory
from tora.plan.places import CUDA, FRAGMENTS, Place, RunPlan
from tora.plan.shapes import Shapes, read_shapes
from tora.plan.training import Training, itemsize, training_of
from tora.plan.transformers_shapes import TransformersShapes, layer_bytes, read_transformers_shapes

_BESIDE, _IN_TURN = 0.5, 0.75
"""The engine's share of a GPU that the learner uses too, in one process: in general, and with weights that are also the
learner's and a cache that it gives back while the learner steps."""
SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of vLLM's adapter slots."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Devices:
    """What the run has."""

    on_gpu: bool
    capacity: int | None
    """Bytes of one GPU, or of the machine; None if it is not known."""
    gpus: int | None = None
    """How many; None for as many as the run asks for."""


def plan_run(cfg: RunConfig, shapes: Shapes, devices: Devices, start: PeftConfig | None = None) -> RunPlan:
    """`start`: the config of the PEFT folder that the run starts from. `rollout.engine` must be resolved."""
    training = training_of(cfg, shapes, start)
    batch = _micro_batch(cfg, shapes, devices)
    if isinstance(shapes, TransformersShapes):
        counted = layer_bytes(cfg, shapes, start, tokens=batch.tokens, longest=batch.longest, on_gpu=devices.on_gpu)
        batch = replace(batch, counted=counted)
    learner = learner_memory(
        training,
        batch,
        ranks=cfg.learner_ranks,
        cpu_offload=cfg.fsdp_cpu_offload,
        reshard=cfg.fsdp_reshard_after_forward,
    )
    limits = _limits(cfg, shapes, start)
    if not devices.on_gpu:
        return _on_cpu(cfg, training, learner, limits, devices)
    if not cfg.async_rl:
        engine = _engine(cfg, training, limits, devices, sync_share(cfg, on_gpu=True))
        places = [_together(cfg, "GPU", learner, engine, devices, processes=1)]
        return RunPlan(places, engine.rollouts, limits.rows, limits.longest)
    on_each = math.ceil(num_devices(cfg) / devices.gpus) if devices.gpus else 1
    engine = _engine(cfg, training, limits, devices, 1 / on_each)
    if on_each == 1:
        places = [
            Place("learner's GPU", _parts(learner) + _reserve(learner.peak), devices.capacity, True),
            Place("engine's GPU", _engine_parts(engine) + _reserve(0), devices.capacity, True),
        ]
    else:
        places = [_together(cfg, "GPU", learner, engine, devices, processes=on_each)]
    return RunPlan(places, engine.rollouts, limits.rows, limits.longest)


def num_devices(cfg: RunConfig) -> int:
    """GPUs, or CPUs without any, that an asynchronous run's actors need."""
    return cfg.learner_ranks + num_engine_devices(cfg)


def num_engine_devices(cfg: RunConfig) -> int:
    of_evaluations = cfg.eval.num_workers if cfg.eval is not None else 0
    return (cfg.rollout.num_workers + (of_evaluations or 0)) * cfg.rollout.tensor_parallel


def sync_share(cfg: RunConfig, *, on_gpu: bool) -> float:
    """The engine's share of the GPU of a synchronous run, 0 to 1. `rollout.engine` must be resolved."""
    return _IN_TURN if sleeps(cfg, on_gpu=on_gpu) and shares_base(cfg, on_gpu=on_gpu) else _BESIDE


def check_memory(cfg: RunConfig, devices: Devices) -> RunPlan | None:
    """The plan of a run that is about to start; None for a model that transformers' code runs with a trained tower.

    Raises ConfigError, with the settings that would make it fit, if it does not fit on a GPU, or if its weights alone
    exceed the machine's memory. On a CPU anything else that does not fit is a warning, since what the system keeps
    free changes and memory can be swapped out; so it is for a model that transformers' code runs, whose plan has not
    been measured on a GPU.
    """
    config, start = _model_config(cfg), _start(cfg)
    if (shapes := _shapes(cfg, config)) is None:
        return None
    plan = plan_run(cfg, shapes, devices, start)
    if plan.fits:
        return plan
    sentence = f"{plan.why_not()}. {remedy(cfg, shapes, devices, start)}"
    is_sure = devices.on_gpu and not isinstance(shapes, TransformersShapes)
    if cfg.memory_plan == "refuse" and (is_sure or (not devices.on_gpu and _is_hopeless(plan))):
        raise ConfigError(f"{sentence} memory_plan=warn starts it all the same.")
    _log.warning("%s", sentence)
    return plan


def plan_or_none(cfg: RunConfig, devices: Devices) -> RunPlan | None:
    """`plan_run` of a config's own model; None for one that transformers' code runs with a trained tower."""
    shapes = _shapes(cfg, _model_config(cfg))
    return None if shapes is None else plan_run(cfg, shapes, devices, _start(cfg))


def snapshot_bytes(cfg: RunConfig) -> int | None:
    """Of the trained weights in float32, which a sync sends; None for a tower of transformers that is trained."""
    shapes = _shapes(cfg, _model_config(cfg))
    return None if shapes is None else training_of(cfg, shapes, _start(cfg)).gradient_bytes


def _shapes(cfg: RunConfig, config: Any) -> Shapes | None:
    if implementation_of(config, cfg.model.implementation) == "native":
        return read_shapes(config)
    if hasattr(config, "vision_config") and cfg.model.train_vision != "none":
        return None
    return read_transformers_shapes(config)


def remedy(cfg: RunConfig, shapes: Shapes, devices: Devices, start: PeftConfig | None = None) -> str:
    """A sentence with settings that would make the run fit."""
    ways = advice(cfg, lambda other: plan_run(other, shapes, devices, start).fits, on_gpu=devices.on_gpu)
    if not ways:
        return "No setting that leaves the model as it is would make it fit."
    return f"It would fit with {'; or with '.join(ways)}."


def here(cfg: RunConfig) -> Devices:
    """This machine's devices, for a run in this process or in this machine's ranks."""
    device = device_for(cfg.device, World.from_environment().local_rank)
    return Devices(device.type == "cuda", machine_memory(device))


def model_shapes(cfg: RunConfig) -> Shapes:
    """Of the model's folder. If there is none: those of the released model that the path ends in, or of the hub's
    config.json. Raises ConfigError if neither is known, or for a trained tower that transformers' code runs."""
    config = _model_config(cfg)
    if (shapes := _shapes(cfg, config)) is None:
        raise ConfigError(
            f"tora plan does not know what a trained vision tower of model_type {config.model_type} keeps: plan with "
            "model.train_vision=none"
        )
    return shapes


def _model_config(cfg: RunConfig) -> Any:
    path = Path(cfg.model.path)
    if path.is_dir():
        return read_config(path)
    if (known := shape_of_folder(path.name)) is not None:
        return shape_config(known)
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(cfg.model.path, "config.json", revision=cfg.model.revision)
    except (OSError, ValueError, RuntimeError) as error:  # no such model, no access, no network
        raise ConfigError(
            f"model.path={cfg.model.path} is no folder and no model that Tora knows the shapes of, and the hub gives "
            f"no config.json of it: {first_line(error)}"
        ) from error
    return read_config(Path(file).parent)


def _start(cfg: RunConfig) -> PeftConfig | None:
    path = cfg.model.adapter_path
    return read_peft_config(Path(path)) if path and Path(path).is_dir() else None


def _micro_batch(cfg: RunConfig, shapes: Shapes, devices: Devices) -> MicroBatch:
    """The largest that the config allows."""
    longest = cfg.max_prompt_tokens + cfg.max_generated_tokens
    groups = math.ceil(cfg.batch_size / cfg.num_mini_batches)
    tokens = max(longest, min(cfg.micro_batch_tokens, groups * cfg.grpo_samples * longest))
    return MicroBatch(
        tokens=tokens,
        responses=tokens,
        patches=_patches(cfg, shapes, tokens, groups),
        longest=longest,
        on_gpu=devices.on_gpu,
        checkpointing=cfg.activation_checkpointing,
        offloading=cfg.activation_offloading,
    )


def _patches(cfg: RunConfig, shapes: Shapes, tokens: int, groups: int) -> int:
    """Of a micro-batch with one image a prompt, as large as `max_pixels` and the prompt's limit allow."""
    tower = shapes.tower
    if tower is None:
        return 0
    features = cfg.max_prompt_tokens
    if cfg.rollout.max_pixels is not None:
        features = min(features, max(1, cfg.rollout.max_pixels // (tower.patch * tower.merge) ** 2))
    images = min(groups, max(1, tokens // features))
    return images * features * tower.merge**2


def _limits(cfg: RunConfig, shapes: Shapes, start: PeftConfig | None) -> EngineLimits:
    rollout, full = cfg.rollout, cfg.model.lora_type == "full"
    rank = max(cfg.model.lora_rank, start.max_rank if start else 0)
    vllm = rollout.engine == "vllm"
    needed = cfg.max_prompt_tokens + cfg.max_generated_tokens
    own = shapes.longest if vllm and shapes.tower else min(needed, shapes.longest)
    return EngineLimits(
        kind=rollout.engine,
        itemsize=itemsize(rollout.dtype or cfg.dtype) if vllm else itemsize(cfg.dtype),
        rows=max(max_rows(cfg), MIN_SEQS) if vllm else max_rows(cfg),
        longest=(rollout.max_model_len or own) if vllm else needed,
        slots=0 if full else _slots(cfg),
        rank=next((each for each in SLOT_RANKS if each >= rank), rank),
        cache_bytes=round(rollout.kv_cache_gib * (1 << 30)),
        graphs=not rollout.enforce_eager,
        tensor_parallel=rollout.tensor_parallel,
    )


def _slots(cfg: RunConfig) -> int:
    """As `tora.launch.engines` asks for: one, or one for each version in flight."""
    return cfg.max_staleness + 1 if cfg.async_rl and cfg.rollout.update != "in_flight" else 1


def _engine(cfg: RunConfig, training: Training, limits: EngineLimits, devices: Devices, share: float) -> EngineMemory:
    if limits.kind == "torch":
        return torch_memory(training, limits, shares=not cfg.async_rl)
    if devices.capacity is None:
        # a cache for all rollouts, as it is not known what vLLM's share is
        needed = vllm_memory(training, limits, 0).held.total()
        each = training.shapes.kv_per_sequence(limits.longest, limits.itemsize, limits.tensor_parallel)
        return vllm_memory(training, limits, needed + limits.rows * each)
    utilization = cfg.rollout.gpu_memory_utilization or GPU_MEMORY * share
    return vllm_memory(training, limits, int(utilization * devices.capacity))


def _together(
    cfg: RunConfig, title: str, learner: LearnerMemory, engine: EngineMemory, devices: Devices, *, processes: int
) -> Place:
    """Learner and engines on one GPU. In one process they share frozen weights where they can, and a step and a
    generation take turns, unless vLLM is kept awake."""
    if shares_base(cfg, on_gpu=True):
        once = min(learner.held["base weights"], engine.held["engine weights"])
        learner = replace(learner, held=learner.held - Counter({"base weights": once}))
    if cfg.rollout.engine == "torch" and not cfg.async_rl:
        parts = _taking_turns(learner, engine)
    elif sleeps(cfg, on_gpu=True):
        parts = _taking_turns(learner, engine, AWAKE)
    else:
        engines = max(1, processes - 1)
        parts = _parts(learner) + Counter({name: size * engines for name, size in _engine_parts(engine).items()})
    return Place(title, parts + _reserve(learner.peak, processes), devices.capacity, True)


def _on_cpu(
    cfg: RunConfig, training: Training, learner: LearnerMemory, limits: EngineLimits, devices: Devices
) -> RunPlan:
    workers = num_engine_devices(cfg) if cfg.async_rl else 1
    if limits.kind == "torch":
        engine = torch_memory(training, limits, shares=not cfg.async_rl)
    else:
        engine = vllm_memory(training, limits, None)
    if limits.kind == "torch" and not cfg.async_rl:
        parts = _taking_turns(learner, engine)
    else:
        parts = _parts(learner, cfg.learner_ranks)
        parts += Counter({name: size * workers for name, size in _engine_parts(engine).items()})
    return RunPlan([Place("machine", parts, devices.capacity, False)], engine.rollouts, limits.rows, limits.longest)


def _parts(learner: LearnerMemory, ranks: int = 1) -> Counter[str]:
    """The learner's peak by part."""
    parts = Counter(learner.held)
    parts["gradients"] = learner.gradients
    at_work = learner.activations.total() + learner.passing
    if learner.updating > at_work:
        parts["optimizer step"] = learner.updating
    else:
        parts += Counter({f"activations: {name}": size for name, size in learner.activations.items()})
        parts["activations: in passing"] = learner.passing
    return Counter({name: size * ranks for name, size in parts.items() if size})


def _engine_parts(engine: EngineMemory) -> Counter[str]:
    return Counter({name: size for name, size in engine.held.items() if size}) + Counter(
        {"key-value cache": max(0, engine.cache)}
    )


def _taking_turns(learner: LearnerMemory, engine: EngineMemory, kept: Collection[str] = ()) -> Counter[str]:
    """The larger of a training step and a generation, and what lasts. `kept`: parts of the engine that do."""
    lasting = Counter({name: size for name, size in engine.held.items() if size and name in kept})
    if learner.peak - learner.held.total() + lasting.total() >= engine.total:
        return _parts(learner) + lasting
    return Counter({name: size for name, size in learner.held.items() if size}) + _engine_parts(engine)


def _reserve(step: int, processes: int = 1) -> Counter[str]:
    return Counter({"CUDA and fragments": CUDA * processes + round(FRAGMENTS * step)})


def _is_hopeless(plan: RunPlan) -> bool:
    """Whether weights and what they need exceed the machine's memory, whatever the activations take."""
    (place,) = plan.places
    fixed = sum(size for name, size in place.parts.items() if not name.startswith("activations"))
    return place.capacity is not None and fixed > place.capacity


def nominal(gpu_gib: float) -> int:
    """Bytes that a program can use of a card that is sold as `gpu_gib`: an RTX 4090 of 24 GB has 23.6 GiB."""
    return int(gpu_gib * 0.985 * (1 << 30))
