"""Objectives on flat response tokens. Pure: tensors in, loss and metrics out.

To add a loss, write one file here with a class that satisfies `Loss`, and list it below so that configs can name it
`learner.loss.NAME`. If it only makes sense with certain values of other config keys, give the class a literal
`requires`, see `Terms`. A loss in a module of your own needs neither.
"""

from learner.loss.cispo import CISPOLoss as CISPOLoss
from learner.loss.dapo import DAPOLoss as DAPOLoss
from learner.loss.dppo import DPPOLoss as DPPOLoss
from learner.loss.dr_grpo import DrGRPOLoss as DrGRPOLoss
from learner.loss.grpo import GRPOLoss as GRPOLoss
from learner.loss.gspo import GSPOLoss as GSPOLoss
from learner.loss.inputs import LossInputs as LossInputs
from learner.loss.protocol import Loss as Loss
from learner.loss.sapo import SAPOLoss as SAPOLoss
