"""How Tora sets vLLM 0.32 up, speaks to it and ends it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from actors.vllm_images import image_args, vision_linears
from tora.types import Completion, EngineLoad, PolicySnapshot, SampleRequest

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

_REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine lives in this process; else vLLM on a CPU starts one process for the engine and one for the worker."""
_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's own choice pins every engine to the same cores
}
_MIN_TEMPERATURE = 0.01
"""vLLM raises a lower one to this without a word, and the learner would score under another distribution."""


class Environment:
    """What vLLM needs in `os.environ`, and the way back from what it leaves there.

    On its way up vLLM sets LD_PRELOAD, LOCAL_WORLD_SIZE and more for children that an engine in this process never
    has; the learner's torchrun contract and later subprocesses would read them. Its own variables it reads again while
    it runs.
    """

    def __init__(self) -> None:
        self._before = dict(os.environ)

    def prepare(self) -> None:
        """Call before vllm is imported."""
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        os.environ.update(_REQUIRED)

    def restore_others(self) -> None:
        """All but VLLM_*, once vLLM is up."""
        self._restore({name for name in self._before.keys() | os.environ.keys() if not name.startswith("VLLM_")})

    def restore_own(self) -> None:
        """VLLM_*, once it has ended."""
        self._restore({name for name in self._before.keys() | os.environ.keys() if name.startswith("VLLM_")})

    def _restore(self, names: set[str]) -> None:
        for name in names:
            if name in self._before:
                os.environ[name] = self._before[name]
            else:
                del os.environ[name]


def engine_rank(rank: int) -> int:
    """The smallest LoRA rank of vLLM's that holds `rank`. Errors: ValueError above the largest."""
    from vllm.config.lora import MaxLoRARanks

    allowed = get_args(MaxLoRARanks)
    if not 0 < rank <= allowed[-1]:
        raise ValueError(f"lora_rank {rank} is outside of what vLLM can serve, 1 to {allowed[-1]}")
    return next(r for r in allowed if r >= rank)


def engine_args(
    model_path: str,
    *,
    dtype: Literal["bf16", "fp32"],
    max_model_len: int | None,
    lora_rank: int,
    lora_targets: Sequence[str],
    adapt_vision: bool,
    max_pixels: int | None,
    num_slots: int,
    async_scheduling: bool | None,
    seed: int,
    gpu_memory_utilization: float,
    kv_cache_gib: float,
    enforce_eager: bool,
    tensor_parallel: int,
) -> EngineArgs:
    """Errors: ValueError for an impossible argument."""
    if not Path(model_path, "config.json").is_file():
        raise ValueError(f"{model_path} is not a Hugging Face model folder: it has no config.json")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    device: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization, "enforce_eager": enforce_eager}
    if current_platform.is_cpu():
        # 32 is the smallest block its kernels take: prefixes are shared in whole blocks. vLLM 0.32 rewinds a seeded
        # request's generator after each chunk of a prompt, which torch's CPU generators cannot do: no chunks.
        device = {
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "block_size": 32,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
        }
    adapters: dict[str, Any] = {}
    if num_slots > 0:
        adapters = {
            "enable_lora": True,
            "max_lora_rank": engine_rank(lora_rank),
            "max_loras": num_slots,
            "max_cpu_loras": num_slots,
            # Named, because by default vLLM wraps the head too, whose LoRA layer costs a product with the vocabulary.
            "lora_target_modules": [*lora_targets, *(vision_linears(model_path) if adapt_vision else ())],
        }
    return EngineArgs(
        model=model_path,
        dtype="float32" if dtype == "fp32" else "bfloat16",
        max_model_len=max_model_len,  # pyright: ignore[reportArgumentType]  None is vLLM's default
        seed=seed,
        tensor_parallel_size=tensor_parallel,
        # Named: in a placement group vLLM would choose Ray, which wants a bundle for each of its ranks.
        distributed_executor_backend="mp" if tensor_parallel > 1 else "uni",
        async_scheduling=async_scheduling,
        worker_extension_cls="actors.vllm_extension.SnapshotExtension",
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        # vLLM's cache of compiled code is keyed by its configuration: without a difference, code that stock vLLM left
        # there would be taken, and drop the gains.
        additional_config={"tora_gain_layers": 1},
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **adapters,
        **image_args(model_path, max_pixels=max_pixels, adapt_vision=adapt_vision),
        **device,
    )


def build(args: EngineArgs) -> LLMEngine:
    """All of vLLM in this process. Errors: ValueError for arguments that vLLM refuses; anything else is a failure."""
    import pydantic
    from vllm.model_executor.models import registry
    from vllm.v1.engine.llm_engine import LLMEngine

    # vLLM 0.32 looks at the model's class in a new Python, to keep CUDA out of a process that will fork. This one will
    # not; the other Python would lack the import fixes of `tora.compat`, and takes seconds.
    registry._run_in_subprocess = lambda inspect: inspect()
    try:
        with _children_import_tora():
            return LLMEngine.from_engine_args(args)
    except pydantic.ValidationError as error:  # a ValueError of many lines
        raise ValueError("; ".join(e["msg"] for e in error.errors())) from error


def engine_load(llm: LLMEngine) -> EngineLoad:
    """Of an engine in this process. Reads what the engine's thread writes, and takes an answer that is a step old."""
    scheduler = llm.engine_core.engine_core.scheduler  # pyright: ignore[reportAttributeAccessIssue]
    requests = list(scheduler.requests.values())
    return EngineLoad(scheduler.kv_cache_manager.usage, sum(request.num_preemptions for request in requests))


@contextmanager
def _children_import_tora() -> Iterator[None]:
    """For vLLM's tensor-parallel ranks. A process that is spawned imports its parent's main module before anything
    else, which here may be anybody's: it gets ours instead."""
    prepare = spawn.get_preparation_data

    def prepare_with_tora(name: str) -> dict[str, Any]:
        data = prepare(name)
        data.pop("init_main_from_path", None)
        return {**data, "init_main_from_name": "actors.vllm_child"}

    setattr(spawn, "get_preparation_data", prepare_with_tora)  # noqa: B010
    try:
        yield
    finally:
        setattr(spawn, "get_preparation_data", prepare)  # noqa: B010


def meeting_point(llm: LLMEngine) -> str:
    """See `SnapshotExtension`."""
    return llm.collective_rpc("meeting_point")[0]


def shut_down(llm: LLMEngine, owns_group: bool, meeting_point: str) -> None:
    """Leaves no file behind.

    `owns_group`: vLLM made this process's default process group; one that it found is the learner's and stays.
    """
    from vllm.v1.engine import core

    clean_up = getattr(core, "cleanup_dist_env_and_memory")  # noqa: B009  (pyright: it is vLLM's import)
    if not owns_group:
        # vLLM 0.32 ends by destroying the default group, whoever made it.
        setattr(core, "cleanup_dist_env_and_memory", _free_own_groups)  # noqa: B010
    try:
        llm.engine_core.shutdown()
    finally:
        setattr(core, "cleanup_dist_env_and_memory", clean_up)  # noqa: B010
        _remove_meeting_point(meeting_point)


def _remove_meeting_point(address: str) -> None:
    """vLLM 0.32 leaves the file that its processes met by, and on a CPU the memory that several of them shared."""
    if not address.startswith("file://"):
        return
    file = Path(address.removeprefix("file://"))
    for path in (file, *Path("/dev/shm").glob(f"{file.name}-*")):
        path.unlink(missing_ok=True)


def _free_own_groups() -> None:
    import torch.distributed
    from vllm.distributed.parallel_state import destroy_model_parallel

    if torch.distributed.is_initialized():  # the learner may have ended first
        destroy_model_parallel()


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy version in an adapter slot, or in slot 0, the weights themselves."""

    version: int
    slot: int
    lora: LoRARequest | None
    """None for whole weights."""
    sha256: str
    """The sender's."""


def loaded_policy(slot: int, snapshot: PolicySnapshot) -> LoadedPolicy:
    """vLLM's prefix and encoder caches are keyed by the adapter's name: by version, and by content too, because a run
    that resumed from a checkpoint comes to a version number for the second time."""
    from vllm.lora.request import LoRARequest

    name = f"policy@{snapshot.version}:{snapshot.sha256[:16]}"
    lora = LoRARequest(name, slot, f"mem://{snapshot.version}") if slot else None
    return LoadedPolicy(snapshot.version, slot, lora, snapshot.sha256)


def sampling_params(request: SampleRequest) -> SamplingParams:
    """Errors: ValueError for what vLLM cannot sample."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    if 0 < sampling.temperature < _MIN_TEMPERATURE:
        raise ValueError(f"temperature {sampling.temperature} is below vLLM's least, {_MIN_TEMPERATURE}; 0 is greedy")
    try:
        return SamplingParams(
            n=1 if sampling.temperature == 0 else request.num_samples,
            seed=_spread(request.seed),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # stop tokens are those of the request, none of the model's
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except VLLMClientError as error:
        raise ValueError(str(error)) from error


def _spread(seed: int) -> int:
    """vLLM gives sample i the seed `seed + i`: neighbouring seeds would share samples."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:6])


def scoring_params() -> SamplingParams:
    """For log-probs of the prompt's own tokens; vLLM reports them untempered whatever it samples with."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,  # of the prompt's tokens alone; vLLM then takes nothing from the prefix cache
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion(output: Any, versions_L: np.ndarray) -> Completion:
    """From vLLM's `CompletionOutput` of a finished request."""
    token_ids = np.asarray(output.token_ids, dtype=np.int64)
    logprobs = np.asarray(output.logprobs.logprobs, dtype=np.float32)
    assert output.finish_reason in ("stop", "length"), f"vLLM ended a request with {output.finish_reason!r}"
    assert logprobs.shape == token_ids.shape, "vLLM returned other log-probs than the sampled tokens'"
    assert versions_L.shape == token_ids.shape, "vLLM returned versions of other tokens than it sampled"
    return Completion(token_ids, logprobs, versions_L, output.finish_reason == "stop")


def completion_logprobs(output: Any, length: int) -> np.ndarray:
    """[length] float32: of the last tokens of the prompt, from vLLM's `RequestOutput` to `scoring_params`."""
    flat = output.prompt_logprobs
    return np.asarray([flat.logprobs[i] for i in flat.start_indices[-length:]], dtype=np.float32)
