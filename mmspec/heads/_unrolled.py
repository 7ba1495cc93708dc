"""How the heads of EAGLE's family are trained: as they draft, on their own predictions.

All draft steps are simulated for all positions at once (training-time test): index t at step s stands for the draft of
the (s + 1)-th token behind the true prefix that ends at t. What is trained is then what is drafted.

Source: EAGLE-3 (arXiv 2503.01840). Deviations, on purpose: the first reply pair (last prompt state, first reply token),
which is the very first draft input, is in the loss; the sum is divided by the number of positions that have a loss, not
by all of the sequence's, which would make the learning rate depend on the length of prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmspec.heads._drafter import PairHead
from mmspec.losses import Aims, LossConfig, vocabulary_losses
from mmspec.nn import UnrolledAttention
from mmspec.types import Features, Objective, Unembed


class UnrolledHead(PairHead):
    """A PairHead with its objective.

    Args:
        config: see PairHead.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    def __init__(self, config: Any, loss: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.loss = loss or LossConfig()

    def score(self, states: Tensor, aims: Aims, unembed: Unembed) -> tuple[Tensor, Tensor, Tensor]:
        """See `vocabulary_losses`, for block outputs [M, D]."""
        return vocabulary_losses(states, aims, unembed, self.loss)

    def unroll(self, features: Features, steps: int) -> list[Tensor]:
        """Block outputs of each simulated draft step.

        Args:
            features: a teacher-forced batch.
            steps: S.

        Returns:
            S tensors [B, T - 2, D]; entry s at index t predicts token t + 2 + s, having seen s of its own predictions.
            Indices whose inputs lie beyond the sequence hold repeats of the last one; the mask leaves them out.
        """
        # The parameters' dtype, not the target's: the two may differ (bf16 target, fp32 master weights).
        dtype = next(self.parameters()).dtype
        T = features.input_ids.shape[1]
        index = torch.arange(T - 2, device=features.input_ids.device)
        embeds = features.embeds.to(dtype)
        states = self.enter(self.read(features)[:, : T - 2].to(dtype))
        attention, outputs = UnrolledAttention(), []
        for step in range(steps):
            rope = self.rotary.at((index + step).unsqueeze(0), T + steps, dtype)
            shifted = embeds[:, (index + 1 + step).clamp_max(T - 1)]
            states = self.block(self.pair(shifted, states), rope, attention)
            outputs.append(states)
        return outputs

    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Objective over answer tokens.

        The shift contract: at step s the input token x_{t+1+s} and the predicted token x_{t+2+s}, and all drafted ones
        between, belong to the same reply, so t runs from the last prompt token of the turn on.

        Sums: `pos_k` drafts of k tokens that are right to the last one, of those right up to the one before; `tau_sim`
        mean tokens a round of chains as long as the unroll; `covered` where the head has a vocabulary of its own.
        """
        outputs = self.unroll(features, self.loss.steps)
        valid = _valid(features.answer, len(outputs))
        steps, rows, columns = valid.nonzero(as_tuple=True)
        T = features.input_ids.shape[1]
        at = rows * T + columns + steps + 1  # of the state that a prediction estimates
        order = at.argsort(stable=True)  # predictions that aim at one position together: its distribution is shared
        places, of = at[order].unique_consecutive(return_inverse=True)
        truth = features.last_hidden.to(outputs[0].dtype).flatten(0, 1)[places]
        predicted = torch.cat([states[here] for states, here in zip(outputs, valid)])[order]
        weight = torch.tensor(self.loss.step_decay, dtype=torch.float64, device=at.device) ** steps[order]
        loss, hits, covers = self.score(predicted, Aims(truth, of, weight), unembed)
        hit, covered = torch.zeros_like(valid), torch.zeros_like(valid)
        where = steps[order], rows[order], columns[order]
        hit[where], covered[where] = hits, covers
        right = hit.cumprod(0).bool()  # all drafts up to this one
        offered = valid & torch.cat([valid[:1], right[:-1]])
        n_valid, count = valid[0].sum().float(), covered[0].sum().float()
        sums = {f"pos_{k}": rights.sum().float() for k, rights in enumerate(right, 1)}
        counts = {f"pos_{k}": tries.sum().float() for k, tries in enumerate(offered, 1)}
        sums |= {"tau_sim": n_valid + right.sum(), "top1": sums["pos_1"], "loss": loss.detach()}
        counts |= {"tau_sim": n_valid, "top1": n_valid, "loss": count}
        if self.draft_ids is not None:
            sums["covered"], counts["covered"] = count, n_valid
        return Objective(loss, count, sums, counts)


def _valid(answer: Tensor, steps: int) -> Tensor:
    """[S, B, T - 2] bool: which predictions count.

    Args:
        answer: [B, T] reply numbers.
        steps: S.
    """
    T = answer.shape[1]
    index = torch.arange(T - 2, device=answer.device)
    reply = answer[:, 1 : T - 1]
    ahead = index + 2 + torch.arange(steps, device=answer.device).unsqueeze(1)
    same = (answer[:, ahead.clamp_max(T - 1)].transpose(0, 1) == reply) & (ahead < T).unsqueeze(1)
    return ((reply > 0) & same).cumprod(0).bool()
