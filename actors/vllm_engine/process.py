"""Start, query and shut down vLLM 0.32 in this process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.vllm_engine import internals
from tora.protocols import Occupancy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

_log = logging.getLogger(__name__)
_REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Run the engine in this process. By default vLLM on a CPU starts one process for the engine and one for the worker."""
_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default every engine is pinned to the same cores
}
_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}
"""Triton's products of float32 are TF32 by default, 10 bits of mantissa. vLLM's attention in float32 is such a kernel:
on an H200 log-probs of the quick-start's base were 0.002 off."""
_WHILE_UP = ("VLLM_", *_FLOAT32)
"""Variables, or their beginnings, that are read while vLLM runs."""


def hush() -> None:
    """Call before vllm is imported. It warns of what it finds, such as a Triton without a CPU backend, before it reads
    VLLM_LOGGING_LEVEL, and touches deprecated names of torch. A user who sets that variable hears it all."""
    if os.environ.get("VLLM_LOGGING_LEVEL", "ERROR") == "ERROR":
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


class Environment:
    """Sets the environment variables that vLLM needs, and undoes the changes that vLLM makes.

    At start-up vLLM sets LD_PRELOAD, LOCAL_WORLD_SIZE and others for child processes that an in-process engine does not
    have. They would disturb the learner's torchrun variables and later subprocesses, so they are restored once vLLM is
    up. Those of `_WHILE_UP` are restored after it has shut down.
    """

    def __init__(self, *, float32: bool) -> None:
        """`float32`: the engine computes in float32."""
        self._before = dict(os.environ)
        self._defaults = {**_DEFAULTS, **(_FLOAT32 if float32 else {})}

    def prepare(self) -> None:
        """Call before vllm is imported."""
        hush()
        for name, value in self._defaults.items():
            os.environ.setdefault(name, value)
        os.environ.update(_REQUIRED)

    def restore_except_vllm(self) -> None:
        """All variables but those of `_WHILE_UP`. Call once vLLM is up."""
        self._restore({name for name in self._before.keys() | os.environ.keys() if not name.startswith(_WHILE_UP)})

    def restore_vllm(self) -> None:
        """The variables of `_WHILE_UP`. Call once vLLM has shut down."""
        self._restore({name for name in self._before.keys() | os.environ.keys() if name.startswith(_WHILE_UP)})

    def _restore(self, names: set[str]) -> None:
        for name in names:
            if name in self._before:
                os.environ[name] = self._before[name]
            else:
                del os.environ[name]


def build(args: EngineArgs, gpu: int) -> LLMEngine:
    """Start vLLM in this process. `gpu`: see `EngineConfig`.

    Raises ValueError if vLLM rejects the arguments; its other errors pass through.
    """
    import pydantic
    import vllm
    from vllm.model_executor.models import registry
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    if line := internals.warning(vllm.__version__):
        _log.warning(line)
    # vLLM 0.32 inspects the model's class in a new Python process, to keep CUDA out of a process that will fork. This
    # process does not fork, and the new one would take seconds and lack the import fixes of `tora.compat`.
    registry._run_in_subprocess = lambda inspect: inspect()
    try:
        with _children_import_tora():
            config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
            place(config, gpu)
            return LLMEngine(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=not args.disable_log_stats,
                usage_context=UsageContext.ENGINE_CONTEXT,
            )
    except pydantic.ValidationError as error:  # a ValueError with many lines
        raise ValueError("; ".join(e["msg"] for e in error.errors())) from error


def place(config: VllmConfig, gpu: int) -> None:
    """Have vLLM 0.32's in-process executor use this GPU. It takes the index from the device that its config names, and
    the first GPU if that has none; no engine argument sets it."""
    if config.device_config.device_type == "cuda":
        config.device_config.device = torch.device("cuda", gpu)


def engine_occupancy(llm: LLMEngine) -> Occupancy:
    """Reads state that the engine's thread writes, without a lock: the answer may be one step old."""
    scheduler = llm.engine_core.engine_core.scheduler  # pyright: ignore[reportAttributeAccessIssue]
    requests = list(scheduler.requests.values())
    return Occupancy(scheduler.kv_cache_manager.usage, sum(request.num_preemptions for request in requests))


@contextmanager
def _children_import_tora() -> Iterator[None]:
    """For vLLM's tensor-parallel ranks. A spawned process first imports its parent's main module, which may be any
    program; this replaces it by `child_main`."""
    prepare = spawn.get_preparation_data

    def prepare_with_tora(name: str) -> dict[str, Any]:
        data = prepare(name)
        data.pop("init_main_from_path", None)
        return {**data, "init_main_from_name": "actors.vllm_engine.child_main"}

    setattr(spawn, "get_preparation_data", prepare_with_tora)  # noqa: B010
    try:
        yield
    finally:
        setattr(spawn, "get_preparation_data", prepare)  # noqa: B010


def rendezvous_address(llm: LLMEngine) -> str:
    """Where vLLM's processes met; see `SnapshotExtension.rendezvous_address`."""
    return llm.collective_rpc("rendezvous_address")[0]


def shut_down(llm: LLMEngine, owns_group: bool, rendezvous_address: str) -> None:
    """Shuts vLLM down and removes the files that it leaves.

    `owns_group`: vLLM created this process's default process group. Otherwise the group is the learner's and is kept.
    """
    from vllm.v1.engine import core

    clean_up = getattr(core, "cleanup_dist_env_and_memory")  # noqa: B009  (pyright: not exported)
    if not owns_group:
        # vLLM 0.32 destroys the default group on shutdown even if it did not create it.
        setattr(core, "cleanup_dist_env_and_memory", _free_own_groups)  # noqa: B010
    try:
        llm.engine_core.shutdown()
    finally:
        setattr(core, "cleanup_dist_env_and_memory", clean_up)  # noqa: B010
        _remove_rendezvous(rendezvous_address)


def _remove_rendezvous(address: str) -> None:
    """vLLM 0.32 leaves behind its rendezvous file and, on a CPU, the shared memory of tensor-parallel ranks."""
    if not address.startswith("file://"):
        return
    file = Path(address.removeprefix("file://"))
    for path in (file, *Path("/dev/shm").glob(f"{file.name}-*")):
        path.unlink(missing_ok=True)


def _free_own_groups() -> None:
    """Destroy vLLM's groups within the learner's default group, and have vLLM forget them: a later engine would take
    them for its own, after the learner has left."""
    from vllm.distributed import parallel_state

    groups = {n: g for n, g in vars(parallel_state).items() if isinstance(g, parallel_state.GroupCoordinator)}
    if torch.distributed.is_initialized():  # the learner may have left it first, which destroyed these too
        for group in {id(group): group for group in groups.values()}.values():
            group.destroy()
    for name in [*groups, "_NODE_COUNT"]:
        setattr(parallel_state, name, None)
