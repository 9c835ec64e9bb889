"""Learner: one rank. Packed batches in, metrics and snapshots out; it knows nothing of Ray, engines or tasks.

Shape letters: N response tokens, T packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from learner.activation import checkpoint_layers
from learner.bad_values import check_weights, not_finite, suspects
from learner.begun_step import BegunStep, Sums
from learner.compile import compile_layers
from learner.device_batch import InputBuilder, Inputs, forward
from learner.dropout import AdapterDropout
from learner.export import export_policy
from learner.fsdp import mini_batch_slices, sharder, share_micro_batches
from learner.logprobs import token_logprobs
from learner.loss import LossInputs
from learner.loss.kl import kind_of
from learner.loss.protocol import Loss, build_loss, loss_of
from learner.mismatch import mismatch
from learner.optim import OptimizerSettings, advance, build_optimizer, build_schedule
from learner.policy import DTYPES, check_policy, empty_policy, fill_policy, load_adapter, trains_full_weights
from learner.reference import Reference, adapted_reference, base_reference
from learner.reward_kl import with_reward_kl
from learner.shared_base import SharedBase
from learner.training_state import load_training_state, training_state_files
from learner.trial import Trial
from tora.adapters.inject import adapter_layers, adapters_off, refresh, snapshot, trained_parameters
from tora.adapters.snapshot import pack
from tora.config.calls import call
from tora.config.parts import step_parts
from tora.config.schema import RunConfig
from tora.distributed.device import device_for, memory_gib
from tora.distributed.process_group import World, gather_objects, join, sum_over_ranks
from tora.distributed.sharding import full_tensor, local
from tora.models.base import Decoder
from tora.models.vision.processor import ImageProcessor
from tora.types import Metrics, MicroBatch, PolicySnapshot, StepResult, TrainBatch


class Learner:
    """Implements `tora.protocols.Learner`. Methods are collective: all ranks must call them with the same arguments."""

    def __init__(
        self,
        cfg: RunConfig,
        *,
        shares_model: bool = False,
        shared_base: SharedBase | None = None,
        on_micro_batch: Callable[[], object] = lambda: None,
    ) -> None:
        """`shares_model`: an engine in this process generates with this very model, so snapshots need no tensors.
        `shared_base`: an engine of this process holds the frozen weights; only for a single rank with adapters.
        `on_micro_batch` is called before each pass through the model."""
        self._shares_model, self._shared_base, self._on_micro_batch = shares_model, shared_base, on_micro_batch
        if cfg.num_threads:
            torch.set_num_threads(cfg.num_threads)
        self.cfg, self.world, self.version = cfg, World.from_environment(), 0
        self.device = device_for(cfg.device, self.world.local_rank)
        self._compute = DTYPES[cfg.dtype]
        join(self.world, self.device, alone=trains_full_weights(cfg) and self._compute != torch.float32)
        self.loss: Loss = build_loss(cfg.loss)
        self.model = self._build()
        self._reference = self._load_start()
        rate = cfg.model.lora_dropout if adapter_layers(self.model) else 0.0
        self._dropout = AdapterDropout(self.model, rate, seed=cfg.seed, world=self.world, device=self.device)
        self._parameters = trained_parameters(self.model)
        self._trial = Trial(self.model, self._parameters)
        self._files = ThreadPoolExecutor(1, "files")
        self._writing: Future[None] | None = None
        self._optimizer = build_optimizer(cfg.optimizer, self._parameters.values())
        self._schedule = build_schedule(cfg.lr_scheduler, self._optimizer, cfg.num_steps)
        processor = partial(ImageProcessor, Path(cfg.model.path), cfg.rollout.max_pixels)
        self._build_inputs = InputBuilder(self.model, processor, self.device)
        self._in_parts = step_parts(cfg) > 1
        self._begun: BegunStep | None = None

    def _build(self, *, frozen: bool = False) -> Decoder:
        model = empty_policy(self.cfg, self.device, masters=not frozen)
        if frozen:
            model.requires_grad_(False)
        if self.cfg.compile:
            compile_layers(model)
        kind, offload_activations = self.cfg.activation_checkpointing, self.cfg.activation_offloading
        draws = self.cfg.model.lora_dropout > 0
        checkpoint_layers(model, kind, offload=offload_activations, device=self.device, draws=draws)
        cpu_offload, reshard = self.cfg.fsdp_cpu_offload, self.cfg.fsdp_reshard_after_forward
        shard = sharder(
            self.world, self.device, compute=self._compute, reshard_after_forward=reshard, cpu_offload=cpu_offload
        )
        if self._shared_base is not None:
            assert self.world.size == 1 and not trains_full_weights(self.cfg)
            shard = self._shared_base.sharer(model)
        fill_policy(model, self.cfg, self.device, shard)
        check_policy(model, self.cfg, self.device)
        return model

    def _load_start(self) -> Reference | None:
        """Load `model.adapter_path`, if there is one. Returns the reference policy, None without a KL term."""
        if self.loss.kl_coeff == 0:
            load_adapter(self.model, self.cfg)
            return None
        if not adapter_layers(self.model):
            return Reference(self._build(frozen=True))
        base = base_reference(self.model)
        load_adapter(self.model, self.cfg)
        from_adapter = self.cfg.model.adapter_path is not None and self.loss.reference == "initial"
        return adapted_reference(self.model) if from_adapter else base

    def _logprobs(self, model: Decoder, x: Inputs, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the response tokens, [N] float32 each, in nats."""
        self._on_micro_batch()

        def response_logprobs(hidden_1TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_NH = hidden_1TH[0].index_select(0, x.response_N)
            return token_logprobs(
                hidden_NH,
                model.head,
                x.targets_N,
                temperature=temperature,
                fp32=model.lm_head_fp32,
                logit_map=model.logit_map,
            )

        return forward(model, x, response_logprobs)

    def _ref_logprobs(self, inputs: Sequence[Inputs], temperature: float) -> list[torch.Tensor | None]:
        """Log-probs of the response tokens under the reference policy, [N] each; None without a KL term."""
        if self._reference is None:
            return [None] * len(inputs)
        with self._reference.policy() as model:
            return [self._logprobs(model, x, temperature)[0] for x in inputs]

    def _to_inputs(self, share: Sequence[MicroBatch], step_batches: Sequence[MicroBatch]) -> list[Inputs]:
        """This rank's `share` of `step_batches` on the device."""
        others_have_images = self.world.size > 1 and any(batch.images for batch in step_batches)
        return [self._build_inputs(batch, other_ranks_have_images=others_have_images) for batch in share]

    def accumulate(self, batch: TrainBatch) -> None:
        """Compute the gradients of a part of a step; `step` is given the last one, see `step_parts`."""
        assert self._in_parts and not batch.is_last
        self._begun = begun = self._begun or self._begin()
        self._backward(begun, self._receive(begun, batch), begun.sums, batch.temperature, divisor=1.0)

    def _begin(self) -> BegunStep:
        self._dropout.begin(self.version)
        return BegunStep()

    def _receive(self, begun: BegunStep, batch: TrainBatch) -> slice:
        """Add a batch to the step. Returns where this rank's micro-batches of it are."""
        share = share_micro_batches(batch.micro_batches, self.world.rank, self.world.size)
        inputs = self._to_inputs(share, batch.micro_batches)
        ref = self._ref_logprobs(inputs, batch.temperature)
        if inputs and self.loss.kl_coeff > 0 and self.loss.kl_in == "reward":
            inputs = with_reward_kl(
                inputs,
                [ref_N for ref_N in ref if ref_N is not None],
                batch.micro_batches,
                self.world,
                kl_coeff=self.loss.kl_coeff,
                kl_type=kind_of(self.loss.kl_type, self.loss.kl_in),
                advantage=self.cfg.advantage,
                normalize_advantages=self.cfg.normalize_advantages,
            )
        if self._dropout.is_on or len(mini_batch_slices(share)) * self.cfg.ppo_epochs > 1:
            with torch.no_grad():
                at_start = [self._logprobs(self.model, x, batch.temperature)[0] for x in inputs]
            begun.at_start = [*(begun.at_start or ()), *at_start]
        first = len(begun.share)
        begun.of_all_ranks += batch.micro_batches
        begun.share += share
        begun.inputs += inputs
        begun.ref += ref
        return slice(first, len(begun.share))

    def step(self, batch: TrainBatch) -> StepResult:
        """Optimizer updates on one batch, which all ranks receive and share among them: one for each of its
        mini-batches, `ppo_epochs` times over. With `step_parts` the batch is the last part of a step, and the update is
        that of all its parts.

        An update whose loss or gradient norm is not finite on some rank is left out on all: it changes neither weights
        nor optimizer state, and ends the step. An empty batch and a step without any update advance only the version
        and the learning-rate schedule, which is a function of the step. Metrics of updates are means over the last
        pass. Raises TrainingError if an update makes a weight that is not finite.
        """
        begun, self._begun = self._begun or self._begin(), None
        new = self._receive(begun, batch)
        metrics: Metrics = {"learner/lr": float(self._schedule.get_last_lr()[0])}
        parts = mini_batch_slices(begun.share)
        planned = [*parts.items()] * self.cfg.ppo_epochs
        updates: list[Metrics] = []
        bad = ""
        for number, part in planned:
            total_weight = begun.total_weight(number)
            # the weights of a part are made before that of the whole is known, which then scales what they sum to
            divisor, scale = (1.0, 1.0 / total_weight) if self._in_parts else (total_weight, 1.0)
            sums = Sums() if updates else begun.sums
            rest = part if updates else slice(new.start, part.stop)
            self._backward(begun, rest, sums, batch.temperature, divisor=divisor)
            update, bad = self._update(sums, scale)
            if not updates:
                metrics |= self._mismatch(begun.inputs, sums.before if begun.at_start is None else begun.at_start)
            updates.append(update)
            if bad:
                values = {
                    "actor's log-probs": [x.actor_logprobs_N for x in begun.inputs[part]],
                    "learner's log-probs": sums.before,
                    "reference's log-probs": begun.ref[part],
                    "advantages": [x.advantages_N for x in begun.inputs[part]],
                }
                where = f" in update {len(updates)} of {len(planned)}" if len(updates) > 1 else ""
                bad = f"{bad}{where}; {suspects(begun.share[part], values, batch.prompt_ids)}"
                break
            check_weights(self._parameters.values(), self.version + 1)
        if updates:
            last_pass = updates[(len(updates) - 1) // len(parts) * len(parts) :]
            metrics |= {name: float(np.mean([update[name] for update in last_pass])) for name in last_pass[0]}
        metrics["learner/bad_step"] = float(bool(bad))
        metrics["learner/updates"] = float(len(updates) - bool(bad))
        advance(self.cfg.lr_scheduler, self._schedule)
        self.version += 1
        return StepResult(self.version, metrics, bad, memory_gib(self.device))

    def _proximal(self, x: Inputs, at_start_N: torch.Tensor) -> torch.Tensor:
        """Log-probs of the policy that the loss clips around, [N]."""
        return x.actor_logprobs_N if self.loss.proximal == "actor" else at_start_N

    def _backward(self, begun: BegunStep, part: slice, sums: Sums, temperature: float, *, divisor: float) -> None:
        """Add micro-batches to an update: their gradients to those of the parameters, the rest to `sums`.

        `divisor`: by which a token's weight is divided for its share.
        """
        inputs, ref = begun.inputs[part], begun.ref[part]
        at_start = [None] * len(inputs) if begun.at_start is None else begun.at_start[part]
        for x, ref_N, at_start_N in self._dropout.passes(zip(inputs, ref, at_start, strict=True)):
            logprobs_N, entropy_N = self._logprobs(self.model, x, temperature)
            before_N = logprobs_N.detach()
            loss_inputs = LossInputs(
                learner_logprobs_N=logprobs_N,
                proximal_logprobs_N=self._proximal(x, before_N if at_start_N is None else at_start_N),
                actor_logprobs_N=x.actor_logprobs_N,
                ref_logprobs_N=ref_N,
                entropy_N=entropy_N,
                advantages_N=x.advantages_N,
                weights_N=x.weights_N,
                shares_N=x.weights_N / divisor,
                sequence_N=x.sequence_N,
                num_sequences=len(x.lengths_B),
            )
            loss, metrics = loss_of(self.cfg.loss, self.loss, loss_inputs)
            loss.backward()
            metrics["policy/entropy"] = (loss_inputs.shares_N * entropy_N.detach()).sum()
            sums.add(loss, metrics, before_N)

    def _update(self, sums: Sums, scale: float) -> tuple[Metrics, str]:
        """One optimizer update with `scale` times the gradients. Returns its metrics and why it was left out, empty if
        it was made."""
        parameters = list(self._parameters.values())
        for parameter in parameters if scale != 1.0 else ():
            if parameter.grad is not None:
                local(parameter.grad).mul_(scale)
        limit = self.cfg.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, torch.inf if limit is None else limit)
        grad_norm = full_tensor(norm).item()
        loss, *values = sum_over_ranks(sums.values(scale)).tolist()
        bad = not_finite(loss=loss, gradient_norm=grad_norm)  # both are sums over ranks, so all ranks agree
        if not bad:
            call(self.cfg.optimizer, "optimizer", self._optimizer.step)
            refresh(self.model)
        self._optimizer.zero_grad(set_to_none=True)
        return {**dict(zip(sums.names, values, strict=True)), "learner/grad_norm": grad_norm}, bad

    def _mismatch(self, inputs: Sequence[Inputs], learner_logprobs: Sequence[torch.Tensor]) -> Metrics:
        """`mismatch` over the tokens of all ranks."""
        counts_N = torch.cat([x.weights_N for x in inputs]) > 0  # an idle rank's copy has weights of zero
        log_ratio_N = torch.cat([lp - x.actor_logprobs_N for lp, x in zip(learner_logprobs, inputs, strict=True)])
        versions_N = torch.cat([x.versions_N for x in inputs])
        local = (log_ratio_N[counts_N].cpu().numpy(), versions_N[counts_N].cpu().numpy())
        return mismatch(*(np.concatenate(parts) for parts in zip(*gather_objects(local), strict=True)))

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray:
        """Log-probs of the response tokens at temperature 1, [N] float32; of the base model if `adapter` is false."""
        (x,) = self._to_inputs([batch], [batch])
        off = nullcontext() if adapter else adapters_off(self.model)
        # compiled layers would recompile for a mode that training never uses
        with torch.compiler.set_stance("force_eager"), off:
            return self._logprobs(self.model, x, 1.0)[0].cpu().numpy()

    def snapshot(self) -> PolicySnapshot:
        """The current policy version; without tensors if the engine shares this model."""
        return pack(self.version, {}) if self._shares_model else snapshot(self.model, self.version, self._compute)

    def try_out(self, on: bool) -> None:
        """See `Trial.set`."""
        self._trial.set(on)

    def save(self, folder: Path) -> None:
        """`begin_save` and `end_save`."""
        self.begin_save(folder)
        self.end_save()

    def begin_save(self, folder: Path) -> None:
        """Copy the training state to the host and begin to write it into an existing folder; rank 0 writes. The save
        before must have ended.

        Raises OSError or SafetensorError on rank 0 if the reference's file cannot be written.
        """
        write = training_state_files(
            version=self.version,
            parameters=self._parameters,
            optimizer=self._optimizer,
            schedule=self._schedule,
            settings=OptimizerSettings.from_config(self.cfg),
            is_writer=self.world.rank == 0,
        )
        if self._reference is not None:
            self._reference.save(folder, is_writer=self.world.rank == 0)
        self._writing = self._files.submit(write, folder)

    def end_save(self) -> None:
        """See `tora.protocols.Learner`."""
        if self._writing is not None:
            self._writing.result()

    def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote, on any number of ranks; before the first step only.

        Raises ConfigError if other parameters were trained there, or by another optimizer.
        """
        if self._reference is not None:
            self._reference.restore(folder)
        self.version = load_training_state(
            folder,
            parameters=self._parameters,
            optimizer=self._optimizer,
            schedule=self._schedule,
            settings=OptimizerSettings.from_config(self.cfg),
        )
        refresh(self.model)

    def export(self, folder: Path) -> None:
        """See `export_policy`; rank 0 writes."""
        export_policy(self.model, self.cfg.model, folder, self._compute, is_writer=self.world.rank == 0)
