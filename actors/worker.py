"""RolloutWorker: one engine and one rewarder. Samples groups and scores them in place. Knows nothing of Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.abort import Aborted, abortable
from actors.agent_player import AgentPlayer
from actors.continuation import generate_in_parts
from actors.episode import EpisodePlayer, PlayedGroup
from actors.finite import check_total, split_by_logprobs
from tora.adapters.snapshot import engine_digest
from tora.errors import SyncError
from tora.protocols import Engine, Occupancy, Rewarder
from tora.rewards.notes import Notes, TrainerState
from tora.tasks.encode import as_messages
from tora.types import (
    Completion,
    FailedReward,
    GroupResult,
    LogprobRequest,
    PolicySnapshot,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    StopReason,
    SyncReport,
)


def group_seed(run_seed: int, purpose: int, prompt_id: int) -> int:
    """A 63-bit seed for one group; the same in every run and on every worker."""
    words = np.random.SeedSequence([run_seed, purpose, prompt_id]).generate_state(1, np.uint64)
    return int(words[0] >> 1)


TRAIN, EVAL = 0, 1
"""Purposes of a seed: a training prompt and an evaluation prompt with the same id get different draws."""


def verify_install(snapshot: PolicySnapshot, report: SyncReport) -> None:
    """Raises SyncError if the engine does not hold every tensor as sent, rounded to its own dtype."""
    expected = engine_digest(snapshot, report.dtype)
    if report.sha256 != expected:
        raise SyncError(
            f"the engine holds policy version {snapshot.version} with digest {report.sha256[:12]} in {report.dtype}; "
            f"the learner's is {expected[:12]}: the snapshot was applied in part or changed in transit"
        )


class RolloutWorker:
    def __init__(
        self,
        make_engine: Callable[[], Engine],
        make_rewarder: Callable[[], Rewarder],
        tokenizer: Any,
        *,
        sampling: Sampling,
        eval_sampling: Sampling,
        group_size: int,
        seed: int,
        eval_seed: int | None = None,
        num_steps: int = 0,
        part_tokens: int | None = None,
        eval_samples: int = 1,
        make_player: Callable[[], EpisodePlayer | AgentPlayer] | None = None,
    ) -> None:
        """Engine and rewarder are built here, in the process that uses them. `tokenizer` is only used to decode.

        `eval_samples`: rollouts per evaluation prompt. `eval_seed`: of evaluations; None for `seed`. `num_steps`: of
        the run, which reward functions are told.
        `part_tokens`: training rollouts are generated in parts of this many tokens; see `actors.continuation`.
        `make_player`: makes what plays episodes with environments; None for one turn without them.
        """
        self._engine, self._rewarder, self._tokenizer = make_engine(), make_rewarder(), tokenizer
        self._sampling, self._eval_sampling, self._eval_samples = sampling, eval_sampling, eval_samples
        self._group_size, self._part_tokens = group_size, part_tokens
        self._seeds = {TRAIN: seed, EVAL: seed if eval_seed is None else eval_seed}
        self._version, self._num_steps = 0, num_steps
        self._player = None if make_player is None else make_player()
        self._running: dict[int, threading.Event] = {}
        """The flags of the groups that are running, by ticket."""
        self._pinning = threading.Lock()
        self._pinned: tuple[int, str] | None = None
        """Version and digest of the snapshot that the engine has pinned."""

    def run_group(self, prompt: Prompt, ticket: int = 0) -> GroupResult:
        """`ticket`: the caller's name for this call in `abort`; an aborted call returns a result without rollouts."""
        flag = self._running[ticket] = threading.Event()
        try:
            with abortable(flag):
                return self.run_groups([prompt])[0]
        except Aborted:
            return GroupResult(())
        finally:
            self._running.pop(ticket, None)

    def abort(self, ticket: int) -> None:
        """End a call of `run_group` as soon as the engine can. Nothing happens if it is not running."""
        if (flag := self._running.get(ticket)) is not None:
            flag.set()

    def run_groups(self, prompts_P: Sequence[Prompt]) -> list[GroupResult]:
        """Training rollouts, `group_size` per prompt, scored; one result per prompt, in order."""
        return self._run(prompts_P, self._sampling, self._group_size, TRAIN)

    def evaluate(self, prompts_P: Sequence[Prompt], pinned: PolicySnapshot | None = None) -> list[GroupResult]:
        """Evaluation rollouts, `eval_samples` per prompt, scored; one result per prompt, in order.

        `pinned`: the policy version to use, while others may be installed; None for the newest. Calls that overlap must
        use the same.
        """
        if pinned is not None:
            self._pin(pinned)
        return self._run(prompts_P, self._eval_sampling, self._eval_samples, EVAL, pinned=pinned is not None)

    def _pin(self, snapshot: PolicySnapshot) -> None:
        """The first call with a snapshot hands it to the engine; others wait for that."""
        with self._pinning:
            name = (snapshot.version, snapshot.sha256)
            if self._pinned != name:
                verify_install(snapshot, self._engine.pin(snapshot))
                self._pinned = name

    def _run(
        self,
        prompts_P: Sequence[Prompt],
        sampling: Sampling,
        group_size: int,
        purpose: int,
        *,
        pinned: bool = False,
    ) -> list[GroupResult]:
        start = time.perf_counter()
        seeds_P = [group_seed(self._seeds[purpose], purpose, p.id) for p in prompts_P]
        requests = [
            SampleRequest(p.token_ids, group_size, seed, sampling, p.images, pinned)
            for p, seed in zip(prompts_P, seeds_P, strict=True)
        ]
        part_tokens = self._part_tokens if purpose == TRAIN else None
        if self._player is None:
            completions_PG = generate_in_parts(self._engine, requests, part_tokens)
            seconds = time.perf_counter() - start
            return [self._score(p, c, seconds) for p, c in zip(prompts_P, completions_PG, strict=True)]
        with self._player.play(self._engine, prompts_P, requests, part_tokens) as groups:
            seconds = time.perf_counter() - start
            return [self._score_episodes(group, seconds) for group in groups]

    def _score(self, prompt: Prompt, completions_G: Sequence[Completion], seconds: float) -> GroupResult:
        sound, bad_logprobs = split_by_logprobs(completions_G)
        ids_G = [c.token_ids.tolist() for c in sound]
        texts_G = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_G]

        def rollout(g: int, parts: Mapping[str, float]) -> Rollout:
            return Rollout(
                token_ids=sound[g].token_ids,
                sampled=np.ones(len(sound[g].token_ids), dtype=bool),
                actor_logprobs=sound[g].logprobs,
                versions=sound[g].versions,
                stop_reason=StopReason.STOP if sound[g].stopped else StopReason.LENGTH,
                text=texts_G[g],
                reward=self._rewarder.total(parts),
                reward_parts=parts,
                kept_mass=_kept_mass(sound[g]),
            )

        notes = Notes()
        rollouts, failures = self._rollouts(prompt, texts_G, ids_G, {}, rollout, notes) if sound else ((), ())
        return GroupResult(rollouts, failures, seconds, bad_logprobs, notes.metrics, notes.printed)

    def _score_episodes(self, group: PlayedGroup, seconds: float) -> GroupResult:
        assert self._player is not None
        lost = tuple(e.failure for e in group.episodes if e.failure is not None)
        played = [e for e in group.episodes if e.failure is None]
        completions_G, bad_logprobs = split_by_logprobs([e.sampled_tokens for e in played])
        sound = [e for e in played if any(e.sampled_tokens is completion for completion in completions_G)]
        if not sound:
            return GroupResult((), lost, seconds, bad_logprobs)
        prompt = replace(group.prompt, source=as_messages(group.prompt.source))
        messages_G, ids_G = [e.messages for e in sound], [e.token_ids.tolist() for e in sound]
        indices = [e.index for e in sound]
        numbers = self._player.environments.scored_here
        known = {i: group.session.column(i, prompt, indices, messages_G, ids_G) for i in numbers}

        def rollout(g: int, parts: Mapping[str, float]) -> Rollout:
            return sound[g].rollout(
                text=self._tokenizer.decode(ids_G[g], skip_special_tokens=True),
                reward=self._rewarder.total(parts),
                reward_parts=parts,
                kept_mass=_kept_mass(completions_G[g]),
            )

        notes = Notes()
        rollouts, failures = self._rollouts(prompt, messages_G, ids_G, known, rollout, notes)
        return GroupResult(rollouts, (*lost, *failures), seconds, bad_logprobs, notes.metrics, notes.printed)

    def _rollouts(
        self,
        prompt: Prompt,
        texts_G: Sequence[str | list[dict[str, Any]]],
        ids_G: Sequence[list[int]],
        known: Mapping[int, list[float | FailedReward | None]],
        make: Callable[[int, Mapping[str, float]], Rollout],
        notes: Notes,
    ) -> tuple[tuple[Rollout, ...], tuple[FailedReward, ...]]:
        """The rollouts that have a reward, made by `make` from their number and reward parts, and the failures, also of
        rollouts that have one all the same."""
        state = TrainerState(self._version, self._num_steps)
        answers_G = self._rewarder(prompt, texts_G, ids_G, known, state=state, notes=notes)
        scored_G = [self._with_total(scored) for scored in answers_G]
        parts_G = [scored.parts if isinstance(scored, FailedReward) else scored for scored in scored_G]
        rollouts = tuple(
            replace(make(g, parts), extras=notes.extras_at(g)) for g, parts in enumerate(parts_G) if parts is not None
        )
        return rollouts, tuple(scored for scored in scored_G if isinstance(scored, FailedReward))

    def _with_total(self, scored: dict[str, float] | FailedReward) -> dict[str, float] | FailedReward:
        """`scored`, or the failure of its weighted sum."""
        parts = scored.parts if isinstance(scored, FailedReward) else scored
        return scored if parts is None else check_total(parts, self._rewarder.total(parts)) or scored

    def forward(self, snapshot: PolicySnapshot) -> SyncReport:
        """Install the snapshot and verify it. Raises SyncError if the engine does not hold what the learner sent."""
        report = self._engine.install(snapshot)
        if report.nbytes:
            verify_install(snapshot, report)
        self._version = snapshot.version
        return report

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> list[np.ndarray]:
        """See `Engine.logprobs`."""
        return self._engine.logprobs(requests, adapter=adapter)

    def occupancy(self) -> Occupancy:
        return self._engine.occupancy()

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self._engine.sleep()

    def close(self) -> None:
        self._engine.close()
        self._rewarder.close()
        if self._player is not None:
            self._player.close()


def _kept_mass(completion: Completion) -> float:
    return float(np.exp(completion.logprobs - completion.sampling_logprobs).mean())
