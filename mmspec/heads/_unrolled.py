"""How the heads of EAGLE's family are trained: as they draft, on their own predictions.

All draft steps are simulated for all positions at once (training-time test): index t at step s stands for the draft of
the (s + 1)-th token behind the true prefix that ends at t. What is trained is then what is drafted.

Source: EAGLE-3 (arXiv 2503.01840). Deviations, on purpose: the first reply pair (last prompt state, first reply token),
which is the very first draft input, is in the loss; the sum is divided by the number of positions from which a reply
goes on (`losses.valid_pairs`), not by all of the sequence's, which would make the learning rate depend on the length of
prompts. The answer marks alone give that number: a head with a vocabulary of its own divides by it as well, though the
positions outside its vocabulary have no loss, so that no step needs a forward pass to be counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmspec.heads._drafter import PairHead
from mmspec.heads._packed import Packed, UnrolledAttention, pack
from mmspec.losses import Aims, LossConfig, vocabulary_losses
from mmspec.types import Features, InputError, Objective, Target, Unembed


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

    def take_layer(self, target: Target, index: int) -> None:
        said, theta = f"head.init_layer={index} of {target.name}", target.shape.rope_theta
        if self.config.rope_theta != theta:
            raise InputError(
                f"{said}: its rotary base is {theta:g}, the head's {self.config.rope_theta:g}; "
                f"set head.rope_theta={theta:g}"
            )
        if isinstance(self.block.input_layernorm, nn.Identity):
            raise InputError(f"{said}: the layer norms its input and the head does not; set head.input_norm=true")
        try:
            self.block.start_from(target.layer_weights(index))
        except InputError as error:
            raise InputError(f"{said}: {error}; leave head.init_layer out") from error

    def score(self, states: Tensor, aims: Aims, unembed: Unembed) -> tuple[Tensor, Tensor, Tensor]:
        """See `vocabulary_losses`, for block outputs [M, D]."""
        return vocabulary_losses(states, aims, unembed, self.loss)

    def unroll(self, features: Features, steps: int) -> tuple[Packed, list[Tensor]]:
        """Block outputs of each simulated draft step.

        Args:
            features: a teacher-forced batch.
            steps: S.

        Returns:
            The batch's draft positions, and S tensors [M, D]; entry s at the position t predicts token t + 2 + s,
            having seen s of its own predictions. What lies beyond the reply (`Packed.left`) means nothing.
        """
        packed = pack(features)
        self.block.recompute = self.loss.recompute
        # The parameters' dtype, not the target's: the two may differ (bf16 target, fp32 master weights).
        dtype = next(self.parameters()).dtype
        embeds, drafts = features.embeds.flatten(0, 1), packed.drafts
        bound = features.input_ids.shape[1] + steps
        states = self.enter(self.read(features).flatten(0, 1)[packed.tokens].to(dtype).unsqueeze(0))
        pairs = self.pair(embeds[packed.tokens + 1].to(dtype).unsqueeze(0), states)
        rope = self.rotary.at(packed.positions.unsqueeze(0), bound, dtype)
        attention = UnrolledAttention(*self.block.keys_values(pairs, rope), packed.runs)
        at, positions = packed.tokens[drafts], packed.positions[drafts].unsqueeze(0)
        states = self.block.reread(pairs[:, drafts], self.rotary.at(positions, bound, dtype), attention)
        outputs = [states[0]]
        for step in range(1, steps):
            ahead = embeds[(at + 1 + step).clamp_max(len(embeds) - 1)].to(dtype).unsqueeze(0)
            states = self.block(self.pair(ahead, states), self.rotary.at(positions + step, bound, dtype), attention)
            outputs.append(states[0])
        return packed, outputs

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
        loss, hits, covers = self.score(predicted, Aims(truth, of, weight), unembed)
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
