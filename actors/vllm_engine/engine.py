"""VLLMEngine: vLLM in this process, stepped by one thread and called from many.

The engine's thread builds vLLM, steps it, installs snapshots between steps and shuts it down. Callers queue commands
and wait for their futures. `actors.vllm_engine.weight_updates` decides what a new version does to running sequences.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed

from actors.abort import Aborted
from actors.vllm_engine.arguments import engine_args
from actors.vllm_engine.cache import Cache
from actors.vllm_engine.commands import Generate, Install, Sleep, engine_error
from actors.vllm_engine.config import EngineConfig
from actors.vllm_engine.images import EngineInputs
from actors.vllm_engine.process import (
    Environment,
    build,
    engine_occupancy,
    rendezvous_address,
    shut_down,
)
from actors.vllm_engine.requests import (
    LoadedPolicy,
    Slot,
    completion,
    completion_logprobs,
    loaded_policy,
    pinned_versions,
    sampling_params,
    scoring_params,
)
from actors.vllm_engine.slot_contents import SlotContents, consensus
from actors.vllm_engine.weight_updates import WeightUpdate
from tora.errors import RolloutError, SyncError, described
from tora.protocols import Occupancy
from tora.types import Completion, LogprobRequest, PolicySnapshot, SampleRequest, SyncReport

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

_SHUTDOWN_TIMEOUT_S = 60.0
"""How long `close` waits for vLLM. The engine's thread is a daemon and never keeps the process alive."""


class VLLMEngine:
    """One vLLM generator; see `tora.protocols.Engine`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        update: WeightUpdate,
        resources: ExitStack | None = None,
        step: Callable[[LLMEngine], Sequence[Any]] = lambda llm: llm.step(),
    ) -> None:
        """Blocks until vLLM is up.

        With an `update` of whole weights the config's adapter fields are ignored. `resources` is closed once vLLM has
        shut down: pass what owns the folder behind `config.model_path`. `step` runs one step of vLLM on the engine's
        thread and returns its outputs.

        Raises ValueError if an argument is impossible and RolloutError if vLLM does not start.
        """
        self._resources = resources or ExitStack()
        self._update, self._step, self._gpu = update, step, config.gpu
        self._sleeps = config.sleeps
        # Tensor-parallel workers are processes that only one thread may talk to, and whole weights have no slot to
        # stage for: either way the engine's thread makes the whole install in one call between two steps.
        self._one_call_installs = config.tensor_parallel > 1 or update.num_slots == 0
        self._pinned_slot: Slot = update.num_slots + 1 if config.pins else None
        self._commands: deque[Generate | Install | Sleep] = deque()
        self._wake = threading.Condition()  # guards _commands, _failure, _closing
        self._failure: BaseException | None = None
        self._closing = False
        self._step_began: float | None = None
        """By `time.monotonic`; None between steps, and during the first one, which may compile kernels."""
        # From here on only the engine's thread touches these.
        self._policies: dict[Slot, LoadedPolicy] = {}
        self._contents: dict[Slot, SlotContents | None] = {}  # the answers to one-call installs
        self._newest: LoadedPolicy | None = None
        self._in_flight: Counter[Slot] = Counter()  # unfinished vLLM requests
        self._running: dict[str, tuple[Generate, int]] = {}  # by vLLM's request id
        self._request_ids, self._cache = count(), Cache()
        started: Future[None] = Future()
        self._environment = Environment(float32=config.dtype == "fp32")
        self._environment.prepare()
        try:
            args = engine_args(config, update)
            self._thread = threading.Thread(target=self._main, args=(args, started), name="vllm-engine", daemon=True)
            self._thread.start()
            started.result()
        except BaseException:
            self._environment.restore_vllm()
            self._resources.close()
            raise
        finally:
            self._environment.restore_except_vllm()

    def generate(self, requests: Sequence[SampleRequest], *, adapter: bool = True) -> list[list[Completion]]:
        """See `Engine`; `adapter=False` generates with the base model.

        Raises ValueError if vLLM would reject a request, and RolloutError if there is no snapshot yet or the engine has
        failed or is closed.
        """
        for request in requests:
            self._check_tokens(request.token_ids, request.sampling.max_tokens)

        pinned = any(request.pinned for request in requests)
        if pinned and not all(request.pinned for request in requests):
            raise ValueError("one call has requests that are pinned and others that are not")
        versions = pinned_versions if pinned else self._update.versions

        def completions(output: Any, index: int, policy: LoadedPolicy) -> list[Completion]:
            samples = [completion(sample, versions(sample, policy)) for sample in output.outputs]
            return samples * requests[index].num_samples if len(samples) == 1 else samples  # greedy: vLLM sampled one

        inputs = self._input_maker()
        prompts = [inputs(request.token_ids, request.images) for request in requests]
        params = [sampling_params(request) for request in requests]
        return self._submit(Generate(prompts, params, completions, adapter, pinned)).result()

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> list[np.ndarray]:
        """See `Engine`. Raises as `generate` does."""
        for request in requests:
            self._check_tokens(request.token_ids + request.completion, 1)

        def logprobs(output: Any, index: int, policy: LoadedPolicy) -> np.ndarray:
            return completion_logprobs(output, len(requests[index].completion))

        inputs = self._input_maker()
        prompts = [inputs(request.token_ids + request.completion, request.images) for request in requests]
        return self._submit(Generate(prompts, [scoring_params()] * len(requests), logprobs, adapter)).result()

    def install(self, snapshot: PolicySnapshot) -> SyncReport:
        """Blocks until the snapshot is written, between two steps, and read back; see `WeightUpdate.must_wait`.

        Requests that arrive meanwhile run under the new version. A snapshot that its slot already holds is not written
        again. Raises SyncError if it cannot be installed, keeping the previous version, and RolloutError as `generate`
        does.
        """
        return self._put(snapshot, self._update.slot(snapshot.version))

    def pin(self, snapshot: PolicySnapshot) -> SyncReport:
        """See `Engine`. Waits for the last request under the version pinned before. Raises as `install` does, and
        ValueError if the engine was not made with room for it."""
        if self._pinned_slot is None:
            raise ValueError("the engine was made without room for a pinned version")
        return self._put(snapshot, self._pinned_slot)

    def _put(self, snapshot: PolicySnapshot, slot: Slot) -> SyncReport:
        start = time.perf_counter()
        with self._wake:
            self._check_alive()
            llm = self._llm
        if self._one_call_installs:
            held, stall = self._submit(Install(snapshot, slot, None)).result()
        else:
            # Reading, hashing, uploading and casting happen in the caller's thread, on a stream of their own, while the
            # engine's thread keeps stepping.
            (staged,) = llm.collective_rpc("stage_snapshot", args=(snapshot,))
            _, stall = self._submit(Install(snapshot, slot, staged)).result()
            (held,) = llm.collective_rpc("read_snapshot", args=(snapshot, slot))
        return SyncReport(
            version=snapshot.version,
            nbytes=snapshot.nbytes,
            seconds=time.perf_counter() - start,
            sha256=held.sha256,
            num_modules=held.num_modules,
            dtype=held.dtype,
            stall_seconds=stall,
        )

    def occupancy(self) -> Occupancy:
        """See `Engine`. Raises RolloutError if the engine has failed or is closed."""
        with self._wake:
            self._check_alive()
            llm = self._llm
        began = self._step_began
        step_seconds = 0.0 if began is None else time.monotonic() - began
        return replace(engine_occupancy(llm), step_seconds=step_seconds)

    def base_weights(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Views of the weights with these Hugging Face names, without tensor parallelism; see `base_views`."""
        with self._wake:
            self._check_alive()
            return self._llm.collective_rpc("base_weights", args=(names,))[0]

    def sleep(self) -> None:
        """Frees the KV cache, and with it the prefixes that it holds, until the next call that generates or scores.

        Snapshots can be installed meanwhile. Does nothing unless the config has `sleeps`. Raises RolloutError if the
        engine has failed or is closed.
        """
        if self._sleeps:
            self._submit(Sleep()).result()

    def close(self) -> None:
        """Shuts vLLM down. Pending calls raise RolloutError. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(_SHUTDOWN_TIMEOUT_S)
        # vLLM's objects form reference cycles, some through weak keys. Collect them now: finalisers that free C++
        # memory fail, and break torch.compile, if they run while it is tracing.
        gc.collect()
        gc.collect()
        self._environment.restore_vllm()
        self._resources.close()

    def _check_tokens(self, token_ids: tuple[int, ...], num_new: int) -> None:
        if len(token_ids) == 0:
            raise ValueError("a prompt is empty")
        if len(token_ids) + num_new > self._max_model_len:
            raise ValueError(
                f"a prompt of {len(token_ids)} tokens with max_tokens {num_new} makes {len(token_ids) + num_new} "
                f"tokens, more than max_model_len {self._max_model_len}"
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise ValueError(f"a prompt has token ids outside the model's vocabulary of {self._vocab_size}")

    def _check_alive(self) -> None:
        if self._failure is not None or self._closing:
            raise engine_error(self._failure)

    def _input_maker(self) -> EngineInputs:
        with self._wake:
            self._check_alive()
            return self._inputs

    def _submit(self, command: Generate | Install | Sleep) -> Future[Any]:
        with self._wake:
            self._check_alive()
            self._commands.append(command)
            self._wake.notify_all()
        return command.future

    # The engine's thread

    def _main(self, args: EngineArgs, started: Future[None]) -> None:
        llm, address, owns_group = None, "", not torch.distributed.is_initialized()
        try:
            llm = self._llm = build(args, self._gpu)
            address = rendezvous_address(llm)
            self._max_model_len: int = llm.model_config.max_model_len
            self._vocab_size: int = llm.model_config.get_vocab_size()
            self._inputs = EngineInputs(llm)
            started.set_result(None)
            has_stepped = False
            while self._wait_for_work():
                self._run_commands()
                self._end_aborted()
                if self._running:
                    self._step_began = time.monotonic() if has_stepped else None
                    outputs = self._step(llm)
                    self._step_began, has_stepped = None, True
                    for output in outputs:
                        self._deliver(output)
            self._fail_all(None)
        except BaseException as error:  # whatever it is, every pending call must fail
            if not started.done():
                is_rejection = isinstance(error, ValueError)
                started.set_exception(
                    error if is_rejection else RolloutError(f"vLLM did not start: {described(error)}")
                )
            self._fail_all(error)
        if llm is not None:
            shut_down(llm, owns_group, address)
            del self._llm, llm
            self.__dict__.pop("_inputs", None)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._commands or self._running)
            return not self._closing

    def _run_commands(self) -> None:
        """In order of arrival. A command that must wait for running requests holds up those behind it."""
        while True:
            with self._wake:
                if not self._commands or self._must_wait(self._commands[0]):
                    return
                command = self._commands[0]
            if isinstance(command, Install):
                self._install(command)
            elif isinstance(command, Sleep):
                self._cache.free(self._llm)
                command.future.set_result(None)
            else:
                self._cache.restore(self._llm)
                self._start_requests(command)
            with self._wake:
                self._commands.popleft()  # only now, so that `_fail_all` finds it if vLLM raises

    def _must_wait(self, command: Generate | Install | Sleep) -> bool:
        if isinstance(command, Generate):
            return False
        if isinstance(command, Sleep):
            return bool(self._running)
        in_use = self._in_flight[command.slot]
        must_wait = in_use > 0 if command.slot == self._pinned_slot else self._update.must_wait(in_use)
        return must_wait and not self._holds(command.slot, command.snapshot)

    def _holds(self, slot: Slot, snapshot: PolicySnapshot) -> bool:
        held = self._policies.get(slot)
        return held is not None and (held.version, held.sha256) == (snapshot.version, snapshot.sha256)

    def _install(self, command: Install) -> None:
        start = time.perf_counter()
        slot, pinned = command.slot, self._pinned_slot is not None and command.slot == self._pinned_slot
        if not self._holds(slot, command.snapshot):
            try:
                self._contents[slot] = self._write(command, slot)
            except SyncError as error:
                command.future.set_exception(error)
                return
            self._policies[slot] = loaded_policy(slot, command.snapshot, pinned=pinned)
            if not pinned:
                self._update.on_installed(self._llm, self._policies[slot])
        if not pinned:
            self._newest = self._policies[slot]
        command.future.set_result((self._contents[slot], time.perf_counter() - start))

    def _write(self, command: Install, slot: Slot) -> SlotContents | None:
        """None if the snapshot was staged: then the caller reads the slot back."""
        if command.staged is not None:
            self._llm.collective_rpc("write_snapshot", args=(command.staged, slot))
            return None
        if slot is None:
            return consensus(self._llm.collective_rpc("install_weights", args=(command.snapshot,)))
        return consensus(self._llm.collective_rpc("install_adapter", args=(command.snapshot, slot)))

    def _start_requests(self, command: Generate) -> None:
        policy = self._policies.get(self._pinned_slot) if command.pinned else self._newest
        if policy is None:
            command.future.set_exception(RolloutError("the engine was asked to generate before its first snapshot"))
            return
        if command.is_aborted:
            command.future.set_exception(Aborted())
            return
        if not command.prompts:
            command.future.set_result([])
        command.policy = policy
        for index, (prompt, params) in enumerate(zip(command.prompts, command.params, strict=True)):
            name = str(next(self._request_ids))
            lora = policy.lora if command.adapter else None
            self._llm.add_request(name, prompt, params, lora_request=lora, priority=int(command.pinned))
            self._running[name] = (command, index)
            self._in_flight[policy.slot] += 1

    def _end_aborted(self) -> None:
        """Take the requests of aborted calls out of vLLM, which frees their part of the cache."""
        names = [name for name, (command, _) in self._running.items() if command.is_aborted]
        if names:
            self._llm.abort_request(names)
        for name in names:
            command, _ = self._running.pop(name)
            assert command.policy is not None
            self._in_flight[command.policy.slot] -= 1
            if not command.future.done():
                command.future.set_exception(Aborted())

    def _deliver(self, output: Any) -> None:
        """`output`: a finished request with all its samples; vLLM returns no others here."""
        command, index = self._running[output.request_id]
        assert command.policy is not None
        self._in_flight[command.policy.slot] -= 1
        command.done[index] = command.convert(output, index, command.policy)
        if len(command.done) == len(command.prompts):
            command.future.set_result([command.done[i] for i in range(len(command.prompts))])
        del self._running[output.request_id]  # only now, so that `_fail_all` finds it if something raises

    def _fail_all(self, cause: BaseException | None) -> None:
        """Fail every pending command."""
        with self._wake:
            self._failure, self._closing = cause, True
            pending = [*self._commands, *(command for command, _ in self._running.values())]
            self._commands.clear()
        for command in pending:
            if not command.future.done():
                command.future.set_exception(engine_error(cause))
