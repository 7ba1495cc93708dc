"""EAGLE: a one-layer autoregressive head on the target's last hidden state, drafting with the dynamic tree of EAGLE-2.

The head reads pairs (f_i, e(x_{i+1})): the target's state and the embedding of the token that followed (at image
positions the projected image feature), and predicts f_{i+1}, whose frozen unembedding gives x_{i+2}. A draft step feeds
the head its own prediction in place of f.

Source: EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858). Deviations, on purpose: trained with the unrolled
attention of EAGLE-3's training-time test instead of noise on f; the first reply pair (last prompt state, first reply
token), which is the very first draft input, is in the loss; positions are 1-D pair indices whatever the target uses.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmspec.cache import RaggedKV
from mmspec.heads.base import DraftHead
from mmspec.losses import LossConfig, vocabulary_losses
from mmspec.nn import DecoderBlock, RotaryTable, UnrolledAttention, attend
from mmspec.sampling import DRAFT_STREAM, KeyedSampler, Penalties, gumbel_noise
from mmspec.tree import best_of_pool, from_parents, root_only
from mmspec.types import (
    Features,
    Forward,
    Objective,
    Plan,
    Proposals,
    Request,
    Round,
    Sampler,
    Target,
    TargetShape,
    Tree,
    Unembed,
)

_FLUSH = 64
"""Pairs that may wait while a row is skipped; beyond that one cheap key/value projection takes them in."""


@dataclass(frozen=True)
class Config:
    """Shape of the head; 0 means "as the target".

    Args:
        hidden_size, vocab_size: the target's own; checked when the head is loaded.
        intermediate_size, n_heads, n_kv_heads, head_dim: of the block.
        rope_theta: base of the 1-D rotary positions over pair indices.
        rms_eps: of the norms.
        input_norm: RMSNorm before attention (the papers' block has none).
        image_input: what the head sees at image positions; `embeds` is the projected image feature.
        rope: `1d`, pair indices.
    """

    hidden_size: int = 0
    vocab_size: int = 0
    intermediate_size: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 10000.0
    rms_eps: float = 0.0
    input_norm: bool = False
    image_input: str = "embeds"
    rope: str = "1d"

    def __post_init__(self) -> None:
        if self.image_input != "embeds":
            raise ValueError(f"head.image_input: the eagle head knows only 'embeds', got '{self.image_input}'")
        if self.rope != "1d":
            raise ValueError(f"head.rope: the eagle head knows only '1d', got '{self.rope}'")

    def resolve(self, shape: TargetShape) -> Config:
        """Fill in what was left at 0 from the target's shape."""
        return replace(
            self,
            hidden_size=self.hidden_size or shape.hidden_size,
            vocab_size=self.vocab_size or shape.vocab_size,
            intermediate_size=self.intermediate_size or shape.intermediate_size,
            n_heads=self.n_heads or shape.n_heads,
            n_kv_heads=self.n_kv_heads or shape.n_kv_heads,
            head_dim=self.head_dim or shape.head_dim,
            rms_eps=self.rms_eps or shape.rms_eps,
        )


class Head(DraftHead):
    """The EAGLE head.

    Args:
        config: a resolved Config.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    def __init__(self, config: Config, loss: LossConfig | None = None) -> None:
        super().__init__()
        if not config.hidden_size:
            raise ValueError("eagle.Config has hidden_size 0; call config.resolve(target.shape) first")
        self.config = config
        self.loss = loss or LossConfig()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.block = DecoderBlock(
            config.hidden_size,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_eps,
            config.input_norm,
        )
        self.rotary = RotaryTable(config.head_dim, config.rope_theta)

    def pair(self, embeds: Tensor, states: Tensor) -> Tensor:
        """Block input u = W_fc [e; f] + b; both [..., D]."""
        return self.fc(torch.cat([embeds, states], -1))

    def unroll(self, features: Features, steps: int) -> list[Tensor]:
        """Block outputs of each simulated draft step.

        Args:
            features: a teacher-forced batch.
            steps: S.

        Returns:
            S tensors [B, T - 2, D]; entry s at index t estimates f_{t+1+s}, having seen s of its own predictions.
            Indices whose inputs lie beyond the sequence hold repeats of the last one; the mask leaves them out.
        """
        T = features.last_hidden.shape[1]
        index = torch.arange(T - 2, device=features.last_hidden.device)
        states, attention, outputs = features.last_hidden[:, : T - 2], UnrolledAttention(), []
        for step in range(steps):
            embeds = features.embeds[:, (index + 1 + step).clamp_max(T - 1)]
            rope = self.rotary.at((index + step).unsqueeze(0), T + steps, states.dtype)
            states = self.block(self.pair(embeds, states), rope, attention)
            outputs.append(states)
        return outputs

    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Objective over answer tokens.

        The shift contract: at step s the input token x_{t+1+s} and the predicted token x_{t+2+s}, and all drafted ones
        between, belong to the same reply, so t runs from the last prompt token of the turn on.
        """
        answer, T = features.answer, features.input_ids.shape[1]
        # The parameters' dtype, not the target's: the two may differ (bf16 target, fp32 master weights).
        dtype = self.fc.weight.dtype
        features = _cast(features, dtype)
        index = torch.arange(T - 2, device=answer.device)
        reply = answer[:, 1 : T - 1]
        valid = joint = reply > 0
        total = features.last_hidden.new_zeros((), dtype=torch.float32)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        n_valid = tau = total
        for step, states in enumerate(self.unroll(features, self.loss.steps)):
            ahead = (index + 2 + step).clamp_max(T - 1)
            valid = valid & (answer[:, ahead] == reply) & (index + 2 + step < T)
            if step == 0:
                n_valid = valid.sum()
                joint, tau = valid, n_valid.float()
            truth = features.last_hidden[:, (index + 1 + step).clamp_max(T - 1)]
            loss, hit = vocabulary_losses(states[valid], truth[valid], unembed, self.loss)
            total = total + self.loss.step_decay**step * loss
            hits = torch.zeros_like(valid)
            hits[valid] = hit
            offered = joint & valid
            joint = offered & hits
            sums[f"pos_{step + 1}"], counts[f"pos_{step + 1}"] = joint.sum().float(), offered.sum().float()
            tau = tau + joint.sum()
        sums |= {"tau_sim": tau, "top1": sums["pos_1"], "loss": total.detach()}
        counts |= {name: n_valid.float() for name in ("tau_sim", "top1", "loss")}
        return Objective(total, n_valid, sums, counts)

    def drafter(
        self, target: Target, width: int, sampler: Sampler | None = None, widths: Sequence[int] = ()
    ) -> EagleDrafter:
        return EagleDrafter(self, target, width, sampler, widths)


@functools.lru_cache(maxsize=64)
def _pool_constants(k: int, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Parents of the root and the first two levels; where each further beam's level starts in the pool."""
    nodes = [-1, *[0] * k, *(node for node in range(1, k + 1) for _ in range(k) if depth > 1)]
    starts = [1 + k + k * k * level for level in range(depth - 2) for _ in range(k)]
    with torch.inference_mode(False):
        return torch.tensor(nodes, device=device), torch.tensor(starts, dtype=torch.long, device=device)


def _cast(features: Features, dtype: torch.dtype) -> Features:
    return replace(features, last_hidden=features.last_hidden.to(dtype), embeds=features.embeds.to(dtype))


class EagleDrafter:
    """Drafts with an EAGLE head: one catch-up pass, then one pass a level over the `width` best nodes.

    Invariant: `kv` holds keys and values of the pairs 0..m-1 of each row; pairs the target has committed since wait in
    `pending` (states and next tokens). Their sum is the row's committed length n, and the last waiting pair is always
    (f_{n-1}, root). A skipped row only waits: its head is never run to keep it in sync.

    Args:
        head: in eval mode, on the target's device and dtype.
        target: for its frozen embedding and unembedding.
        width: beams a level, and children a beam.
        sampler: with a KeyedSampler the candidates are what its noise makes of the head's distribution (`_scored`).
        widths: draw candidates from the head's distribution instead, this many at a node of each level and 1 beyond;
            needs a KeyedSampler, which makes that distribution of the logits. The budget cuts such trees in level
            order, whatever was drawn.
        noise_share: how much of the sampler's noise goes into the choice of candidates, 0 to 1.

    Penalties of the sampler are left to the verification: they change what is accepted, not what is emitted.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        head: Head,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        noise_share: float = 0.3,
    ) -> None:
        if width < 1 or any(w < 1 for w in widths):
            raise ValueError(f"the tree's width must be at least 1, got {width} and {tuple(widths)}")
        if widths and not isinstance(sampler, KeyedSampler):
            raise ValueError("drawing candidates (widths) needs a KeyedSampler; greedy decoding has nothing to draw")
        self.sampler = replace(sampler, penalties=Penalties()) if isinstance(sampler, KeyedSampler) else None
        self.widths, self.noise_share = tuple(widths), noise_share
        # A head in training is copied: freezing it here would stop its training without a word.
        frozen = not (head.training or any(p.requires_grad for p in head.parameters()))
        head = head if frozen else copy.deepcopy(head)
        self.head = head.to(target.device, target.dtype).eval().requires_grad_(False)
        self.head.block.fuse()
        self.target, self.width = target, width
        self.max_depth = 32

    def open(self, max_batch: int, max_tokens: int) -> None:
        """Allocate for `max_batch` rows of at most `max_tokens` committed tokens."""
        c, device = self.head.config, self.target.device
        beams = math.prod(self.widths) if self.widths else self.width
        capacity = max_tokens + max(beams * self.max_depth, _FLUSH + self.max_depth)
        self.kv = RaggedKV(1, max_batch, c.n_kv_heads, capacity, c.head_dim, self.target.dtype, device)
        self.states = torch.zeros((max_batch, 1, c.hidden_size), dtype=self.target.dtype, device=device)
        self.tokens = torch.zeros((max_batch, 1), dtype=torch.long, device=device)
        self.waiting = [0] * max_batch
        self.keys = torch.zeros(max_batch, dtype=torch.long, device=device)
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        own = torch.eye(self.width, dtype=torch.bool, device=device)
        # Additive mask of the beams of all levels: each sees itself, and what it inherits is filled in level by level.
        self.own = torch.zeros((1, 1, self.width, self.width), dtype=self.target.dtype, device=device)
        self.own = self.own.masked_fill_(~own, float("-inf")).repeat(1, 1, 1, self.max_depth)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        """Note a new row; its prompt is run through the head when it is first drafted for."""
        assert forward.embeds is not None
        self.kv.set_length(row, 0)
        self.states[row, 0] = forward.last_hidden[0, -1]
        self.tokens[row, 0] = root
        self.keys[row] = request.key
        self.waiting[row] = 1
        if len(request.prompt) > 1:
            self.prompts[row] = (forward.embeds[:, 1:], forward.last_hidden[:, :-1])

    def evict(self, row: int) -> None:
        self.kv.set_length(row, 0)
        self.waiting[row] = 0
        self.prompts.pop(row, None)

    def observe(self, round: Round) -> None:
        """Queue the pairs that the round committed: states at the kept nodes with the tokens that followed them."""
        path, tokens, D = round.accepted.path, round.accepted.tokens, self.states.shape[-1]
        states = round.forward.last_hidden.gather(1, path.unsqueeze(-1).expand(-1, -1, D))
        counts = [len(p) for p in round.paths]
        if not any(self.waiting):
            self.states, self.tokens, self.waiting = states, tokens, counts
            return
        held, P = self.states.shape[1], path.shape[1]
        start = torch.tensor(self.waiting, device=path.device).unsqueeze(1)
        slots = start + torch.arange(P, device=path.device)
        self.states = torch.cat([self.states, states.new_zeros(states.shape)], 1)
        self.states.scatter_(1, slots.unsqueeze(-1).expand(-1, -1, D), states)
        self.tokens = torch.cat([self.tokens, tokens.new_zeros(tokens.shape)], 1).scatter_(1, slots, tokens)
        self.waiting = [w + c for w, c in zip(self.waiting, counts)]
        width = max(self.waiting)
        if width < held + P:
            self.states, self.tokens = self.states[:, :width], self.tokens[:, :width]
        if width > _FLUSH:
            self._take_in(keep_last=True)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        """Draft `plan.depth` levels and keep the best `plan.budget[b]` nodes of each row.

        Args:
            roots: [B] int64.
            plan: depth at least 1 to draft at all.

        Returns:
            Trees of at most `max(plan.budget) + 1` nodes.
        """
        if plan.depth < 1 or max(plan.budget) < 1:
            return root_only(roots)
        self._take_in(keep_last=False)
        state = self._root_state()
        stable = max(self.kv.lengths)
        base = torch.zeros((len(roots), 1, 1, stable), dtype=state.dtype, device=roots.device)
        if len(set(self.kv.lengths)) > 1:
            base.masked_fill_(~self.kv.visible(stable)[:, None, None], float("-inf"))
        if self.widths:
            return self._draw(roots, state, base, plan)
        return best_of_pool(*self._expand(roots, state, base, plan.depth), plan.budget, plan.depth)

    def _expand(self, roots: Tensor, state: Tensor, base: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Beam search over draft tokens (EAGLE-2, expansion).

        Args:
            state: [B, 1, D], the head's output at the newest stable pair.
            base: [B, 1, 1, n] additive mask of the stable slots.
            depth: levels to draft.

        Returns:
            Pool of candidates, the root first: tokens, parents (pool indices) and cumulative scores (see `_scored`),
            each [B, C].
        """
        B, k, D = state.shape[0], self.width, state.shape[-1]
        best = self._scored(self.target.unembed(state), 1).squeeze(1).topk(k, dim=-1)
        beam_scores, beam_tokens = best.values, best.indices
        pool_tokens = [roots.unsqueeze(1), beam_tokens]
        pool_scores = [torch.zeros_like(beam_scores[:, :1]), beam_scores]
        chosen_at: list[Tensor] = []
        beam_states = state.expand(B, k, D)
        stable, seen = base.shape[-1], k * (depth - 1)
        mask = torch.cat([base.expand(B, 1, k, stable), self.own[..., :seen].expand(B, 1, k, seen)], -1)
        cos, sin = self._rope(0, depth - 1)
        ropes = list(zip(cos.split(1, 2), sin.split(1, 2)))
        self.kv.begin_tree(seen)
        for level in range(1, depth):
            end = stable + k * level
            outputs = self._draft_pass(beam_tokens, beam_states, ropes[level - 1], mask[..., :end])
            best = self._scored(self.target.unembed(outputs), level + 1).topk(k, dim=-1)
            scores = (beam_scores.unsqueeze(-1) + best.values).flatten(1)
            tokens = best.indices.flatten(1)
            pool_tokens.append(tokens)
            pool_scores.append(scores)
            if level == depth - 1:
                break
            beam_scores, chosen = scores.topk(k, dim=-1)
            chosen_at.append(chosen)
            beam = chosen // k
            beam_tokens = tokens.gather(1, chosen)
            beam_states = outputs.gather(1, beam.unsqueeze(-1).expand(-1, -1, D))
            if k > 1:  # a beam inherits what its parent sees
                inherited = mask[..., stable:end]
                inherited[:] = inherited.gather(2, beam[:, None, :, None].expand(-1, 1, -1, end - stable))
        return torch.cat(pool_tokens, 1), self._pool_parents(chosen_at, B, depth), torch.cat(pool_scores, 1)

    def _pool_parents(self, chosen_at: list[Tensor], B: int, depth: int) -> Tensor:
        """Parents [B, C] in the pool: k children of the root, then k children of each beam of each further level.

        Args:
            chosen_at: of each level that was expanded further, which of its k * k candidates became beams, [B, k].
        """
        k = self.width
        first, offsets = _pool_constants(k, depth, self.own.device)
        if not chosen_at:
            return first.expand(B, -1)
        beams = torch.cat(chosen_at, 1) + offsets
        return torch.cat([first.expand(B, -1), beams.repeat_interleave(k, 1)], 1)

    def _rope(self, offset: int, n: int) -> tuple[Tensor, Tensor]:
        """Rotation of the n positions from `offset` behind each row's stored pairs, [B or 1, 1, n, Dh]."""
        lengths, rotary = self.kv.lengths, self.head.rotary
        if min(lengths) == max(lengths):
            return rotary.span(lengths[0] + offset, n, self.own)
        start = (self.kv.lengths_device + offset).clamp_min(0).unsqueeze(1)
        return rotary.at(start + torch.arange(n, device=start.device), max(lengths) + offset + n, self.own.dtype)

    def _scored(self, logits: Tensor, ahead: int) -> Tensor:
        """Log-probability [B, M, V] that the target will choose each token: log q, or given the noise it chooses with.

        Args:
            logits: [B, M, V] of the head.
            ahead: how far behind the root the token is that they are about.

        With noise the target takes argmax(log p + g), and the head is less sure than the target: where p is a sharper,
        erring q, log p = a (log q + e) with e Gumbel, a token wins with probability softmax(log q + g / a) once g is
        known. `noise_share` is 1 / a: 1 trusts the head to be exact, 0 gives the tree of log q. Scores stay
        log-probabilities, so their sums mean the probability of a path and re-rank the pool as before.
        """
        if self.sampler is None:
            return logits.log_softmax(-1)
        work = logits if logits.dtype == torch.float64 else logits.float()
        positions = (self.kv.lengths_device + ahead).unsqueeze(1)
        noise = gumbel_noise(self.sampler.seed, self.keys, positions, work.shape[-1], work.dtype)
        return (work / self.sampler.temperature + self.noise_share * noise).log_softmax(-1)

    def _draw(self, roots: Tensor, state: Tensor, base: Tensor, plan: Plan) -> Tree:
        """Trees of one shape whose candidates are drawn from the head's distribution, siblings without replacement.

        Args:
            roots, state, base: see `propose` and `_expand`.
            plan: the budget keeps the first nodes in level order.
        """
        assert self.sampler is not None
        B, n_nodes = len(roots), max(plan.budget) + 1
        widths: list[int] = []
        counts = [1]
        while len(widths) < plan.depth and sum(counts) < n_nodes:
            widths.append(self.widths[len(widths)] if len(widths) < len(self.widths) else 1)
            counts.append(counts[-1] * widths[-1])
        tokens, parents = [roots.unsqueeze(1)], [torch.full_like(roots.unsqueeze(1), -1)]
        probabilities, created = [], 0
        seen = state.new_zeros((B, 1, 1, 0))
        self.kv.begin_tree(sum(counts[1:-1]))
        for level, width in enumerate(widths):
            if level:
                eye = state.new_full((counts[level], counts[level]), float("-inf")).fill_diagonal_(0.0)
                seen = torch.cat([seen.repeat_interleave(widths[level - 1], 2), eye.expand(B, 1, -1, -1)], -1)
                mask = torch.cat([base.expand(B, 1, counts[level], -1), seen], -1)
                state = state.repeat_interleave(widths[level - 1], 1)
                state = self._draft_pass(tokens[-1], state, self._rope(level - 1, 1), mask)
            weights = self.sampler.weights(self.target.unembed(state))
            probabilities.append(weights.softmax(-1))
            positions = (self.kv.lengths_device + level + 1).unsqueeze(1)
            noise = gumbel_noise(
                self.sampler.seed, self.keys, positions, weights.shape[-1], weights.dtype, DRAFT_STREAM
            )
            # The best of log q + Gumbel noise, in order, are draws without replacement (arXiv 1903.06059).
            tokens.append((weights + noise).topk(width, dim=-1).indices.flatten(1))
            places = torch.arange(created, created + counts[level], device=roots.device)
            parents.append(places.repeat_interleave(width).expand(B, -1))
            created += counts[level]
        kept = torch.cat(parents, 1)[:, :n_nodes]
        if min(plan.budget) + 1 < kept.shape[1]:
            limits = torch.tensor(plan.budget, device=roots.device).unsqueeze(1)
            kept = kept.masked_fill(torch.arange(kept.shape[1], device=roots.device) > limits, -1)
        trees = from_parents(torch.cat(tokens, 1)[:, :n_nodes], kept, len(widths))
        return replace(trees, proposals=Proposals(torch.cat(probabilities, 1)[:, :n_nodes], tuple(widths)))

    def _draft_pass(self, tokens: Tensor, states: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One pass over the beams of a level; their keys and values go behind those of earlier levels."""

        def tree_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.kv.write(0, k, v)
            self.kv.offset += k.shape[2]
            return attend(q, keys, values, mask)

        return self.head.block(self.head.pair(self.target.embed(tokens), states), rope, tree_attention)

    def _take_in(self, keep_last: bool) -> None:
        """Project the waiting pairs to keys and values: all of them, or all but the newest of each row."""
        for row, (embeds, states) in sorted(self.prompts.items()):
            self._take_in_prompt(row, embeds, states)
        self.prompts.clear()
        counts = [max(w - keep_last, 0) for w in self.waiting]
        width = max(counts)
        if not width:
            return
        u = self.head.pair(self.target.embed(self.tokens[:, :width]), self.states[:, :width])
        self.kv.append(0, *self.head.block.keys_values(u, self._rope(0, width)), counts)
        self.kv.advance(counts)
        if keep_last:
            last = torch.tensor([max(c, 1) for c in counts], device=u.device)
            self.states = self.states.gather(1, last[:, None, None].expand(-1, 1, self.states.shape[-1]))
            self.tokens = self.tokens.gather(1, last[:, None])
            self.waiting = [min(w, 1) for w in self.waiting]
        else:
            if min(counts) == width:
                self.newest = u[:, width - 1 :]
            else:
                last = torch.tensor([max(c - 1, 0) for c in counts], device=u.device)
                self.newest = u.gather(1, last[:, None, None].expand(-1, 1, u.shape[-1]))
            self.waiting = [0] * len(self.waiting)

    def _take_in_prompt(self, row: int, embeds: Tensor, states: Tensor) -> None:
        """Pairs 0..L-2 of a fresh row, [1, L-1, D] each: keys and values only, nothing else of them is ever used."""
        n = states.shape[1]
        rope = self.head.rotary.span(0, n, states)
        keys, values = self.head.block.keys_values(self.head.pair(embeds, states), rope)
        self.kv.begin_prefill(row)
        self.kv.write(0, keys, values)
        self.kv.set_length(row, n)

    def _root_state(self) -> Tensor:
        """The head's output [B, 1, D] at each row's newest pair, whose keys and values are stored already."""
        width = max(self.kv.lengths)
        mask = None
        if min(self.kv.lengths) != width:
            mask = torch.zeros((len(self.newest), 1, 1, width), dtype=self.newest.dtype, device=self.newest.device)
            mask.masked_fill_(~self.kv.visible(width)[:, None, None], float("-inf"))
        keys, values = self.kv.data[0, 0, :, :, :width], self.kv.data[0, 1, :, :, :width]
        return self.head.block.reread(self.newest, self._rope(-1, 1), keys, values, mask)
