"""A trained policy without its run: loaded, exported, merged, and asked for completions."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tora.config.components import import_from
from tora.distributed.device import device_for
from tora.errors import ConfigError, nearest
from tora.launch.engines import largest_rank, make_vllm_engine, torch_engine_of, with_engine, worker_arguments
from tora.launch.servable import with_served_model
from tora.protocols import Engine
from tora.run.target import Target
from tora.tasks.encode import encode_prompt
from tora.tasks.prompts import RunPrompts
from tora.tasks.tokenizer import load_tokenizer, stop_token_ids
from tora.types import Group, Prompt, SampleRequest, Sampling

if TYPE_CHECKING:
    import torch

    from actors.worker import RolloutWorker
    from tora.adapters.merge import MergeReport
    from tora.models.decoder import Decoder

_AT_ONCE = 256
"""Prompts between two reports of progress."""


def load_policy(target: Target, device: torch.device) -> Decoder:
    """The policy with its weights on `device`. Raises ConfigError if they do not fit the config."""
    from learner.policy import build_policy
    from learner.training_state import load_weights
    from tora.adapters.inject import refresh, trained_parameters

    model = build_policy(target.cfg, device)
    if target.checkpoint is not None:
        load_weights(target.checkpoint, trained_parameters(model))
        refresh(model)
    return model


def export(target: Target, out: Path) -> None:
    """Write the policy into the new folder `out`: the adapter in PEFT's format, or the whole model of a run that trains
    all weights."""
    from learner.export import export_policy
    from learner.policy import DTYPES

    if target.whole is not None:
        shutil.copytree(target.whole, out)
        return
    cfg = target.cfg
    model = load_policy(target, device_for("cpu"))
    export_policy(model, cfg.model, out, DTYPES[cfg.dtype], is_writer=True)


def export_merged(target: Target, out: Path, dtype: torch.dtype | None = None) -> MergeReport:
    """Write the base with the policy's adapter merged into the new folder `out`, with the run's own chat template; see
    `tora.adapters.merge`. The policy must be an adapter."""
    from learner.policy import DTYPES
    from tora.adapters.inject import snapshot
    from tora.adapters.merge import merge
    from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, split_by_module, views

    cfg = target.cfg
    assert cfg.model.lora_type != "full" and target.whole is None, "a whole model has no adapter"
    if not cfg.model.quantize_base:
        target = replace(target, cfg=replace(cfg, dtype="fp32"))  # DoRA's gains are those of unrounded weights
    tensors = views(snapshot(load_policy(target, device_for("cpu")), 0))
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith((LORA_A, LORA_B, GAIN))}
    report = merge(
        Path(cfg.model.path),
        out,
        adapters=split_by_module({name: t for name, t in tensors.items() if name not in weights}),
        weights=weights,
        quantized_in=DTYPES[cfg.dtype] if cfg.model.quantize_base else None,
        dtype=dtype,
    )
    if cfg.chat_template is not None:
        (out / "chat_template.jinja").write_text(Path(cfg.chat_template).expanduser().read_text())
    return report


@contextmanager
def serving(target: Target) -> Iterator[tuple[RolloutWorker, RunPrompts]]:
    """A rollout worker that serves the policy, and the prompts of its config."""
    from actors.worker import RolloutWorker
    from tora.adapters.inject import snapshot
    from tora.adapters.snapshot import pack

    with tempfile.TemporaryDirectory(prefix="tora-eval-") as scratch:
        cfg = with_engine(replace(target.cfg, output_dir=scratch))
        cfg = with_served_model(cfg, target.cfg.rollout.engine)
        import_from(cfg.import_from or ())
        prompts = RunPrompts(cfg)
        version, vllm = target.step or 0, cfg.rollout.engine == "vllm"
        device = device_for("cpu" if vllm else cfg.device)  # vLLM has a GPU to itself
        model = load_policy(replace(target, cfg=cfg), device)
        make: Callable[[], Engine] = (
            partial(make_vllm_engine, cfg, 1.0, largest_rank(cfg))
            if vllm
            else partial(torch_engine_of, cfg, model, device, shared=True)
        )
        worker = RolloutWorker(make, **worker_arguments(cfg, prompts))
        try:
            worker.forward(snapshot(model, version) if vllm else pack(version, {}))
            yield worker, prompts
        finally:
            worker.close()


def answers(
    worker: RolloutWorker, prompts: Sequence[Prompt], progress: Callable[[int], None] = lambda done: None
) -> list[Group]:
    """The evaluation rollouts of each prompt, in order. `progress` is told how many prompts are done."""
    groups: list[Group] = []
    for start in range(0, len(prompts), _AT_ONCE):
        share = prompts[start : start + _AT_ONCE]
        groups += [result.with_prompt(prompt) for result, prompt in zip(worker.evaluate(share), share, strict=True)]
        progress(len(groups))
    return groups


def generate(
    target: Target, prompts: Sequence[str | list[dict[str, Any]]], *, max_tokens: int | None = None, **sampling: Any
) -> list[str]:
    """One completion of each prompt, in order, by the torch engine. `max_tokens`: the config's by default; `sampling`:
    fields of `Sampling`, greedy by default. Raises ConfigError for a field that does not exist."""
    from tora.adapters.snapshot import pack

    cfg, device = target.cfg, device_for(target.cfg.device)
    tokenizer = load_tokenizer(Path(cfg.model.path), cfg.chat_template)
    stop = stop_token_ids(Path(cfg.model.path), tokenizer)
    names = [each.name for each in fields(Sampling)]
    for name in sampling:
        if name not in names:
            raise ConfigError(f"generate has no argument {name}{nearest(name, names)}")
    given = {"temperature": 0.0, "stop_token_ids": stop, **sampling}
    settings = Sampling(max_tokens or cfg.max_generated_tokens, **given)
    ids = [encode_prompt(tokenizer, prompt, cfg.chat_template_kwargs) for prompt in prompts]
    engine = torch_engine_of(cfg, load_policy(target, device), device, shared=True)
    engine.install(pack(target.step or 0, {}))
    answers = engine.generate([SampleRequest(each, 1, number, settings) for number, each in enumerate(ids)])
    return [tokenizer.decode(answer[0].token_ids.tolist(), skip_special_tokens=True) for answer in answers]
