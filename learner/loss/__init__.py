"""Objectives on flat response tokens. Pure: tensors in, loss and metrics out.

A loss is any callable `LossInputs -> (loss, metrics)` that adds up over a step's micro-batches and has the attributes
`kl_coeff`, `kl_type` and `kl_in`, by which the learner knows whether and where reference log-probs are needed.
"""

from learner.loss.cispo import CISPOLoss
from learner.loss.dapo import DAPOLoss
from learner.loss.dr_grpo import DrGRPOLoss
from learner.loss.grpo import GRPOLoss
from learner.loss.gspo import GSPOLoss
from learner.loss.inputs import LossInputs

__all__ = ["CISPOLoss", "DAPOLoss", "DrGRPOLoss", "GRPOLoss", "GSPOLoss", "LossInputs"]
