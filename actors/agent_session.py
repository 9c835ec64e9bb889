"""What a program said to the policy in one episode, and what the policy answered: the sequences to train on.

A request that goes on where a turn ended continues that turn's sequence, with the ids that the engine returned. Any
other begins a sequence of its own: another conversation, such as a sub-agent's, or one that leaves an earlier one in
the middle, whose turns up to there are then context and are not trained on twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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

    place: _Place
    turn: _Turn | None
    """The turn that it goes on from."""
    messages: list[dict[str, Any]]
    request: SampleRequest


class NoRoom(ValueError):
    """The messages are as long as a conversation may be."""


class AgentSession:
    """Thread-safe: a program may ask several things at once."""

    def __init__(self, request: SampleRequest, session: Session, index: int, template: ChatTemplate) -> None:
        """`request`: the group's, for its seed and limits. `index`: the rollout's in its group."""
        self.request, self._session, self._index, self._template = request, session, index, template
        self._asked, self._is_finished = 0, False
        self._endings: dict[Episode, StopReason] = {}
        self._turns: dict[_Place, _Turn] = {}
        self._replies: set[Reply] = set()
        self._lock = threading.Lock()

    def ask(self, messages: Sequence[Message], tools: Sequence[Message], max_tokens: int | None) -> Asked:
        """Raises ValueError, for the program, if the messages cannot be rendered or leave no room."""
        with self._lock:
            said = [reply_of(m) if m.get("role") == "assistant" else None for m in messages]
            kept = self._template.kept(messages, tools)
            own = [reply in self._replies and whole for reply, whole in zip(said, kept, strict=True)]
            pieces = tuple(self._template.pieces(messages, tools, own))
            replies = tuple(reply for reply, mine in zip(said, own, strict=True) if mine and reply is not None)
            turn = self._turns.get((pieces[:-1], replies)) if replies else None
            if turn is None:
                pieces, replies = tuple(self._template.pieces(messages, tools, [False] * len(messages))), ()
                context = self._template.encode(pieces[0])
            else:
                context = turn.context + self._template.after_turn(pieces[-1], stopped=turn.stopped)
            first = len(self.request.token_ids)
            if context[:first] != self.request.token_ids:
                raise ValueError("the chat template begins a conversation in several ways")
            room = self.request.sampling.max_tokens - (len(context) - first)
            if room < 1:
                raise NoRoom(f"the messages leave no room: {len(context)} tokens")
            self._asked += 1
            seed = derived_seed(self.request.seed, self._index, self._asked, len(context))
            sampling = replace(self.request.sampling, max_tokens=room if max_tokens is None else min(max_tokens, room))
            request = SampleRequest(context, 1, seed, sampling, pinned=self.request.pinned)
            return Asked((pieces, replies), turn, [dict(m) for m in messages], request)

    def answer(self, asked: Asked, completion: Completion, message: Message) -> None:
        """`message`: the turn as the program gets it. Dropped if the session has ended: a program may leave before it
        is answered, and what it did not wait for is not trained on."""
        with self._lock:
            if self._is_finished:
                return
            episode, (pieces, replies) = self._episode_of(asked), asked.place
            episode.take(completion)
            episode.messages.append(dict(message))
            episode.tool_calls += len(message.get("tool_calls") or ())
            reply = reply_of(message)
            self._replies.add(reply)
            stopped = int(completion.token_ids[-1]) in self._template.stop_token_ids
            self._turns[(pieces, (*replies, reply))] = _Turn(episode, episode.context, stopped)
            self._endings[episode] = StopReason.STOP if completion.stopped else StopReason.LENGTH

    def _episode_of(self, asked: Asked) -> Episode:
        """The episode that ends with what was asked: the turn's own if nothing has followed it, or a new one."""
        turn, context = asked.turn, asked.request.token_ids
        if turn is not None and turn.episode.context == turn.context:
            episode = turn.episode
        else:
            episode = Episode(self.request, self._session, self._index)
        has_room = episode.add(context[len(episode.context) :])
        assert has_room, "`ask` has counted"
        episode.messages += asked.messages[len(episode.messages) :]
        return episode

    def finish(self) -> list[Episode]:
        """The episodes, ended. Nothing is asked or answered afterwards."""
        with self._lock:
            self._is_finished = True
            for episode, ending in self._endings.items():
                episode.stop_reason = ending
            return [*self._endings]
