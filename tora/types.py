"""The messages that travel between tasks, actors, learner and loop.

Shape letters: P prompts, G group, B = P·G sequences, L tokens of one sequence, T packed tokens, N response tokens.
Arrays are numpy, so that Ray moves them without pickling tensors and this module imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised, with its answer key."""

    id: int
    """Position in the prompt stream; unique within a run."""
    token_ids: tuple[int, ...]
    """Chat template applied, generation prompt included."""
    source: str | list[dict[str, Any]]
    """The question as the dataset gave it: a string or chat messages. Reward functions see this."""
    columns: Mapping[str, Any]
    """The dataset row's other columns (`answer`, ...), handed to reward functions by name."""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    """Encoded image files (PNG, JPEG, ...), in the order of their placeholders. `token_ids` are expanded: a placeholder
    stands there once for each feature of its image."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drops tokens less probable than this share of the most probable one; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or completion already have, multiplies negative ones; 1 is off."""
    stop_token_ids: tuple[int, ...] = ()
    """A stop token ends the completion and is part of it."""

    @property
    def reshapes(self) -> bool:
        """Whether penalties or truncation draw from another distribution than the tempered softmax."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`num_samples` completions of one prompt, drawn with one seed."""

    token_ids: tuple[int, ...]
    num_samples: int
    seed: int
    sampling: Sampling
    images: tuple[bytes, ...] = field(default=(), repr=False)
    """The prompt's, see `Prompt`; `token_ids` are expanded as there."""


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """Given tokens, to be told how probable they are."""

    token_ids: tuple[int, ...]
    """The prompt."""
    completion: tuple[int, ...]
    images: tuple[bytes, ...] = field(default=(), repr=False)
    """The prompt's, see `Prompt`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one sequence."""

    token_ids: np.ndarray
    """[L] int64, stop token included."""
    logprobs: np.ndarray
    """[L] float32, natural log: the policy's, of the whole softmax at the sampling temperature, before penalties and
    truncation. The learner computes the same, so its ratio to the engine is 1 for equal policies."""
    sampling_logprobs: np.ndarray
    """[L] float32: of the distribution drawn from, penalties and truncation applied; equal to `logprobs` without."""
    versions: np.ndarray
    """[L] int64, the policy version that produced each token."""
    stopped: bool
    """True when a stop token ended it, False when `max_tokens` did."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled and scored completion."""

    token_ids: np.ndarray
    """[L] int64, exactly as the engine returned them."""
    actor_logprobs: np.ndarray
    """[L] float32, by the engine that sampled them."""
    versions: np.ndarray
    """[L] int64, policy version of each token."""
    stopped: bool
    text: str
    reward: float
    """Weighted sum of `reward_parts`."""
    reward_parts: Mapping[str, float]
    """Unweighted, by reward name."""
    kept_mass: float = 1.0
    """Mean over tokens of π / q: the policy's probability of the token over that of the distribution drawn from. Under
    truncation this is the share of the policy's probability that the kept tokens have."""


@dataclass(frozen=True, slots=True)
class FailedReward:
    """Why a rollout has no reward."""

    name: str
    """The reward function's."""
    reason: str


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one prompt. Those whose reward failed are not among them: their advantage would be a guess, and
    the others' are taken from the rewards that there are. Fewer than two rollouts make no group to train on."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    seconds: float = 0.0
    """Wall time from request to scored."""
    failures: tuple[FailedReward, ...] = ()
    """One for each rollout that is missing."""

    @property
    def has_signal(self) -> bool:
        """False when all rewards are equal: such a group has no gradient."""
        return len({r.reward for r in self.rollouts}) > 1

    @property
    def version(self) -> int:
        """Oldest policy version among its tokens."""
        return int(min(r.versions.min() for r in self.rollouts))

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(len(r.token_ids) for r in self.rollouts)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end without padding; one forward-backward."""

    tokens_T: np.ndarray
    """int64: the shared prompts, if there are any, then the sequences, one after the other. A sequence is prompt and
    completion, or with a shared prompt the completion alone."""
    positions_T: np.ndarray
    """int64: from 0 at each prompt's start; a completion goes on where its prompt ends."""
    prompt_lengths_P: np.ndarray
    """int64: length of each shared prompt; empty where every sequence has its own."""
    lengths_B: np.ndarray
    """int64: length of each sequence; together with the shared prompts' they sum to T."""
    prompt_B: np.ndarray
    """int64 in [0, P): the shared prompt of each sequence; empty where there are none."""
    response_N: np.ndarray
    """int64 indices into T: the positions that predict the response tokens, each the one before it. A shared prompt's
    last position predicts the first token of several."""
    targets_N: np.ndarray
    """int64: those response tokens."""
    sequence_N: np.ndarray
    """int64 in [0, B): the sequence each response token belongs to."""
    actor_logprobs_N: np.ndarray
    """float32."""
    versions_N: np.ndarray
    """int64: the policy version that sampled each token."""
    advantages_N: np.ndarray
    """float32: the advantage of the token's sequence."""
    weights_N: np.ndarray
    """float32: share of each token in the loss, see `tora.batching.batch.token_weights`."""
    rewards_B: np.ndarray
    """float64: the reward of each sequence."""
    groups_B: np.ndarray
    """int64: the group of each sequence; a group may be spread over the step's micro-batches."""
    image_I: np.ndarray
    """int64 in [0, len(images)): the image of each of I runs of placeholders, in the order of `tokens_T`. Only prompts
    hold runs: a placeholder that was sampled stands for no image."""
    images: tuple[bytes, ...]
    """Distinct encoded images. However many sequences show one, it is here once."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """All micro-batches of one step, with what the rollout side measured while making them."""

    micro_batches: tuple[MicroBatch, ...]
    temperature: float
    """The learner scores tokens under the same temperature that sampled them."""
    metrics: Metrics = field(default_factory=dict)
    prompt_ids: tuple[int, ...] = ()
    """Of the step's groups, those without a signal too."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step."""

    version: int
    """Policy version after the step."""
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a snapshot's buffer."""

    name: str
    dtype: str
    """As torch spells it: `float32`, `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the buffer."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """The tensors that define one policy version, in one flat buffer. `tora.adapters.snapshot` reads and writes it."""

    version: int
    entries: tuple[TensorEntry, ...]
    data: np.ndarray
    """uint8, all tensors end to end."""
    sha256: str
    """By the sender, see `snapshot.digest`; an engine must arrive at the same."""

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries)


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """A `PolicySnapshot` that lies elsewhere, told by its version."""

    version: int
    data: Any
    """What a worker's handle can turn into the snapshot: on Ray, an ObjectRef."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full an engine is."""

    kv_usage: float = 0.0
    """Share of its KV cache that is taken, from 0 to 1; 0 for an engine without a bounded one."""
    preemptions: int = 0
    """How often the requests now in flight were thrown out of the cache, to be computed again."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """An engine's answer to a snapshot."""

    version: int
    nbytes: int
    seconds: float
    sha256: str
    """Over every tensor where the engine serves it, read back by the engine's own names; see `snapshot.digest`."""
    num_modules: int
    """Linear modules written into the engine."""
    dtype: str = "float32"
    """In which the engine holds A and B, and what the digest is over."""
    stall_seconds: float = 0.0
    """How long generation stood still for it."""


@dataclass(slots=True)
class RolloutState:
    """Where the rollout side stands: every prompt before the cursor was trained or dropped, or is named here."""

    cursor: int = 0
    """Position of the next prompt in the stream."""
    pending: list[int] = field(default_factory=list)
    """Ids of prompts that were handed out and not answered; they come first when the run goes on."""
    finished: list[tuple[int, Group]] = field(default_factory=list)
    """Groups that wait for their step, each with the policy version it was born under."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Held-out scores of one policy version."""

    accuracy: float
    """Share of rollouts that earn 1 in the first of the run's rewards."""
    reward: float
    num_prompts: int
    sample: tuple[Prompt, Rollout] | None = None
    """One of them, to look at."""
