"""The messages between tasks, rollout workers, learner and loop, in the order in which a sample passes through them.

Prompt -> SampleRequest -> Completion -> Rollout -> GroupResult -> Group -> MicroBatch -> TrainBatch -> StepResult
-> PolicySnapshot -> SyncReport.

Shape letters: P prompts, G group, B = P·G sequences, L tokens of one sequence, S sampled ones among them, T packed
tokens, N response tokens, I images. Arrays are numpy: Ray moves them without pickling tensors, and
this module imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Metrics = dict[str, float]
"""By name, grouped by prefix: `reward/mean`, `sync/seconds`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised, with its answer key."""

    id: int
    """Position in the prompt stream, unique within a run."""
    token_ids: tuple[int, ...]
    """With the chat template applied, including the generation prompt; with tools, to the end of the last message."""
    source: str | list[dict[str, Any]]
    """The question as the dataset has it, a string or chat messages. Reward functions get this as `prompts`."""
    columns: Mapping[str, Any]
    """The dataset row's other columns (`answer`, ...), handed to reward functions by name."""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    """Encoded image files (PNG, JPEG, ...), in the order of their placeholders. `token_ids` repeats each placeholder
    once per feature of its image."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Sample from the `top_k` most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches `top_p`; 1 for all."""
    min_p: float = 0.0
    """Sample from tokens at least `min_p` times as probable as the most probable one; 0 for all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that prompt or completion already contain, and multiplies the negative
    ones; 1 is off."""
    stop_token_ids: tuple[int, ...] = ()
    """A stop token ends the completion and is part of it."""
    stop: tuple[str, ...] = ()
    """A string ends the completion once the decoded text contains it, and is part of it. It may be a special token."""

    @property
    def reshapes(self) -> bool:
        """Whether penalties or truncation draw from another distribution than the tempered softmax."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request for `num_samples` completions of one prompt, drawn with one seed."""

    token_ids: tuple[int, ...]
    """Token ids of the prompt."""
    num_samples: int
    seed: int
    sampling: Sampling
    images: tuple[bytes, ...] = field(default=(), repr=False)
    pinned: bool = False
    """Sample under the version that the engine has pinned, at low priority, and not under the newest."""
    """Images of the prompt, whose runs of placeholders come before any placeholder that was sampled."""


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """A request for the log-probs of given tokens."""

    token_ids: tuple[int, ...]
    """Token ids of the prompt."""
    completion: tuple[int, ...]
    """Token ids whose log-probs are asked for."""
    images: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one sequence."""

    token_ids: np.ndarray
    """[L] int64, including the stop token if there is one."""
    logprobs: np.ndarray
    """[L] float32, natural log, under the policy: the softmax over the whole vocabulary at the sampling temperature,
    before penalties and truncation. The learner computes the same, so equal policies have a ratio of 1.

    Tokens are drawn from the truncated distribution all the same, so the gradient estimate is an expectation over it:
    each token lacks the factor `exp(logprobs - sampling_logprobs)`, and tokens outside the kept set are never tried.
    Renormalizing the learner over the kept set instead gives the truncated policy's own gradient ("Keep Sampling Mask",
    DeepSeek-V3.2, arXiv:2512.02556, section 3.1) and needs the kept ids of every token."""
    sampling_logprobs: np.ndarray
    """[L] float32, natural log, under the distribution drawn from, after penalties and truncation. Equal to `logprobs`
    without them."""
    versions: np.ndarray
    """[L] int64, the policy version that sampled each token."""
    stopped: bool
    """Whether it ended with a stop token or a stop string; False if it reached `max_tokens`."""


class StopReason(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"
    """The policy drew a stop token, and called no tool before it, or it wrote a stop string."""
    LENGTH = "length"
    """It reached its token limit, or a tool's answer would have exceeded it."""
    TOOL_LIMIT = "tool_limit"
    """The policy called a tool after it had used up its tool calls."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One scored completion. An episode also holds its environment's tokens, which have no log-prob and no version."""

    token_ids: np.ndarray
    """[L] int64: the sampled tokens exactly as the engine returned them, and the environment's."""
    sampled: np.ndarray
    """[L] bool: which tokens the policy sampled. S of them, at least one."""
    actor_logprobs: np.ndarray
    """[S] float32, from the engine that sampled them; see `Completion.logprobs`."""
    versions: np.ndarray
    """[S] int64, the policy version that sampled each token."""
    stop_reason: StopReason
    text: str
    """Decoded, without special tokens."""
    reward: float
    """Weighted sum of `reward_parts`."""
    reward_parts: Mapping[str, float]
    """Unweighted, by reward name, in the config's order."""
    kept_mass: float = 1.0
    """Mean over tokens of the policy's probability divided by the one drawn with. Under truncation alone this is the
    policy's probability of the kept tokens."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What reward functions said of it with TRL's `log_extra`, by column."""
    turns: int = 1
    tool_calls: int = 0
    """Malformed ones included."""
    tool_errors: int = 0
    """Calls that were malformed, named no tool, or raised."""
    turn_rewards: Sequence[float] = ()
    """What each turn earned, from the environment's `get_turn_reward`."""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    """Encoded images that the environment showed, in the order of their placeholders."""
    messages: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """An episode as a conversation: what the environment said at first, the turns, and the tools' answers."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut off by a token limit."""
        return self.stop_reason is StopReason.LENGTH

    @property
    def num_sampled(self) -> int:
        """S: the tokens that are trained on."""
        return len(self.versions)


@dataclass(frozen=True, slots=True)
class FailedReward:
    """Why a rollout has no reward from one of the functions, or none at all because its environment failed."""

    name: str
    """Name of the reward function; `environment` for an environment."""
    reason: str
    """A clause with that as its subject: `returned nan`."""
    parts: Mapping[str, float] | None = None
    """The rollout's unweighted scores if it stays in its group, as one that took too long does; None if it does not."""
    place: str = field(default="", compare=False)
    """Where a function raised: ` (my_rewards.py, line 3: return 1 / 0)`; empty if it did not."""


@dataclass(frozen=True, slots=True)
class BadLogprob:
    """Why a rollout is left out: the engine's log-prob of a token is not finite. The first such token is described."""

    index: int
    """Of the token among those sampled."""
    value: float
    version: int
    """The policy version that sampled the token."""


@dataclass(frozen=True, slots=True)
class Group:
    """The scored rollouts of one prompt.

    Rollouts whose reward failed are left out, except those that took too long, and so are rollouts with a bad log-prob;
    advantages are computed from the rewards that there are. A group with fewer than two rollouts is not trained on.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    seconds: float = 0.0
    """Wall time of the engine call that sampled it, possibly together with other groups."""
    failures: tuple[FailedReward, ...] = ()
    """One per failed reward, of rollouts left out and of those that stay."""
    bad_logprobs: tuple[BadLogprob, ...] = ()
    """One per rollout left out for it."""
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What reward functions logged with TRL's `log_metric`, by name."""
    printed: Sequence[str] = ()
    """Lines that reward functions printed where the user does not see them."""

    @property
    def num_left_out(self) -> int:
        """Rollouts without a reward or with a bad log-prob, which are not among `rollouts`."""
        return sum(failure.parts is None for failure in self.failures) + len(self.bad_logprobs)

    @property
    def version(self) -> int:
        """The oldest policy version among its tokens, which defines its staleness."""
        return int(min(r.versions.min() for r in self.rollouts))

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all rollouts."""
        return sum(r.num_sampled for r in self.rollouts)


@dataclass(frozen=True, slots=True)
class GroupResult:
    """A rollout worker's answer to one prompt: a `Group` without the prompt, which the caller still has, so that its
    images and the dataset's columns travel to the worker but not back. The fields are `Group`'s."""

    rollouts: tuple[Rollout, ...]
    failures: tuple[FailedReward, ...] = ()
    seconds: float = 0.0
    bad_logprobs: tuple[BadLogprob, ...] = ()
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)
    printed: Sequence[str] = ()

    def with_prompt(self, prompt: Prompt) -> Group:
        return Group(prompt, self.rollouts, self.seconds, self.failures, self.bad_logprobs, self.logged, self.printed)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end without padding; one forward-backward."""

    tokens_T: np.ndarray
    """int64: the shared prompts, if any, then the sequences. A sequence is prompt plus completion, or the completion
    alone if its prompt is shared."""
    positions_T: np.ndarray
    """int64: 0 at the start of each prompt; a completion continues where its prompt ends."""
    prompt_lengths_P: np.ndarray
    """int64: length of each shared prompt; empty if no prompt is shared."""
    lengths_B: np.ndarray
    """int64: length of each sequence. These and the lengths of the shared prompts sum to T."""
    prompt_B: np.ndarray
    """int64 in [0, P): the shared prompt of each sequence; empty if no prompt is shared."""
    response_N: np.ndarray
    """int64 indices into T: for each response token, the position whose logits predict it. The last position of a
    shared prompt predicts the first token of several sequences. An environment's tokens are not response tokens."""
    targets_N: np.ndarray
    """int64: the response tokens, which are those that were sampled."""
    sequence_N: np.ndarray
    """int64 in [0, B): the sequence of each response token."""
    actor_logprobs_N: np.ndarray
    """float32: see `Rollout.actor_logprobs`."""
    versions_N: np.ndarray
    """int64: the policy version that sampled each token."""
    advantages_N: np.ndarray
    """float32: the advantage of the token's sequence."""
    weights_N: np.ndarray
    """float32: each token's weight in the loss; see `tora.batching.batch.token_weights`."""
    rewards_B: np.ndarray
    """float64: the reward of each sequence."""
    groups_B: np.ndarray
    """int64: the group of each sequence. A group may be split across the step's micro-batches."""
    given_T: np.ndarray
    """bool: the tokens that were not sampled, of prompts and environments."""
    image_I: np.ndarray
    """int64 in [0, len(images)): the image of each of the I runs of given placeholders, in the order of `tokens_T`. A
    placeholder that was sampled stands for no image."""
    images: tuple[bytes, ...]
    """Encoded images without duplicates, however many sequences show the same one."""
    mini_batch: int = 0
    """The index of the optimizer update within the step. Micro-batches of one update are adjacent."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """All micro-batches of one step, and what the rollout side measured while generating them; or some of them, see
    `step_parts`."""

    micro_batches: tuple[MicroBatch, ...]
    temperature: float
    """Sampling temperature; the learner's log-probs use the same."""
    metrics: Metrics = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    """Prompts of all the step's groups, also of those that no micro-batch has: groups without a signal."""
    groups: tuple[Group, ...] = ()  # those groups, for the log; the learner does not get them
    is_last: bool = True
    """False for a part of a step that is followed by others: the learner makes no update yet. The last part has the
    metrics, prompts and groups of the whole step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The learner's answer to one `TrainBatch`."""

    version: int
    """Policy version after the step."""
    metrics: Metrics
    bad: str = ""
    """Why an update was left out: a clause that names the values that are not finite. Empty if none was."""
    memory_gib: float = field(default=0.0, compare=False, repr=False)
    """Of this rank: the most that PyTorch has allocated on its GPU, or what its process holds. 0 if unknown."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor's place in a snapshot's buffer."""

    name: str
    dtype: str
    """torch's name: `float32`, `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the buffer."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """The tensors that define one policy version, in one flat buffer; see `tora.adapters.snapshot`."""

    version: int
    entries: tuple[TensorEntry, ...]
    data: np.ndarray
    """uint8, the whole buffer."""
    sha256: str
    """The sender's `snapshot.digest`."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors, without the padding between them."""
        return sum(e.nbytes for e in self.entries)


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """A reference to a `PolicySnapshot` held elsewhere."""

    version: int
    data: Any
    """Resolved by a worker's handle: on Ray, an ObjectRef."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """An engine's answer to a snapshot."""

    version: int
    nbytes: int
    """Bytes received; 0 if the engine shares the learner's model."""
    seconds: float
    """Wall time of the whole install."""
    sha256: str
    """`snapshot.digest` of the tensors as the engine holds them, read back under the engine's own names where possible.
    Compare with `snapshot.engine_digest`. Empty if nothing was received."""
    num_modules: int
    """Linear modules that the snapshot updated."""
    dtype: str = "float32"
    """torch's name for the dtype in which the engine holds A and B, or whole weights."""
    stall_seconds: float = 0.0
    """How long generation stalled."""


@dataclass(slots=True)
class RolloutState:
    """The rollout side in a checkpoint. Every prompt before the cursor was trained or dropped, or is listed here."""

    cursor: int = 0
    """Position of the next prompt in the stream."""
    pending: list[int] = field(default_factory=list)
    """Ids of prompts in flight. A resumed run generates them first."""
    finished: list[tuple[int, Group]] = field(default_factory=list)
    """Groups not yet trained on, each with the policy version under which it was started."""
