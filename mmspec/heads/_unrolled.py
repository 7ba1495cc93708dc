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

from torch import Tensor, nn

from mmspec.heads._drafter import PairHead
from mmspec.heads._objective import SteppedHead
from mmspec.heads._packed import Packed, UnrolledAttention, pack
from mmspec.losses import LossConfig
from mmspec.types import Features, InputError, Target, Unembed


class UnrolledHead(PairHead, SteppedHead):
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

    def step_logits(self, step: int, states: Tensor, unembed: Unembed) -> Tensor:
        return self.logits(states, unembed)

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
