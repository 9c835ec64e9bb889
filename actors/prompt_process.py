"""Training prompts made by a process of their own, which keeps their images until nobody needs them any more.

The driver asks it for prompts and gets references in the place of images. A rollout worker and a learner rank each
fetch the images that they need from it (`tora.batching.image_ref`), so an image passes through no other process, and
the driver neither encodes nor stores it.

    driver                      prompt process                 worker, rank

    ask ....> prompts --------> reads rows, makes prompts,
                                keeps images
    prompt <------------------- without images
                                images <---------------------- fetched
    the driver drops the prompt
    the next `prompts` -------> forgets its images

A process that dies is started again by Ray, which repeats the calls that it had not answered. The new one makes the
images that it is asked for again, from the dataset.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from queue import Empty
from typing import Any, NamedTuple

import cloudpickle

from actors.prompts_ahead import PromptMaker, PromptSource, Read
from tora.batching.image_ref import ImageRef, Place, digest_of
from tora.batching.stored_images import store
from tora.config.components import import_from
from tora.errors import ConfigError, RolloutError, first_line, portable, portable_errors
from tora.types import Prompt

_log = logging.getLogger(__name__)
_AT_A_TIME = 16
"""Prompts of one call, at most. The first waits for the last."""
_TRIES = 3
"""How often Ray repeats a call whose process dies, in which a row may be what kills it."""
_THREADS = 8
"""Calls that are answered at a time: one for prompts, one that asks whether the process is alive, others for images."""
_MADE_AGAIN = 512
"""Prompts whose images are kept though nobody says when they are needed no more."""
_CHECK_EVERY_S = 5.0
_END_S = 1.0
"""For the prompts that are being made at the end."""


class _Kept(NamedTuple):
    """The images of a prompt."""

    digests: list[bytes]
    images: list[Any]
    """Each image, or its reference in the object store."""


class PromptActor:
    """The process. Nothing is read before the first call."""

    def __init__(self, name: str, make_read: bytes, folders: Sequence[str]) -> None:
        """`name`: of the Ray actor. `make_read`: pickled, makes what reads the rows. `folders`: to import from."""
        self._name, self._make_read, self._folders = name, make_read, folders
        self._logged = _Logged()
        self._opening, self._keeping = threading.Lock(), threading.Lock()
        self._opened: tuple[Read, PromptMaker] | None = None
        self._kept: dict[int, _Kept] = {}
        """By prompt."""
        self._again = lru_cache(_MADE_AGAIN)(self._make_again)
        self._uses = Counter[int]()
        """How often the driver has each of these prompts: twice, if it asked again after a rewind."""

    def prompts(self, positions: Sequence[int], released: Sequence[int]) -> bytes:
        """For each position its prompt with references in the place of images, or the error in place of the prompt; and
        what was logged since the last call. All pickled. `released`: prompts that the driver has dropped, each as often
        as it got it."""
        self._forget(released)
        with portable_errors():
            _, maker = self._open()
        answers = [maker.ask(position) for position in positions]
        return cloudpickle.dumps(([self._answer(answer) for answer in answers], self._logged.drain()))

    def ping(self) -> int:
        """This process's id, while it is alive, however long a row takes."""
        return os.getpid()

    def images(self, places: Sequence[Place]) -> list[Any]:
        """Each image, or its reference in the object store. Raises ConfigError if there is another in its place."""
        with portable_errors():
            return [self._image(place) for place in places]

    def _open(self) -> tuple[Read, PromptMaker]:
        with self._opening:
            if self._opened is None:
                import_from(self._folders)
                read: Read = cloudpickle.loads(self._make_read)()
                logging.getLogger("tora").addHandler(self._logged)  # what came before, the driver has said too
                self._opened = read, PromptMaker(read)
            return self._opened

    def _answer(self, answer: Future[Prompt]) -> Prompt | Exception:
        try:
            prompt = answer.result()
        except Exception as error:  # a dataset's row may be anything
            return portable(error)
        if not prompt.images:
            return prompt
        kept = _kept(prompt)
        with self._keeping:
            self._kept[prompt.id] = kept
            self._uses[prompt.id] += 1
        places = (Place(self._name, prompt.id, number, digest) for number, digest in enumerate(kept.digests))
        return replace(prompt, images=tuple(map(ImageRef, places)))

    def _forget(self, prompts: Sequence[int]) -> None:
        with self._keeping:
            for each in prompts:
                self._uses[each] -= 1
                if self._uses[each] <= 0:
                    del self._uses[each]
                    self._kept.pop(each, None)

    def _image(self, place: Place) -> Any:
        with self._keeping:
            kept = self._kept.get(place.prompt_id)
        kept = kept or self._again(place.prompt_id)
        if kept.digests[place.number : place.number + 1] != [place.digest]:
            raise ConfigError(
                f"the dataset has another image for prompt {place.prompt_id} than before the process that makes "
                "prompts was started again; set prompt_process=false for a dataset that draws at random"
            )
        return kept.images[place.number]

    def _make_again(self, prompt_id: int) -> _Kept:
        """Of a prompt that another process has made, which is dead, or that the driver has dropped."""
        read, _ = self._open()
        return _kept(read(prompt_id)())


def _kept(prompt: Prompt) -> _Kept:
    return _Kept([digest_of(image) for image in prompt.images], store(prompt.images))


class _Logged(logging.Handler):
    """Keeps warnings, of which the driver tells its user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[tuple[str, str]] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.name, record.getMessage()))

    def drain(self) -> list[tuple[str, str]]:
        """The logger's name and the message of each since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]


class PromptProcess(PromptSource):
    """Asks a process of its own for prompts, as `PromptMaker` does threads."""

    def __init__(
        self,
        make_read: Callable[[], Read],
        folders: Sequence[str] = (),
        *,
        start_timeout_s: float = 600.0,
        heartbeat_s: float = 60.0,
        keep_log: Callable[[int], str] = lambda pid: "",
    ) -> None:
        """Starts the process on this node, where the dataset's files are. See `PromptActor`. It is started again if it
        takes longer than `start_timeout_s` seconds to start, or to answer than `heartbeat_s`. `keep_log` keeps what the
        process of this id has printed; a clause that names the file."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        super().__init__()
        name, here = f"prompts-{secrets.token_hex(8)}", ray.get_runtime_context().get_node_id()
        options = {
            "name": name,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": _TRIES,
            "max_concurrency": _THREADS,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
        }
        self._actor: Any = (
            ray.remote(PromptActor).options(**options).remote(name, cloudpickle.dumps(make_read), list(folders))
        )
        self._start_timeout_s, self._heartbeat_s, self._keep_log = start_timeout_s, heartbeat_s, keep_log
        self._pid: int | None = None
        """Of the process once it has started."""
        self._released: deque[int] = deque()
        self._thread = threading.Thread(target=self._ask_on, name="prompts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the process, also in the middle of a row."""
        import ray

        self._asked.put(None)
        self._thread.join(_END_S)
        ray.kill(self._actor)
        self._thread.join()

    def _ask_on(self) -> None:
        self._check_alive()
        while (asked := self._next_asked()) is not None:
            if not asked:
                self._check_alive()
            elif alive := [(place, future) for place, future in asked if future.set_running_or_notify_cancel()]:
                self._fulfil(alive)

    def _next_asked(self) -> list[tuple[int, Future[Prompt]]] | None:
        """What is asked for by now, in order, after a while of waiting for the first of it; None at the end."""
        asked: list[tuple[int, Future[Prompt]] | None] = []
        with suppress(Empty):
            asked.append(self._asked.get(timeout=_CHECK_EVERY_S))
            while len(asked) < _AT_A_TIME:
                asked.append(self._asked.get_nowait())
        found = [each for each in asked if each is not None]
        return found if len(found) == len(asked) else None

    def _fulfil(self, asked: Sequence[tuple[int, Future[Prompt]]]) -> None:
        import ray

        positions, released = [position for position, _ in asked], self._drain()
        try:
            call = self._actor.prompts.remote(positions, released)
            while not ray.wait([call], timeout=_CHECK_EVERY_S)[0]:
                self._check_alive()
            answers, logged = cloudpickle.loads(ray.get(call))
            for name, message in logged:
                logging.getLogger(name).warning("%s", message)
        except Exception as error:
            answers = [self._told(error, positions)] * len(asked)
        for (_, future), answer in zip(asked, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                self._hold(answer)
                future.set_result(answer)

    def _check_alive(self) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        limit_s = self._start_timeout_s if self._pid is None else self._heartbeat_s
        try:
            self._pid = ray.get(self._actor.ping.options(max_task_retries=0).remote(), timeout=limit_s)
        except GetTimeoutError:
            key = "rollout.start_timeout_s" if self._pid is None else "rollout.heartbeat_s"
            _log.warning("the process that makes prompts has not answered within %s=%g s; it is killed", key, limit_s)
            self._pid = None
            ray.kill(self._actor, no_restart=False)
        except RayError:
            self._pid = None  # it is dead, and another starts

    def _told(self, error: Exception, positions: Sequence[int]) -> Exception:
        """What became of a call for prompts: what it raised in the process, or that the process died of it."""
        from ray.exceptions import RayTaskError

        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            return error.cause
        which = f"the prompts {positions[0]} to {positions[-1]}" if len(positions) > 1 else f"prompt {positions[0]}"
        kept = "" if self._pid is None else self._keep_log(self._pid)
        return RolloutError(
            f"the process that makes prompts died while it made {which}, and {_TRIES} times again "
            f"({first_line(error)}){kept and '; '}{kept}"
        )

    def _drain(self) -> list[int]:
        """The prompts that were dropped since the last call. Others may be dropped meanwhile, by any thread."""
        return [self._released.popleft() for _ in range(len(self._released))]

    def _hold(self, prompt: Prompt) -> None:
        if prompt.images:
            hold = _Hold(self._released, prompt.id)
            for image in prompt.images:
                assert isinstance(image, ImageRef)
                image.hold = hold


class _Hold:
    """Notes that a prompt is dropped once nothing refers to this any more."""

    def __init__(self, released: deque[int], prompt_id: int) -> None:
        self._released, self._prompt_id = released, prompt_id

    def __del__(self) -> None:
        self._released.append(self._prompt_id)
