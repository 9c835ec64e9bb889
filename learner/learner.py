"""Learner: one rank. Takes packed batches, answers with metrics and snapshots; knows no Ray, engines or tasks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from learner.activation import checkpoint_layers
from learner.compile import compile_layers
from learner.device_batch import InputMaker, Inputs, forward
from learner.fsdp import sharder, share_micro_batches
from learner.logprobs import token_logprobs
from learner.loss import LossInputs
from learner.loss.kl import kind_of, sequence_kl
from learner.mismatch import mismatch
from learner.optim import build_optimizer, build_schedule
from learner.policy import DTYPES, device_of, empty_policy, fill_policy
from learner.training_state import load_training_state, save_training_state
from tora.adapters.inject import adapter_layers, adapters_off, refresh, snapshot, trained_parameters
from tora.adapters.peft_format import peft_tensors, save_peft
from tora.adapters.snapshot import pack
from tora.batching.batch import penalize
from tora.config.components import instantiate
from tora.config.schema import RunConfig
from tora.distributed.process_group import SUM, World, gather_objects, join, reduce
from tora.distributed.sharding import gather, whole
from tora.models.decoder import Decoder
from tora.models.load import side_files
from tora.models.vision.processor import ImageProcessor
from tora.types import Metrics, MicroBatch, PolicySnapshot, StepResult, TrainBatch


class Learner:
    def __init__(self, cfg: RunConfig, *, also_samples: bool = False) -> None:
        """`also_samples`: an engine in this process generates on this very model, and snapshots hold no tensors."""
        self._also_samples = also_samples
        if cfg.num_threads:
            torch.set_num_threads(cfg.num_threads)
        self.cfg, self.world, self.version = cfg, World.from_environment(), 0
        self.device = device_of(cfg, self.world.local_rank)
        self._compute = DTYPES[cfg.dtype]
        join(self.world, self.device, alone=_trains_whole(cfg) and self._compute != torch.float32)
        self.loss = instantiate(cfg.loss)
        self.model = self._build()
        self._parameters = trained_parameters(self.model)
        self._optimizer = build_optimizer(cfg.optimizer, self._parameters.values())
        self._schedule = build_schedule(cfg.lr_scheduler, self._optimizer, cfg.num_steps)
        self._reference = self._build_reference()
        processor = partial(ImageProcessor, Path(cfg.model.path), cfg.rollout.max_pixels)
        self._inputs = InputMaker(self.model, processor, self.device)

    def _build(self, *, frozen: bool = False) -> Decoder:
        model = empty_policy(self.cfg, self.device, masters=not frozen)
        if frozen:
            model.requires_grad_(False)
        if self.cfg.compile:
            compile_layers(model)
        kind, away = self.cfg.activation_checkpointing, self.cfg.activation_offloading
        checkpoint_layers(model, kind, offload=away, device=self.device)
        offload, reshard = self.cfg.fsdp_cpu_offload, self.cfg.fsdp_reshard_after_forward
        shard = sharder(
            self.world, self.device, compute=self._compute, reshard_after_forward=reshard, cpu_offload=offload
        )
        fill_policy(model, self.cfg, self.device, shard)
        return model

    def _build_reference(self) -> Decoder | None:
        """The start, frozen, for full-weight runs with a KL term; adapters are simply switched off."""
        if self.loss.kl_coeff == 0 or adapter_layers(self.model):
            return None
        return self._build(frozen=True)

    def _logprobs(self, model: Decoder, x: Inputs, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the response tokens, [N] each."""

        def finish(hidden_1TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_NH = hidden_1TH[0].index_select(0, x.response_N)
            return token_logprobs(hidden_NH, model.head, x.targets_N, temperature=temperature)

        return forward(model, x, finish)

    @torch.no_grad()
    def _ref_logprobs(self, x: Inputs, temperature: float) -> torch.Tensor | None:
        if self.loss.kl_coeff == 0:
            return None
        if self._reference is not None:
            return self._logprobs(self._reference, x, temperature)[0]
        with adapters_off(self.model):
            return self._logprobs(self.model, x, temperature)[0]

    def _on_device(self, mine: Sequence[MicroBatch], whole_step: Sequence[MicroBatch]) -> list[Inputs]:
        others_see = self.world.size > 1 and any(m.images for m in whole_step)
        return [self._inputs(m, others_see=others_see) for m in mine]

    def step(self, batch: TrainBatch) -> StepResult:
        """`ppo_epochs` optimizer updates on one batch, the same on every rank, each of which takes its share.

        An empty batch moves only the version and the schedule.
        """
        mine = share_micro_batches(batch.micro_batches, self.world.rank, self.world.size)
        micro = self._on_device(mine, batch.micro_batches)
        metrics: Metrics = {"learner/lr": self._schedule.get_last_lr()[0]}
        ref = [self._ref_logprobs(x, batch.temperature) for x in micro]
        if self.loss.kl_coeff > 0 and self.loss.kl_in == "reward" and micro:
            micro = self._with_kl_in_reward(batch.micro_batches, micro, ref)
        total_weight = sum(float(m.weights_N.sum(dtype="float64")) for m in batch.micro_batches)
        proximal: list[torch.Tensor | None] = [None] * len(micro)
        if self.cfg.ppo_epochs > 1:
            with torch.no_grad():
                proximal = [self._logprobs(self.model, x, batch.temperature)[0] for x in micro]
        for epoch in range(self.cfg.ppo_epochs if micro else 0):
            update, before = self._update(micro, ref, proximal, batch.temperature, total_weight)
            if epoch == 0:
                metrics |= self._mismatch(micro, before)
            metrics |= update
        self._schedule.step()
        self.version += 1
        return StepResult(self.version, metrics)

    def _with_kl_in_reward(
        self, whole_step: Sequence[MicroBatch], micro: Sequence[Inputs], ref: Sequence[torch.Tensor | None]
    ) -> list[Inputs]:
        """This rank's share with advantages of r - kl_coeff Σ_t KL_t in place of r's.

        A group may be spread over ranks, so each learns every sequence's KL first.
        """
        starts = np.cumsum([0, *(len(m.lengths_B) for m in whole_step)])
        kl_B, kind = np.zeros(starts[-1]), kind_of(self.loss.kl_type, self.loss.kl_in)
        mine = range(
            self.world.rank, len(whole_step), self.world.size
        )  # `share_micro_batches`, less a copy without weight
        for i, x, ref_N in zip(mine, micro, ref, strict=False):
            assert ref_N is not None
            own_B = sequence_kl(x.actor_logprobs_N, ref_N, x.sequence_N, len(x.lengths_B), kind)
            kl_B[starts[i] : starts[i + 1]] = own_B.cpu().numpy()
        kl_B = np.array(list(reduce({str(b): kl for b, kl in enumerate(kl_B)}, SUM, self.device).values()))
        penalized = penalize(whole_step, self.loss.kl_coeff * kl_B, self.cfg.normalize_advantages)
        mine_again = share_micro_batches(penalized, self.world.rank, self.world.size)
        return [
            replace(x, advantages_N=torch.tensor(m.advantages_N, device=self.device))
            for x, m in zip(micro, mine_again, strict=True)
        ]

    def _proximal(self, x: Inputs, at_start_N: torch.Tensor) -> torch.Tensor:
        """[N]: what the clip is around."""
        return x.actor_logprobs_N if self.loss.proximal == "actor" else at_start_N

    def _update(
        self,
        micro: Sequence[Inputs],
        ref: Sequence[torch.Tensor | None],
        proximal: Sequence[torch.Tensor | None],
        temperature: float,
        total_weight: float,
    ) -> tuple[Metrics, list[torch.Tensor]]:
        """One optimizer update over all micro-batches; answers its metrics and the log-probs from before it."""
        totals: dict[str, torch.Tensor] = {}
        before = []
        for x, ref_N, proximal_N in zip(micro, ref, proximal, strict=True):
            logprobs_N, entropy_N = self._logprobs(self.model, x, temperature)
            before.append(logprobs_N.detach())
            inputs = LossInputs(
                learner_logprobs_N=logprobs_N,
                proximal_logprobs_N=self._proximal(x, before[-1] if proximal_N is None else proximal_N),
                actor_logprobs_N=x.actor_logprobs_N,
                ref_logprobs_N=ref_N,
                advantages_N=x.advantages_N,
                weights_N=x.weights_N,
                shares_N=x.weights_N / total_weight,
                sequence_N=x.sequence_N,
                num_sequences=len(x.lengths_B),
            )
            loss, parts = self.loss(inputs)
            loss.backward()
            parts["policy/entropy"] = (inputs.shares_N * entropy_N).sum()
            for name, value in parts.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value
        limit = self.cfg.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), torch.inf if limit is None else limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        refresh(self.model)
        metrics = reduce({name: value.item() for name, value in totals.items()}, SUM, self.device)
        return {**metrics, "learner/grad_norm": whole(norm).item()}, before

    def _mismatch(self, micro: Sequence[Inputs], learner_logprobs: Sequence[torch.Tensor]) -> Metrics:
        """See `mismatch`, over the tokens of all ranks."""
        counts_N = torch.cat([x.weights_N for x in micro]) > 0  # a rank without a share has another's, unweighted
        d_N = torch.cat([lp - x.actor_logprobs_N for lp, x in zip(learner_logprobs, micro, strict=True)])
        versions_N = torch.cat([x.versions_N for x in micro])
        own = (d_N[counts_N].cpu().numpy(), versions_N[counts_N].cpu().numpy())
        return mismatch(*(np.concatenate(parts) for parts in zip(*gather_objects(own), strict=True)))

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        """Log-probs of the response tokens, [N] float32, at temperature 1; under the base where `adapter` is false."""
        (x,) = self._on_device([batch], [batch])
        off = nullcontext() if adapter else adapters_off(self.model)
        # compiled layers would be compiled again for a mode that training never meets
        with torch.compiler.set_stance("force_eager"), off:
            return self._logprobs(self.model, x, 1.0)[0].cpu().numpy()

    def snapshot(self) -> PolicySnapshot:
        return pack(self.version, {}) if self._also_samples else snapshot(self.model, self.version, self._compute)

    def save(self, folder: Path) -> None:
        save_training_state(
            folder,
            version=self.version,
            parameters=self._parameters,
            optimizer=self._optimizer,
            schedule=self._schedule,
            is_writer=self.world.rank == 0,
        )

    def restore(self, folder: Path) -> None:
        self.version = load_training_state(
            folder, parameters=self._parameters, optimizer=self._optimizer, schedule=self._schedule
        )
        refresh(self.model)

    def export(self, folder: Path) -> None:
        """The adapter in PEFT's format; a full-weight run writes a Hugging Face folder."""
        if adapter_layers(self.model):
            tensors = gather(peft_tensors(self.model))
            if self.world.rank == 0:
                save_peft(tensors, self.cfg.model, folder)
            return
        weights = gather(dict(self.model.named_parameters()))  # a vision tower may be among them, untrained
        if self.world.rank > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in side_files(Path(self.cfg.model.path)):
            if "safetensors" not in file.name:  # the index of weights that come as several files
                shutil.copy(file, folder)
        tensors = {
            self.model.names.parameter_to_hf(name): p.detach().to(self._compute).cpu().contiguous()
            for name, p in weights.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _trains_whole(cfg: RunConfig) -> bool:
    return cfg.model.lora_type == "full" or cfg.model.train_vision == "full"
