"""VLLMEngine: vLLM in this process, stepped by one thread, fed by many.

The thread builds vLLM, writes snapshots between its steps and ends it. Every other thread hands it commands and waits.
Policy version v lives in the adapter slot 1 + v mod `num_slots`; a request keeps the version that it began with.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed

from actors.vllm_setup import (
    Environment,
    LoadedPolicy,
    build,
    completion,
    engine_args,
    loaded_policy,
    sampling_params,
    shut_down,
)
from tora.errors import RolloutError, SyncError
from tora.types import Completion, PolicySnapshot, SampleRequest, SyncReport

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

_END_SECONDS = 60.0
"""How long `close` waits for vLLM to end; its thread never keeps the process alive."""


class VLLMEngine:
    """One vLLM generator; see `tora.protocols.Engine`."""

    concurrent = True

    def __init__(
        self,
        model_path: str,
        *,
        dtype: Literal["bf16", "fp32"],
        max_model_len: int | None,
        lora_rank: int,
        lora_targets: Sequence[str],
        num_slots: int,
        seed: int,
        gpu_memory_utilization: float,
        kv_cache_gib: float,
        enforce_eager: bool,
    ) -> None:
        """Blocks until vLLM is up. It seeds this process's random generators with `seed`.

        `max_model_len`: tokens of prompt and completion, the model's own where None. `num_slots`: policy versions that
        can be in flight at once. `gpu_memory_utilization` is a share, and unused on a CPU; `kv_cache_gib` is unused on
        a GPU. Errors: ValueError for an impossible argument, RolloutError where vLLM does not start.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; an engine needs at least 1")
        self._num_slots = num_slots
        self._commands: deque[_Generate | _Load] = deque()
        self._wake = threading.Condition()  # guards _commands, _failure, _closing
        self._failure: BaseException | None = None
        self._closing = False
        self._policies: dict[int, LoadedPolicy] = {}  # by slot; from here on the engine's thread's own
        self._newest: LoadedPolicy | None = None
        self._in_flight: Counter[int] = Counter()  # unfinished vLLM requests by slot
        self._running: dict[str, tuple[_Generate, int]] = {}  # by vLLM's request id
        self._request_ids = count()
        started: Future[None] = Future()
        self._environment = Environment()
        self._environment.prepare()
        try:
            args = engine_args(
                model_path,
                dtype=dtype,
                max_model_len=max_model_len,
                lora_rank=lora_rank,
                lora_targets=lora_targets,
                num_slots=num_slots,
                seed=seed,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_gib=kv_cache_gib,
                enforce_eager=enforce_eager,
            )
            self._thread = threading.Thread(target=self._main, args=(args, started), name="vllm-engine", daemon=True)
            self._thread.start()
            started.result()
        except BaseException:
            self._environment.restore_own()
            raise
        finally:
            self._environment.restore_others()

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """See `Engine`. Errors: ValueError for a request vLLM would refuse; RolloutError before the first snapshot, and
        once the engine has failed or is closed."""
        for request in requests:
            self._check(request)
        command = _Generate(requests, [sampling_params(request) for request in requests])
        self._submit(command)
        return command.future.result()

    def load_snapshot(self, snapshot: PolicySnapshot) -> SyncReport:
        """Blocks until it is written: between two steps, and after the last request under the version it overwrites.

        Requests that arrive meanwhile run under the new version. Nothing is written for a snapshot that a slot holds
        already. Errors: SyncError, and the former version stays; RolloutError as for `generate`.
        """
        command = _Load(snapshot)
        self._submit(command)
        return command.future.result()

    def close(self) -> None:
        """Ends vLLM; whoever waits for a completion gets a RolloutError. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(_END_SECONDS)
        self._environment.restore_own()

    def _check(self, request: SampleRequest) -> None:
        num_prompt, num_new = len(request.token_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise ValueError("a prompt is empty")
        if num_prompt + num_new > self._max_model_len:
            raise ValueError(
                f"a prompt of {num_prompt} tokens with max_tokens {num_new} makes {num_prompt + num_new} tokens, "
                f"more than max_model_len {self._max_model_len}"
            )
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self._vocab_size:
            raise ValueError(f"a prompt has token ids outside of the model's vocabulary of {self._vocab_size}")

    def _submit(self, command: _Generate | _Load) -> None:
        with self._wake:
            if self._failure is not None or self._closing:
                raise _gone(self._failure)
            self._commands.append(command)
            self._wake.notify_all()

    # From here on: the engine's thread.

    def _main(self, args: EngineArgs, started: Future[None]) -> None:
        llm, owns_group = None, not torch.distributed.is_initialized()
        try:
            llm = self._llm = build(args)
            self._max_model_len: int = llm.model_config.max_model_len
            self._vocab_size: int = llm.model_config.get_vocab_size()
            started.set_result(None)
            while self._wait_for_work():
                self._run_commands()
                if self._running:
                    for output in llm.step():
                        self._deliver(output)
            self._abandon(None)
        except BaseException as error:  # whatever it was, nobody may be left waiting
            if not started.done():
                refused = isinstance(error, ValueError)
                started.set_exception(error if refused else RolloutError(f"vLLM did not start: {error}"))
            self._abandon(error)
        if llm is not None:
            shut_down(llm, owns_group)
            del self._llm

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._commands or self._running)
            return not self._closing

    def _run_commands(self) -> None:
        """In the order of their arrival. A load that has to wait for its slot holds up what came after it."""
        while True:
            with self._wake:
                if not self._commands or self._must_wait(self._commands[0]):
                    return
                command = self._commands[0]
            if isinstance(command, _Load):
                self._load(command)
            else:
                self._begin(command)
            with self._wake:
                self._commands.popleft()  # only now, so that `_abandon` finds it if vLLM raises

    def _must_wait(self, command: _Generate | _Load) -> bool:
        if isinstance(command, _Generate):
            return False
        slot = self._slot(command.snapshot.version)
        return self._in_flight[slot] > 0 and not self._holds(slot, command.snapshot)

    def _slot(self, version: int) -> int:
        return 1 + version % self._num_slots

    def _holds(self, slot: int, snapshot: PolicySnapshot) -> bool:
        held = self._policies.get(slot)
        return held is not None and (held.version, held.report.sha256) == (snapshot.version, snapshot.sha256)

    def _load(self, command: _Load) -> None:
        slot = self._slot(command.snapshot.version)
        if not self._holds(slot, command.snapshot):
            try:
                (report,) = self._llm.collective_rpc("load_policy_snapshot", args=(command.snapshot, slot))
            except SyncError as error:
                command.future.set_exception(error)
                return
            self._policies[slot] = loaded_policy(slot, report)
        self._newest = self._policies[slot]
        command.future.set_result(self._newest.report)

    def _begin(self, command: _Generate) -> None:
        from vllm.inputs import tokens_input

        if self._newest is None:
            command.future.set_exception(RolloutError("the engine was asked to generate before its first snapshot"))
            return
        if not command.requests:
            command.future.set_result([])
        command.policy = self._newest
        for index, (request, params) in enumerate(zip(command.requests, command.params, strict=True)):
            name = str(next(self._request_ids))
            prompt = tokens_input(list(request.token_ids))
            self._llm.add_request(name, prompt, params, lora_request=self._newest.lora)
            self._running[name] = (command, index)
            self._in_flight[self._newest.lora.lora_int_id] += 1

    def _deliver(self, output: Any) -> None:
        """Only finished requests come out, with all their samples."""
        command, index = self._running[output.request_id]
        assert command.policy is not None
        self._in_flight[command.policy.lora.lora_int_id] -= 1
        completions = [completion(sample, command.policy.version) for sample in output.outputs]
        if len(completions) == 1:
            completions *= command.requests[index].num_samples  # greedy ones are all the same
        command.done[index] = completions
        if len(command.done) == len(command.requests):
            command.future.set_result([command.done[i] for i in range(len(command.requests))])
        del self._running[output.request_id]  # only now, so that `_abandon` finds it if something raises

    def _abandon(self, cause: BaseException | None) -> None:
        """No command will be answered any more."""
        with self._wake:
            self._failure, self._closing = cause, True
            waiting = [*self._commands, *(command for command, _ in self._running.values())]
            self._commands.clear()
        for command in waiting:
            if not command.future.done():
                command.future.set_exception(_gone(cause))


@dataclass(eq=False)
class _Generate:
    requests: Sequence[SampleRequest]
    params: list[SamplingParams]
    policy: LoadedPolicy | None = None
    done: dict[int, list[Completion]] = field(default_factory=dict)
    """By index into `requests`."""
    future: Future[list[list[Completion]]] = field(default_factory=Future)


@dataclass(eq=False)
class _Load:
    snapshot: PolicySnapshot
    future: Future[SyncReport] = field(default_factory=Future)


def _gone(cause: BaseException | None) -> RolloutError:
    if cause is None:
        return RolloutError("the engine is closed")
    error = RolloutError(f"the engine's thread ended with {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
