"""How the heads of EAGLE's family are trained: as they draft, on their own predictions.

All draft steps are simulated for all positions at once (training-time test): index t at step s stands for the draft of
the (s + 1)-th token behind the true prefix that ends at t. What is trained is then what is drafted.

`loss.unroll` chooses how. `ttt` is the above. `hass` trains on the same states in the same places, but takes each
step's input from the one before as given, without gradient. Harmonised alignment counts differently: its pass j has at
pair i the output of pass j - 1 at pair i - 1 (outputs shifted right by one), behind true features up to pair i - j and
those of the passes between. With i = t + j that is index t at step j, and the pairs with a true prefix are all that
drafting meets. So one attention serves both, and no pass needs scores of all pairs with all pairs. `none` is a single
step.

Source: EAGLE-3 (arXiv 2503.01840); HASS (arXiv 2408.15766). Deviations, on purpose: the first reply pair (last prompt
state, first reply token), which is the very first draft input, is in the loss; the sum is divided by the number of
positions from which a reply goes on (`losses.valid_pairs`), not by all of the sequence's, which would make the learning
rate depend on the length of prompts. The answer marks alone give that number: a head with a vocabulary of its own
divides by it as well, though the positions outside its vocabulary have no loss, so that no step needs a forward pass to
be counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmspec.heads._drafter import PairHead
from mmspec.heads._objective import SteppedHead
from mmspec.heads._packed import Packed, UnrolledAttention, pack
from mmspec.heads._prefix import Pairs, pair_axes
from mmspec.losses import LossConfig
from mmspec.types import Features, InputError, Target, Unembed


class UnrolledHead(PairHead, SteppedHead):
    """A PairHead with its objective.

    Args:
        config: see PairHead.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    def __init__(self, config: Any, loss: LossConfig | None = None) -> None:
        super().__init__(config)
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
        embeds, bound = features.embeds.flatten(0, 1), features.input_ids.shape[1] + steps
        pairs = self._pairs(features, packed, bound, dtype)
        prefix = self.prefix(pairs)
        places = (packed.positions if pairs.axes is None else pairs.axes[0])[packed.drafts].unsqueeze(0)
        packed = packed if prefix.kept is None else packed.only(prefix.kept)
        drafts, at = packed.drafts, packed.tokens[packed.drafts]
        attention = UnrolledAttention(*self.block.keys_values(prefix.inputs, prefix.rope), packed.runs)
        note = None if prefix.notes is None else prefix.notes[:, drafts]
        rope = self.rotary.at(places, bound, dtype)
        states = self.block.reread(prefix.inputs[:, drafts], rope, attention)
        outputs = [states[0]]
        for step in range(1, steps):
            ahead = embeds[(at + 1 + step).clamp_max(len(embeds) - 1)].to(dtype).unsqueeze(0)
            fed = states.detach() if self.loss.unroll == "hass" else states
            rope = self.rotary.at(places + step, bound, dtype)
            states = self.block(self.pair(ahead, fed, note), rope, attention)
            outputs.append(states[0])
        return packed, outputs

    def _pairs(self, features: Features, packed: Packed, bound: int, dtype: torch.dtype) -> Pairs:
        """The pairs of a batch's packed tokens.

        Raises:
            InputError: the head needs the target's positions, and these features have none.
        """
        tokens, after = packed.tokens, packed.tokens + 1
        visual, axes = features.visual.flatten(), None
        if self.config.rope == "mrope":
            if features.positions is None:
                raise InputError(
                    "head.rope=mrope: these features hold no positions of the target; use head.rope=1d, or train "
                    "without data.features"
                )
            there = torch.stack([tokens, after], -1)
            axes = pair_axes(features.positions.flatten(1)[:, there], visual[there]).squeeze(-1)
        return Pairs(
            features.embeds.flatten(0, 1)[after].to(dtype),
            self.read(features).flatten(0, 1)[tokens].to(dtype),
            packed.positions,
            bound,
            visual[after] if self.marks_images else None,
            axes,
            packed.starts,
        )
