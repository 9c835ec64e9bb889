"""Prompts made by a process of their own, with real Ray."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from fakes import make_group
from odd_rows import LONG, ODD, PID, WARNED, WRONG, draws, kills, make, sleeps
from stores import stored_mib, wait_until
from tiny import picture

from actors.packed_group import packed_call, unpacked_call
from actors.prompt_process import PromptProcess
from actors.prompts_ahead import PromptMaker
from learner.ray_ranks import read_batch
from tora.batching.batch import micro_batches
from tora.batching.image_ref import ImageRef, fetched
from tora.batching.stored_images import LEAST_BYTES, with_images, without_images
from tora.config.load import load_config
from tora.distributed.ray_logs import keep_log
from tora.errors import ConfigError, ImageLost, LearnerLost, OverlongPrompt, RolloutError, ToraError
from tora.launch.prompt_source import prompt_source
from tora.launch.ray_cluster import ray_session
from tora.models.vision.encoded_image import EncodedImage
from tora.tasks.prompts import RunPrompts
from tora.types import Prompt, TrainBatch

WITHIN_S = 60.0


def started(make: Callable[[int], Prompt] = make, **options: Any) -> PromptProcess:
    """Its process finds `make` by the folder that it is given."""
    folder = str(Path(__file__).parents[1] / "support")
    return PromptProcess(partial(partial, partial, make), [folder], **options)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(2):
            yield


@pytest.fixture(scope="module")
def process() -> Iterator[PromptProcess]:
    with closing(started()) as process:
        yield process


def result(future: Future[Prompt]) -> Prompt:
    return future.result(WITHIN_S)


def pid_of(process: PromptProcess) -> int:
    return int(str(result(process.ask(PID)).source))


def whole(prompt: Prompt) -> Prompt:
    """As its worker has it."""
    return unpacked_call(*packed_call(prompt, 0))[0]


def test_images_are_stored_once_and_go_with_their_prompts() -> None:
    """The first test, of a store that has nothing else yet."""
    with closing(started()) as process:
        prompts = [result(process.ask(position)) for position in (10, 11, 12, 12)]
        for prompt in prompts:
            fetched(prompt.images)
        wait_until(lambda: stored_mib() == 3)
        del prompts[:2], prompts[-1], prompt
        gc.collect()
        again = result(process.ask(2))
        wait_until(lambda: stored_mib() == 2)
        assert whole(prompts[0]).images == make(12).images, "the driver still has it"
        del prompts, again
        result(process.ask(13))
        wait_until(lambda: stored_mib() == 1)


def test_prompts_are_those_of_threads(process: PromptProcess) -> None:
    positions = [0, 1, 2, 2, WARNED, 4]
    prompts = [result(future) for future in [process.ask(position) for position in positions]]
    assert [whole(prompt) for prompt in prompts] == [make(position) for position in positions]
    assert all(len(i) < 40 for prompt in prompts for i in prompt.images), "the driver has no image"
    assert len(packed_call(prompts[0], 0)) == 1
    png = EncodedImage(b"png")
    both = replace(prompts[0], images=(*prompts[0].images, png))
    assert whole(both).images == (*make(0).images, png)


def test_errors_keep_their_kind_and_warnings_arrive(process: PromptProcess, caplog: pytest.LogCaptureFixture) -> None:
    futures = [process.ask(position) for position in (LONG, WRONG, ODD, WARNED)]
    for future, kind, sentence in zip(
        futures[:3],
        (OverlongPrompt, ConfigError, ToraError),
        ("row 3 is too long", "row 5 has no prompt", "OddError: 1 and 2"),
        strict=True,
    ):
        with pytest.raises(kind, match=sentence):
            result(future)
    assert result(futures[3]).id == WARNED
    assert ("tora.of_a_test", logging.WARNING, f"row {WARNED} is cut") in caplog.record_tuples


def test_a_prompt_given_up_before_its_turn_is_not_made(process: PromptProcess) -> None:
    futures = [process.ask(position) for position in range(40, 80)]
    assert futures[-1].cancel()
    assert result(futures[0]).id == 40
    assert result(process.ask(2)).id == 2


def batch_of(prompts: list[Prompt]) -> TrainBatch:
    groups = [make_group(prompt, [0.0, 1.0]) for prompt in prompts]
    micro = micro_batches(
        groups, normalize_advantages=True, normalization="token", max_generated_tokens=8, capacity=1 << 10
    )
    return TrainBatch(micro, 1.0)


def test_a_learner_gets_the_images_that_it_would_have_got_from_the_driver(process: PromptProcess) -> None:
    """Two prompts have the same image, which the batch has once."""
    positions = [0, 1, 1, 2]
    ours = batch_of([result(process.ask(position)) for position in positions])
    theirs = batch_of([make(position) for position in positions])
    (micro,), (expected,) = with_images(without_images(ours)).micro_batches, theirs.micro_batches
    assert micro.images == expected.images and len(micro.images) == 6
    np.testing.assert_array_equal(micro.image_I, expected.image_I)


def test_kill_9_loses_neither_prompts_nor_images(process: PromptProcess) -> None:
    prompts = [result(process.ask(position)) for position in range(3)]
    os.kill(pid_of(process), signal.SIGKILL)
    futures = [process.ask(position) for position in range(20, 40)]
    assert [whole(prompt) for prompt in prompts] == [make(position) for position in range(3)]
    assert [whole(result(future)) for future in futures] == [make(position) for position in range(20, 40)]


@pytest.mark.slow
def test_a_frozen_process_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with closing(started(heartbeat_s=1.0)) as process:
        prompt = result(process.ask(0))
        os.kill(frozen := pid_of(process), signal.SIGSTOP)
        assert whole(prompt) == make(0), "a call that waits is answered by the next process"
        assert result(process.ask(1)).id == 1
        assert pid_of(process) != frozen
    assert "the process that makes prompts has not answered within rollout.heartbeat_s=1 s" in caplog.text


def test_a_row_that_kills_the_process_ends_in_a_sentence(tmp_path: Path) -> None:
    again = "the process that makes prompts died while it made prompt 0, and 3 times again"
    (tmp_path / "config.yaml").touch()
    keep = partial(keep_log, output_dir=str(tmp_path), name="prompt_process")
    with closing(started(kills, keep_log=keep)) as process, pytest.raises(RolloutError, match=again) as raised:
        result(process.ask(0))
    (log,) = tmp_path.rglob("prompt_process*")
    assert str(log) in str(raised.value)
    assert "its last words" in log.read_text()


def test_an_image_that_cannot_be_made_again_is_named(tmp_path: Path) -> None:
    with closing(started(partial(draws, tmp_path / "calls"))) as process:
        prompt = result(process.ask(4))
        os.kill(pid_of(process), signal.SIGKILL)
        with pytest.raises(ConfigError, match=r"another image for prompt 4 .* set prompt_process=false"):
            whole(prompt)


def test_closing_does_not_wait_for_a_row_that_never_comes() -> None:
    process = started(sleeps)
    future = process.ask(0)
    while not future.running():
        time.sleep(0.01)
    began = time.monotonic()
    process.close()
    assert time.monotonic() - began < 10
    started().close()
    assert time.monotonic() - began < 20, "nor for a process that starts"


def test_what_nobody_can_make_again_is_lost_to_worker_and_learner() -> None:
    with closing(started()) as process:
        prompt = result(process.ask(1))
    with pytest.raises(ImageLost, match="images of prompt 1 are lost"):
        whole(prompt)
    with pytest.raises(LearnerLost, match="images of prompt 1 are lost"):
        read_batch(without_images(batch_of([prompt])))


def rows_with(path: Path, size: tuple[int, int]) -> str:
    rows = [{"prompt": "How many?", "image": {"bytes": picture(*size, seed=i)}, "answer": str(i)} for i in range(4)]
    text = datasets.Value("string")
    features = datasets.Features({"prompt": text, "image": datasets.Image(), "answer": text})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return f"dataset={{_component_: tora.tasks.dataset.file_dataset, path: {path}}}"


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("size", "wanted", "made_by"),
    [
        ((8, 8), "null", PromptMaker),
        ((256, 256), "null", PromptProcess),
        ((256, 256), "false", PromptMaker),
    ],
)
def test_large_images_get_a_process(tmp_path: Path, size: tuple[int, int], wanted: str, made_by: type) -> None:
    rows = rows_with(tmp_path / "rows.parquet", size)
    settings = ["eval=null", "async_rl=true", "max_prompt_tokens=4096", f"prompt_process={wanted}", rows]
    cfg = load_config("quickstart_vl", settings)
    prompts = RunPrompts(cfg)
    with closing(prompt_source(cfg, prompts)) as source:
        assert type(source) is made_by
        prompt, expected = result(source.ask(6)), prompts.at(6)
        assert made_by is PromptMaker or whole(prompt) == expected
        assert made_by is PromptProcess or prompt == expected
        assert (len(expected.images[0]) >= LEAST_BYTES) == (size != (8, 8))
        assert isinstance(prompt.images[0], ImageRef) == (made_by is PromptProcess)


def test_an_object_of_a_program_stays_in_the_driver() -> None:
    from tora import GRPOConfig, GRPOTrainer

    base = load_config("quickstart_vl", []).model.path
    rows = [{"prompt": "How many?", "image": picture(256, 256), "answer": "1"}]

    def trainer(wanted: Any) -> GRPOTrainer:
        tora = {"prompt_process": wanted, "async_rl": True, "max_prompt_tokens": 4096}
        return GRPOTrainer(base, "tora.rewards.length", GRPOConfig(max_steps=1, tora=tora), rows)

    cfg = trainer(None).cfg
    with closing(prompt_source(cfg, RunPrompts(cfg))) as source:
        assert type(source) is PromptMaker
    cfg = trainer(True).cfg
    with pytest.raises(ConfigError, match="prompt_process=true needs a dataset that the config names"):
        prompt_source(cfg, RunPrompts(cfg))
