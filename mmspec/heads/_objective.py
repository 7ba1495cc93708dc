"""What heads that draft several tokens ahead are trained on: all draft steps from all positions, in one sum.

From position t, step s predicts token t + 2 + s, so it estimates the target's state t + 1 + s; all tokens from t + 1 on
belong to one reply (`_packed.pack`). The sum is divided by the number of positions that a draft begins at, which the
answer marks alone tell (`losses.valid_pairs`).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mmspec.heads._packed import Packed
from mmspec.heads.base import DraftHead
from mmspec.losses import Aims, LossConfig, vocabulary_losses
from mmspec.types import Features, Objective, Unembed


class SteppedHead(DraftHead):
    """A DraftHead that says what each of its draft steps predicts, and has its objective here."""

    loss: LossConfig

    @abstractmethod
    def unroll(self, features: Features, steps: int) -> tuple[Packed, list[Tensor]]:
        """Predicted states of each draft step.

        Args:
            features: a teacher-forced batch.
            steps: S; of a head that has fewer, those.

        Returns:
            The batch's draft positions, and S tensors [M, D]; entry s at the position t predicts token t + 2 + s. What
            lies beyond the reply (`Packed.left`) means nothing.
        """

    @abstractmethod
    def step_logits(self, step: int, states: Tensor, unembed: Unembed) -> Tensor:
        """Logits [..., V'] of predicted states [..., D] of one draft step, over the head's vocabulary."""

    def score(self, states: Tensor, aims: Aims, unembed: Unembed) -> tuple[Tensor, Tensor, Tensor]:
        """See `vocabulary_losses`, for predicted states [M, D]; `aims.steps` are given."""
        return vocabulary_losses(states, aims, unembed, self.loss)

    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Objective over answer tokens.

        Sums: `pos_k` drafts of k tokens that are right to the last one, of those right up to the one before; `tau_sim`
        mean tokens a round of chains as long as the unroll; `covered` where the head has a vocabulary of its own.
        """
        packed, outputs = self.unroll(features, self.loss.steps)
        valid = packed.left > torch.arange(len(outputs), device=packed.left.device).unsqueeze(1)  # [S, M]
        steps, drafts = valid.nonzero(as_tuple=True)
        at = packed.tokens[packed.drafts[drafts]] + steps + 1  # of the state that a prediction estimates
        order = at.argsort(stable=True)  # predictions that aim at one position together: its distribution is shared
        places, of = at[order].unique_consecutive(return_inverse=True)
        truth = features.last_hidden.flatten(0, 1)[places].to(outputs[0].dtype)
        predicted = torch.cat([states[here] for states, here in zip(outputs, valid)])[order]
        weight = torch.tensor(self.loss.step_decay, dtype=torch.float64, device=at.device) ** steps[order]
        if features.weight is not None:  # of the token that a prediction chooses, one behind the state it estimates
            weight = weight * features.weight.flatten()[at[order] + 1]
        if not self.loss.first_pair:
            begins = torch.tensor([run.first for run in packed.runs], device=at.device)
            weight = weight * ~torch.isin(packed.drafts[drafts[order]], begins)
        loss, hits, covers = self.score(predicted, Aims(truth, of, weight, steps[order]), unembed)
        hit, covered = torch.zeros_like(valid), torch.zeros_like(valid)
        where = steps[order], drafts[order]
        hit[where], covered[where] = hits, covers
        right = hit.cumprod(0).bool()  # all drafts up to this one
        offered = valid & torch.cat([valid[:1], right[:-1]])
        n_valid = valid[0].sum().float()
        sums = {f"pos_{k}": rights.sum().float() for k, rights in enumerate(right, 1)}
        counts = {f"pos_{k}": tries.sum().float() for k, tries in enumerate(offered, 1)}
        sums |= {"tau_sim": n_valid + right.sum(), "top1": sums["pos_1"], "loss": loss.detach()}
        counts |= {"tau_sim": n_valid, "top1": n_valid, "loss": n_valid}
        if self.draft_ids is not None:
            sums["covered"], counts["covered"] = covered[0].sum().float(), n_valid
        return Objective(loss, n_valid, sums, counts)
