"""Prompts made by several threads: their order, and that they are those of one thread."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import make_prompt
from PIL import Image

from actors.prompt_cursor import PromptCursor, made_at_once
from actors.prompts_ahead import PromptMaker
from tora.config.load import configs_dir
from tora.errors import OverlongPrompt
from tora.models.vision.processor import ImageProcessor
from tora.tasks.prompts import PromptStream
from tora.types import Prompt, RolloutState

WITHIN_S = 20.0


def taken(cursor: PromptCursor, count: int) -> Iterator[Prompt]:
    """The next prompts, waiting for each."""
    deadline = time.monotonic() + WITHIN_S
    while count:
        if (prompt := cursor.take()) is not None:
            count -= 1
            yield prompt
        else:
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.001)


def test_who_waits_is_woken_for_the_next_prompt_alone() -> None:
    futures: list[Future[Prompt]] = []
    calls: list[int] = []

    def ask(position: int) -> Future[Prompt]:
        futures.append(Future())
        return futures[-1]

    cursor = PromptCursor(ask, RolloutState(), ahead=3, on_ready=lambda: calls.append(1))
    assert not cursor.is_ready() and not cursor.is_ready()
    assert len(futures) == 3
    futures[1].set_result(make_prompt(1))
    assert not calls and cursor.take() is None
    futures[0].set_result(make_prompt(0))
    assert len(calls) == 1
    assert [cursor.take(), cursor.take(), cursor.take()] == [make_prompt(0), make_prompt(1), None]
    futures[2].set_exception(OverlongPrompt("too long"))
    assert len(calls) == 2 and cursor.is_ready(), "there may be one"
    assert cursor.take() is None and not cursor.is_ready()
    futures[3].set_result(make_prompt(3))
    assert len(calls) == 3 and cursor.take() == make_prompt(3)


def test_rows_are_read_in_order_by_one_thread_and_prompts_made_by_several() -> None:
    """A prompt that is made sooner than those before it waits for its turn."""
    together = threading.Barrier(3)
    readers: set[int] = set()
    read: list[int] = []

    def make(position: int) -> Prompt:
        if position < 3:
            together.wait(WITHIN_S)  # three prompts are being made at a time
            time.sleep(0.05 * (3 - position))
        if position % 5 == 4:
            raise OverlongPrompt("too long")
        return make_prompt(position)

    def read_row(position: int) -> partial[Prompt]:
        readers.add(threading.get_ident())
        read.append(position)
        return partial(make, position)

    maker = PromptMaker(read_row)
    try:
        cursor = PromptCursor(maker.ask, RolloutState(), ahead=8)
        ids = [prompt.id for prompt in taken(cursor, 30)]
    finally:
        maker.close()
    assert ids == [n for n in range(40) if n % 5 != 4][:30]
    assert read == list(range(len(read))) and len(readers) == 1
    assert cursor.take_dropped() == 7


@pytest.mark.parametrize("ahead", [1, 5])
def test_a_cursor_ahead_of_its_prompts_keeps_the_state_of_one_that_is_not(ahead: int) -> None:
    """Taking, putting back, stopping and resuming at any moment: no prompt is lost and none comes twice."""

    def prompt_at(position: int) -> Prompt:
        if position % 4 == 1:
            raise OverlongPrompt("too long")
        return make_prompt(position)

    state, done, rng = RolloutState(3, [2, 0]), [], np.random.default_rng(0)
    for _ in range(20):
        cursor = PromptCursor(made_at_once(prompt_at), state, ahead=ahead)
        prompts = list(taken(cursor, int(rng.integers(1, 6))))
        back = [prompt for prompt in prompts if rng.random() < 0.3]
        rest = [prompt for prompt in prompts if prompt not in back]
        cursor.put_back(back)
        running = [prompt.id for prompt in rest if rng.random() < 0.3]
        done += [prompt.id for prompt in rest if prompt.id not in running]
        assert cursor.state(running) == cursor.state(running), "asking changes nothing"
        state = cursor.state(running)
    assert len(done) == len(set(done)), "none twice"
    wanted = {n for n in range(state.cursor) if n % 4 != 1} - {1}
    assert {*done, *state.pending} - {n for n in state.pending if n % 4 == 1} == wanted, "none lost"


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(100):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 120 - number, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"prompt": f"What is in picture {number}?", "images": [buffer.getvalue()], "answer": number})
    return rows


def test_prompts_with_images_are_those_of_one_thread() -> None:
    """More images than the processor keeps replacements of, so that threads clear them for each other."""
    base = Path(configs_dir()) / "bases" / "digits"
    alone, shared = (PromptStream(rows, _tokenizer(base), 500, 0, ImageProcessor(base)) for rows in [_rows()] * 2)
    maker = PromptMaker(shared.read)
    try:
        made = list(taken(PromptCursor(maker.ask, RolloutState(), ahead=64), 250))
    finally:
        maker.close()
    assert made == [alone.prompt(position) for position in range(250)]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
