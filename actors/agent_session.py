"""What a program said to the policy in one episode, and what the policy answered: the sequences to train on.

A request that goes on where a turn ended continues that turn's sequence, with the ids that the engine returned. Any
other begins a sequence of its own: another conversation, such as a sub-agent's, or one that leaves an earlier one in
the middle, whose turns up to there are then context and are not trained on twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.continuation import derived_seed
from actors.episode import Episode
from tora.environments.chat import ChatTemplate, Message, Reply, reply_of
from tora.environments.processes import Session
from tora.types import Completion, SampleRequest, StopReason

_Place = tuple[tuple[str, ...], tuple[Reply, ...]]
"""The pieces before each turn, and the turns: where a conversation is."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """The end of a turn."""

    episode: Episode
    context: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has its tokens."""

    episode: Episode
    place: _Place
    request: SampleRequest


class AgentSession:
    """Thread-safe: a program may ask several things at once."""

    def __init__(self, request: SampleRequest, session: Session, index: int, template: ChatTemplate) -> None:
        """`request`: the group's, for its seed and limits. `index`: the rollout's in its group."""
        self.request, self._session, self._index, self._template = request, session, index, template
        self.episodes: list[Episode] = []
        self._endings: dict[Episode, StopReason] = {}
        self._turns: dict[_Place, _Turn] = {}
        self._replies: set[Reply] = set()
        self._lock = threading.Lock()

    def ask(self, messages: Sequence[Message], tools: Sequence[Message], max_tokens: int | None) -> Asked:
        """Raises ValueError, for the program, if the messages cannot be rendered or leave no room."""
        with self._lock:
            said = [reply_of(m) if m.get("role") == "assistant" else None for m in messages]
            own = [reply in self._replies for reply in said]
            pieces = tuple(self._template.pieces(messages, tools, own))
            replies = tuple(reply for reply, mine in zip(said, own, strict=True) if mine and reply is not None)
            turn = self._turns.get((pieces[:-1], replies)) if replies else None
            if turn is None:
                pieces, replies = tuple(self._template.pieces(messages, tools, [False] * len(messages))), ()
                context = self._template.encode(pieces[0])
            else:
                context = turn.context + self._template.after_turn(pieces[-1], stopped=turn.stopped)
            episode = self._episode_at(turn, context)
            episode.messages += [dict(m) for m in messages[len(episode.messages) :]]
            seed = derived_seed(self.request.seed, self._index, self.episodes.index(episode), len(context))
            limit = episode.room if max_tokens is None else min(max_tokens, episode.room)
            sampling = replace(self.request.sampling, max_tokens=limit)
            request = SampleRequest(context, 1, seed, sampling, pinned=self.request.pinned)
            return Asked(episode, (pieces, replies), request)

    def _episode_at(self, turn: _Turn | None, context: tuple[int, ...]) -> Episode:
        """The episode that has this context now: the turn's own if nothing has followed it, or a new one."""
        episode = turn.episode if turn is not None and turn.episode.context == turn.context else None
        if episode is None:
            episode = Episode(self.request, self._session, self._index)
        first = len(episode.context)
        if context[:first] != episode.context:
            raise ValueError("the chat template begins a conversation in several ways")
        if not episode.add(context[first:]):
            raise ValueError(f"the messages leave no room: {len(context)} tokens")
        if episode not in self.episodes:
            self.episodes.append(episode)
        return episode

    def answer(self, asked: Asked, completion: Completion, message: Message) -> None:
        """`message`: the turn as the program gets it."""
        with self._lock:
            episode, (pieces, replies) = asked.episode, asked.place
            episode.take(completion)
            episode.messages.append(dict(message))
            episode.tool_calls += len(message.get("tool_calls") or ())
            reply = reply_of(message)
            self._replies.add(reply)
            stopped = int(completion.token_ids[-1]) in self._template.stop_token_ids
            self._turns[(pieces, (*replies, reply))] = _Turn(episode, episode.context, stopped)
            self._endings[episode] = StopReason.STOP if completion.stopped else StopReason.LENGTH

    def finish(self) -> list[Episode]:
        """The episodes with a turn, ended."""
        with self._lock:
            for episode, ending in self._endings.items():
                episode.stop_reason = ending
            return [*self._endings]
