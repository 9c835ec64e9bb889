"""A snapshot's way into a vLLM slot and back, on vLLM's own layers: values, and the order of work on two streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import vllm_layers
from torch.overrides import TorchFunctionMode
from vllm_layers import PACKED, RANK_MAX, SIZES, adapter, layers, manager, share, weights

from actors.vllm_engine import worker_extension
from actors.vllm_engine.adapter_slots import stage
from actors.vllm_engine.model_differences import unpacked_as_stored
from actors.vllm_engine.slot_places import find_places
from actors.vllm_engine.streams import HostStreams
from actors.vllm_engine.worker_extension import SnapshotExtension
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, engine_digest, pack, split_by_module
from tora.errors import SyncError

PARTLY = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "lora": adapter(list(SIZES), 16, 1),
    "dora": adapter(list(SIZES), 16, 2, gains=list(SIZES)),
    "partly, small rank": adapter(PARTLY, 3, 3, gains=["q_proj"]),
    "one": adapter(["up_proj"], 16, 4),
}
LAYER_OF = {module: layer for layer, modules in PACKED.items() for module in modules}


def worker(made: dict[str, Any], device: str = "cpu") -> SnapshotExtension:
    found: Any = SnapshotExtension()
    found.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager(made)))
    found.device = torch.device(device)
    return found


def part_of(made: dict[str, Any], module: str, slot: int) -> dict[str, torch.Tensor]:
    """A, B, gain and offset that a slot holds for one module."""
    layer, part = made[LAYER_OF[module]], PACKED[LAYER_OF[module]].index(module)
    offset = layer.offset_SO
    return {
        LORA_A: layer.lora_a_stacked[part][slot, 0],
        LORA_B: layer.lora_b_stacked[part][slot, 0],
        GAIN: layer.gain_part(slot, part),
        "offset": torch.zeros(()) if offset is None else layer.rows_of(offset[slot], part),
    }


def expected_part(module: str, sent: dict[str, torch.Tensor], dtype: torch.dtype, rank: int, ranks: int) -> Any:
    """By hand: this rank's share, zero above the adapter's own rank, gain of ones where there is none."""
    layer = LAYER_OF[module]
    row_parallel = layer == "down_proj"
    size_in, size_out = SIZES[module]
    a, b, gain = torch.zeros(RANK_MAX, size_in), torch.zeros(size_out, RANK_MAX), torch.ones(size_out)
    if sent:
        a[: len(sent[LORA_A])], b[:, : len(sent[LORA_A])] = sent[LORA_A], sent[LORA_B]
        gain = sent.get(GAIN, gain)
    offset = (1 - gain) * weights()[module][1].to(dtype).float()
    if row_parallel:
        a = share(layer, a, rank, ranks)
        offset = offset if rank == 0 else torch.zeros(())
    else:
        b, gain, offset = (share(layer, x, rank, ranks) for x in (b, gain, offset))
    return {LORA_A: a.to(dtype), LORA_B: b.to(dtype), GAIN: gain, "offset": offset}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_a_slot_holds_what_was_sent_and_reads_back_as_that(dtype: torch.dtype, rank: int, ranks: int) -> None:
    """One slot after another, and the first one again: nothing of the adapter before stays."""
    made = layers(dtype, rank=rank, ranks=ranks)
    extension = worker(made)
    for version, name in enumerate([*ADAPTERS, "lora", "dora", "one"]):
        snapshot, adapter_id = pack(version, ADAPTERS[name]), 1 + version % 2
        extension.write_snapshot(extension.stage_snapshot(snapshot), adapter_id)
        held = extension.read_snapshot(snapshot, adapter_id)
        assert held.sha256 == engine_digest(snapshot, held.dtype), name
        assert (held.dtype, held.num_modules) == (str(dtype)[6:], len(split_by_module(ADAPTERS[name])))
        slot = extension._manager.lora_index_to_id.index(adapter_id)
        for module in SIZES:
            sent = split_by_module(ADAPTERS[name]).get(module, {})
            want = expected_part(module, sent, dtype, rank, ranks)
            for suffix, tensor in part_of(made, module, slot).items():
                torch.testing.assert_close(tensor, want[suffix].expand_as(tensor), rtol=0, atol=0)


def test_an_adapter_that_the_snapshot_lacks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layers(torch.float32)
    extension, snapshot = worker(made), pack(1, ADAPTERS["one"])
    extension.write_snapshot(extension.stage_snapshot(snapshot), 1)
    for poison in (1.0, float("nan")):
        made["qkv"].lora_b_stacked[1][0, 0, 3, 2] = poison
        with pytest.raises(SyncError, match="qkv is adapted"):
            extension.read_snapshot(snapshot, 1)
    made["qkv"].lora_b_stacked[1].zero_()
    made["gate_up"].gain_SO[0, 5] = 1.001  # a gate's gain, while up alone was sent
    with pytest.raises(SyncError, match="gate_up is adapted"):
        extension.read_snapshot(snapshot, 1)


def test_layers_for_plain_lora_have_no_gains_and_refuse_them() -> None:
    made = layers(torch.bfloat16, gains=False)
    extension, snapshot = worker(made), pack(1, ADAPTERS["lora"])
    assert not [name for layer in made.values() for name, _ in layer.named_buffers() if "gain" in name]
    extension.write_snapshot(extension.stage_snapshot(snapshot), 1)
    held = extension.read_snapshot(snapshot, 1)
    assert (held.sha256, held.num_modules) == (engine_digest(snapshot, "bfloat16"), len(SIZES))
    with pytest.raises(SyncError, match="started for plain LoRA"):
        extension.stage_snapshot(pack(2, ADAPTERS["partly, small rank"]))


class Recorder(HostStreams):
    """The order in which a sync uses the streams."""

    def __init__(self) -> None:
        self.lane, self.log, self.events = "engine", list[Any](), 0

    @contextmanager
    def own(self) -> Iterator[None]:
        self.lane = "own"
        yield
        self.lane = "engine"

    def record(self) -> int:
        self.events += 1
        self.log.append((self.lane, "records", self.events))
        return self.events

    def wait(self, event: Any) -> None:
        self.log.append((self.lane, "waits for", event))

    def wait_on_host(self, event: Any) -> None:
        self.log.append(("host", "waits for", event))

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        self.log.append((self.lane, "uploads", len(data)))
        return data

    def download(self, data: torch.Tensor) -> torch.Tensor:
        self.log.append((self.lane, "downloads", len(data)))
        return data

    def keep(self, buffer: torch.Tensor) -> None:
        self.log.append((self.lane, "keeps", len(buffer)))


class Copies(TorchFunctionMode):
    """Notes copies in a `Recorder`'s log, and on the engine's stream whatever waits for a device."""

    def __init__(self, streams: Recorder) -> None:
        self.streams = streams

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._foreach_copy_:
            self.streams.log.append((self.streams.lane, "copies", len(args[0])))
        elif getattr(func, "__name__", "") in ("cpu", "item", "tolist", "__bool__", "nonzero"):
            self.streams.log.append((self.streams.lane, "stalls", func.__name__))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_order_of_work_on_the_two_streams(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every copy between host and device is one, on the own stream; the engine's stream copies within the device, after
    the upload and before the download; and freed memory is not reused under it."""
    streams = Recorder()
    monkeypatch.setattr(worker_extension, "streams_for", lambda device: streams)
    extension = worker(layers(torch.bfloat16))
    snapshot = pack(1, ADAPTERS[kind])
    staged = extension.stage_snapshot(snapshot)
    with Copies(streams):
        again = extension.stage_snapshot(snapshot)
    started = streams.log[3:]
    assert [entry for entry in started if entry[1] != "stalls"] == [
        ("own", "uploads", len(snapshot.data)),
        ("own", "copies", len(snapshot.entries)),
        ("own", "records", 2),
        ("host", "waits for", 2),
    ]
    streams.log.clear()
    with Copies(streams):
        extension.write_snapshot(again, 1)
    gains = [("engine", "copies", 6)] if kind == "dora" else []  # three layers' gains, and the offsets of their biases
    assert streams.log == [
        ("engine", "waits for", 2),
        ("engine", "copies", 2 * len(SIZES)),
        *gains,
        ("engine", "keeps", len(staged.buffer)),
        ("engine", "records", 3),
    ]
    streams.log.clear()
    with Copies(streams):
        extension.read_snapshot(snapshot, 1)
    lane, what, nbytes = streams.log[2]
    assert (lane, what) == ("own", "downloads") and nbytes > sum(SIZES[m][0] + SIZES[m][1] for m in SIZES) * 16 * 2
    assert [entry for entry in streams.log if entry[1] != "stalls"] == [
        ("own", "waits for", 3),
        ("own", "copies", 3 * len(SIZES)),
        ("own", "downloads", nbytes),
        ("own", "records", 4),
        ("host", "waits for", 4),
    ]
    assert not [entry for entry in streams.log[:5] if entry[1] == "stalls"], "nothing waits before the download"


class ToMeta(HostStreams):
    def upload(self, data: torch.Tensor) -> torch.Tensor:
        return data.to("meta")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_snapshot_is_staged_on_the_device_alone(name: str) -> None:
    """The meta device stands for a GPU: torch joins no tensors of two devices. With a gain of q alone, ones for k and v
    were made on the CPU once."""
    made = layers(torch.bfloat16, device="meta")
    snapshot = pack(1, ADAPTERS[name])
    staged = stage(manager(made), snapshot, split_by_module(ADAPTERS[name]), ToMeta())
    assert staged.buffer.device.type == "meta"
    for layer in staged.placed.values():
        assert {tensor.dtype for part in layer.parts for tensor in part.values()} == {torch.bfloat16}
    worker(made, "meta").write_snapshot(staged, 1)


def test_layers_of_the_tests_are_vllms_own() -> None:
    for layer in vllm_layers.layers(torch.float32).values():
        assert type(layer).__mro__[2].__module__.startswith("vllm.lora.layers")


def test_a_layer_that_is_stored_whole_takes_one_adapter() -> None:
    """GLM-4's files have q, k and v apart, and gate and up in one; vLLM lists both as packed."""
    listed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    stored = {"q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj"}
    assert unpacked_as_stored(listed, stored) == {**listed, "gate_up_proj": ["gate_up_proj"]}
    assert unpacked_as_stored(listed, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}) == listed
    assert unpacked_as_stored(listed, set()) == listed


def test_a_layer_with_more_parts_than_modules_takes_none_of_them() -> None:
    """vLLM has Qwen3.5's in_proj_qkv and in_proj_z as one layer of four: a module's number is not its part's."""
    found = manager(layers(torch.float32))
    assert find_places(found, ["k_proj"])["k_proj"].part == 1
    found.packed_modules = {**PACKED, "qkv": ["qk_proj", "v_proj"]}
    with pytest.raises(SyncError, match="v_proj is one of 2 modules in a layer of the engine with 3 parts"):
        find_places(found, ["v_proj"])
