"""Start, query and shut down vLLM 0.32 in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tora.types import Occupancy

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
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


def engine_occupancy(llm: LLMEngine) -> Occupancy:
    """Of an engine in this process. Reads what the engine's thread writes, and takes an answer that is a step old."""
    scheduler = llm.engine_core.engine_core.scheduler  # pyright: ignore[reportAttributeAccessIssue]
    requests = list(scheduler.requests.values())
    return Occupancy(scheduler.kv_cache_manager.usage, sum(request.num_preemptions for request in requests))


@contextmanager
def _children_import_tora() -> Iterator[None]:
    """For vLLM's tensor-parallel ranks. A process that is spawned imports its parent's main module before anything
    else, which here may be anybody's: it gets ours instead."""
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
    """See `SnapshotExtension`."""
    return llm.collective_rpc("rendezvous_address")[0]


def shut_down(llm: LLMEngine, owns_group: bool, rendezvous_address: str) -> None:
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
        _remove_rendezvous(rendezvous_address)


def _remove_rendezvous(address: str) -> None:
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
