"""The central types: what flows between target, drafter, verifier, policy and loop.

Invariant at the start of every round, for each row `b` of the batch: tokens `x_0..x_{n[b]-1}` are in the target's
KV cache, and one *root* token `x_{n[b]}` has been decided by the target but is not in the cache yet.

Dimensions: B rows, N tree nodes (root included), P nodes on an accepted path, T or L tokens, D hidden width,
V vocabulary, S tapped layers. The batch is the first dimension of everything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

COUNTERFACTUALS = ("mean", "blur", "knockout")
"""What stands for an image that the target is not to see; see `mmspec/dependence.py`."""


class InputError(ValueError):
    """The user's input is wrong: the message is one line that names the value and the remedy (exit code 2)."""


@dataclass(frozen=True)
class Proposals:
    """What the candidates of sampled trees were drawn from; verifiers by rejection need it.

    Args:
        probabilities: [B, I, V], I <= N: the children of node i were drawn from its row i in node order, one after the
            other without replacement. Nodes from I on have no children.
        widths: children drawn at a node of each level, root first. Host numbers: the shape of a sampled tree must not
            depend on what was drawn, or the candidates follow another distribution than the one given here.
    """

    probabilities: Tensor
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Draft trees of a batch, in topological order.

    Args:
        tokens: [B, N] int64; `tokens[:, 0]` are the roots.
        parents: [B, N] int64; -1 for the root, `parents[b, i] < i` for a node, and -1 again for padding (`i > 0`),
            which no verifier accepts. Siblings have distinct tokens.
        depths: [B, N] int64; 0 for the root and for padding.
        ancestors: [B, N, N] bool; `[b, i, j]` when `j` is `i` or an ancestor of `i`.
        max_depth: the largest depth, known on the host (no sync is needed to ask for it).
        proposals: of sampled trees; None where candidates were chosen, not drawn.
        scores: [B, N], cumulative log-probability of the path to each node by the draft's own account; of drafters that
            have one, when the plan prunes.
        full: whether the host knows that no node is padding.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    max_depth: int
    proposals: Proposals | None = None
    scores: Tensor | None = None
    full: bool = False

    def __post_init__(self) -> None:
        B, N = self.tokens.shape
        if self.parents.shape != (B, N) or self.depths.shape != (B, N) or self.ancestors.shape != (B, N, N):
            raise ValueError(
                f"Tree shapes disagree: tokens {tuple(self.tokens.shape)}, parents {tuple(self.parents.shape)}, "
                f"depths {tuple(self.depths.shape)}, ancestors {tuple(self.ancestors.shape)}"
            )


@dataclass(frozen=True)
class Paths:
    """What precedes the token that follows each node: the row's committed tokens, then the tree down to the node.

    Args:
        history: [B, S] int64, prompt (image placeholders expanded) and answer; anything from `lengths[b]` on.
        lengths: [B] int64, committed tokens, the root not among them.
        trees: of N nodes.
    """

    history: Tensor
    lengths: Tensor
    trees: Tree


@dataclass(frozen=True)
class Prompt:
    """One encoded request, on the host.

    Args:
        input_ids: [L] int64, image placeholders expanded.
        visual: [L] bool, True at image placeholders.
        pixels: what the target's vision tower takes, by the processor's own names (empty without an image).
    """

    input_ids: Tensor
    visual: Tensor
    pixels: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True)
class Request:
    """A prompt to decode: `key` selects its sampling noise, so it must not depend on batch or order.

    Set `cancel` from any thread and the request ends at the next round with what it has.
    """

    id: str
    prompt: Prompt
    max_new_tokens: int
    key: int = 0
    cancel: threading.Event | None = None


@dataclass(frozen=True)
class Emission:
    """Tokens that a request received in one round, told while decoding goes on (streaming).

    Args:
        request: whose tokens they are.
        tokens: kept tokens, in order.
        accepted: how many of them, from the first on, a drafter proposed; the others the target chose itself.
        action: "prefill" (the first token), "draft" or "skip".
    """

    request: Request
    tokens: tuple[int, ...]
    accepted: int
    action: str


@dataclass(frozen=True)
class Forward:
    """Outputs of one target pass.

    Args:
        logits: [B, N, V]; of a prefill only the last position, [1, 1, V].
        last_hidden: [B, N, D] after the final norm: exactly what the unembedding multiplies (prefill: all positions).
        hidden: tapped layers {index into hidden_states: [B, N, D]}.
        embeds: prefill only, [1, L, D]: input embeddings with image features merged in.
        visual: prefill only, [1, L] bool.
        positions: prefill only, [3, 1, L] int64, the target's rotary positions (time, height, width); all three are
            0..L-1 for a target that counts tokens. Text behind the prompt goes on at their largest.
        visual_mass: [B, N] fp32 (prefill: of the last position, [1, 1]), share of its attention that each node gives to
            image positions, mean over the heads of the layer that the state was opened with, else None.
    """

    logits: Tensor
    last_hidden: Tensor
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    visual: Tensor | None = None
    visual_mass: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True)
class Choices:
    """The tokens to be chosen after one target pass, one after each node, and all that a choice may depend on.

    Args:
        logits: [B, N, V], as they come from the target.
        keys: [B] int64, `Request.key`.
        positions: [B, N] int64, index of the token to be chosen.
        paths: for samplers with penalties, else None.
    """

    logits: Tensor
    keys: Tensor
    positions: Tensor
    paths: Paths | None = None


@dataclass(frozen=True)
class Accepted:
    """What the verifier decided.

    Args:
        path: [B, P] int64 node indices by depth, `path[:, 0] == 0`; entries from `n_kept` on are meaningless.
        n_kept: [B] int64, accepted nodes with the root: a + 1.
        tokens: [B, P] int64, the token decided behind each node of the path: the next node's, and behind the last kept
            one the bonus; meaningless from `n_kept` on.
    """

    path: Tensor
    n_kept: Tensor
    tokens: Tensor

    @cached_property
    def next_tokens(self) -> Tensor:
        """[B] int64, the bonus tokens: the next roots."""
        return self.tokens.gather(1, self.n_kept.unsqueeze(1) - 1).squeeze(1)


@dataclass(frozen=True)
class Round:
    """What a drafter observes after a verification: trees, outputs of all nodes, and the accepted path.

    `paths` is the host's copy of the kept node indices per row, `tokens` that of the tokens the round decided (those of
    the path behind the root, then the bonus token); both are empty for rows that are not active (any more).
    """

    trees: Tree
    forward: Forward
    accepted: Accepted
    paths: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """What to draft, decided before anything is drafted, and what may still be taken back of it.

    A draft that looks at its own candidates to decide how many there are is lossless where candidates are chosen. Drawn
    ones (`Proposals`) would follow another distribution than the one they are verified with: such drafters refuse.

    Args:
        depth: draft levels, common to the batch (0: nobody drafts).
        budget: [B] draft nodes per row, root excluded; 0 makes the row a root-only tree (a skip).
        extend: early exit. Asked after each drafted level but the last, with the number of levels and the cumulative
            log-probabilities [B, k] of those candidates that would be drafted on from; False ends the draft. To look at
            them is a sync a level on a GPU. Drafters without levels do not ask.
        prune: asked with the trees before they are verified, if they have scores; may take nodes away (`tree.pruned`).
    """

    depth: int
    budget: tuple[int, ...]
    extend: Callable[[int, Tensor], bool] | None = None
    prune: Callable[[Tree], Tree] | None = None


@dataclass(frozen=True)
class Evidence:
    """What is free to look at before drafting; all on the device, B being the rows it is about.

    Args:
        last_hidden: [B, D], the target state that produced the root.
        logits: [B, V], the logits the root was chosen from.
        roots: [B] int64.
        n_kept: [B] int64, kept nodes of the last round; 0 directly after the prefill.
        reach: [B] int64, deepest node offered in the last round (0: it was a skip, n_kept says nothing of drafts).
        n_committed: [B] int64, tokens in the target's KV cache.
        n_prompt: [B] int64, tokens of the prompt.
        n_visual: [B] int64, image placeholders among them.
        keys: [B] int64, `Request.key` of the row: tells recorders whose evidence this is.
        visual_mass: [B] fp32, share of the attention of the state that produced the root which went to image positions,
            in the policy's `mass_layer`; None where it has none.
    """

    last_hidden: Tensor
    logits: Tensor
    roots: Tensor
    n_kept: Tensor
    reach: Tensor
    n_committed: Tensor
    n_prompt: Tensor
    n_visual: Tensor
    keys: Tensor
    visual_mass: Tensor | None = None


@dataclass(frozen=True)
class Trials:
    """Rounds that a controller was not trained on: what it foresaw, and what came of the deepest draft.

    Args:
        chances: [T, Dmax] of each level once the one before is accepted.
        accepted: [T] tokens.
        reach: [T] levels that the drafter had to offer.
        image: [T] number of the image (or text) that each is of: rounds of one fail and succeed together.
    """

    chances: np.ndarray
    accepted: np.ndarray
    reach: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """What a controller's logits mean where tokens are drawn, or where the best ones are taken.

    Args:
        prior: mean chance that at least k tokens are accepted, k = 1..Dmax.
        scale, offset: [Dmax] each: `scale * logit + offset` is the logit of a chance that is meant.
        trials: how it did on held-out rounds; None where there were none.
    """

    prior: Sequence[float]
    scale: np.ndarray
    offset: np.ndarray
    trials: Trials | None


@dataclass(frozen=True)
class StepTrace:
    """One round of the loop, host numbers; rows that were not active have `active[b] == False`.

    Times are in seconds: between phase borders on the host clock (CPU), or of CUDA events resolved at the end.
    """

    plan: Plan
    active: tuple[bool, ...]
    accepted: tuple[int, ...]
    """a per row, bonus excluded; what the end of the answer cut off was not accepted, whatever the target chose."""
    emitted: tuple[int, ...]
    """Tokens kept of this round after truncation at a stop token or a limit."""
    n_nodes: int
    """Width of the verified tree, root included."""
    nodes: tuple[int, ...] = ()
    """Draft nodes of each row; rows of one batch may have fewer than the widest."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    commit_s: float = 0.0
    control_s: float = 0.0


@dataclass
class Output:
    """The result of one request.

    Args:
        tokens: generated ids, the stop token included.
        finish_reason: "stop", "length" (max_new_tokens), "context" (the target's window is full), "cancelled", or
            "error" (nothing could be decoded).
        ttft_s, latency_s: seconds from the start of its prefill to the first and to the last token.
        rounds: (action, nodes, accepted, emitted) per round, where action is "draft" or "skip", nodes exclude the
            root and accepted excludes the bonus.
        gaps: top-2 logit gap of the target at each generated token, filled only when asked for (tie reports).
        error: what went wrong with this request, "Type: message", or None. With another finish reason than "error" the
            tokens are complete all the same: its drafter failed, and it was decoded to its end without one.
    """

    id: str
    tokens: list[int]
    finish_reason: str
    ttft_s: float
    latency_s: float
    rounds: list[tuple[str, int, int, int]]
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Features:
    """A teacher-forced batch with the frozen target's states: what heads train on.

    Index contract (methods of EAGLE's family): `last_hidden[:, i]` is f_i, its unembedding is the distribution of
    `input_ids[:, i + 1]`. The pair i is (f_i, embeds_{i+1}); its output predicts token i + 2.

    Args:
        input_ids: [B, T] int64, right-padded; a row holds one conversation, or several one behind the other.
        valid: [B, T] bool, False at padding.
        answer: [B, T] int64, 0 outside answers, else the 1-based number of the reply the token belongs to (its stop
            token included): two tokens are of the same reply when the numbers are equal.
        visual: [B, T] bool.
        last_hidden: [B, T, D].
        embeds: [B, T, D] input embeddings, image features merged in.
        hidden: tapped layers {index: [B, T, D]}.
        visual_mass: [B, T, S] fp32, attention mass on image positions of the layers asked for (head mean), or None.
        segment: [B, T] int64, where conversations share rows: the 1-based number in its row of the conversation that
            a token belongs to, 0 at padding; None where each row is one.
        positions: [3, B, T] int64, the target's rotary positions within each conversation; None where they are not
            known.
        weight: [B, T] fp32, factor of the loss of every prediction of a token; None where all are 1. Their mean over
            the answers of the training data is 1: what losses are divided by stays the number of positions.
    """

    input_ids: Tensor
    valid: Tensor
    answer: Tensor
    visual: Tensor
    last_hidden: Tensor
    embeds: Tensor
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    visual_mass: Tensor | None = None
    segment: Tensor | None = None
    positions: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class TargetShape:
    """What a head must know of its target's text model to be built, without any weights."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope_theta: float


@dataclass(frozen=True)
class Objective:
    """What a head's training forward returns: sums, never means, so that ranks and micro-batches add up.

    Args:
        loss: scalar, sum of the loss over valid positions.
        count: scalar, the number of valid positions the loss is to be divided by (over all ranks and micro-batches).
        sums: named scalars to add up for logging; `sums[name]` divided by `counts[name]` is the logged mean.
    """

    loss: Tensor
    count: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)


class State(Protocol):
    """Decoding state of a batch of rows, owned by the target."""

    @property
    def lengths(self) -> list[int]:
        """Committed tokens per row, mirrored on the host."""

    @property
    def lengths_device(self) -> Tensor:
        """The same, [B] int64 on the device."""


class Target(Protocol):
    """A frozen vision-language model."""

    name: str
    shape: TargetShape
    fingerprint: str
    vocabulary: str
    """Fingerprint of the tokenizer's vocabulary: equal where token ids mean the same."""
    max_length: int
    stop_ids: frozenset[int]
    special_ids: frozenset[int]
    """Tokens that `decode` leaves out, stop tokens and image placeholders among them."""
    image_token_id: int
    device: torch.device
    dtype: torch.dtype

    def encode(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Prompt: ...
    def open(self, max_batch: int, max_tokens: int, mass_layer: int | None = None) -> Any: ...
    def prefill(self, state: Any, row: int, prompt: Prompt, taps: Sequence[int]) -> Forward: ...
    def forward(self, state: Any, trees: Tree, taps: Sequence[int]) -> Forward: ...
    def keep(self, state: Any, accepted: Accepted, paths: Sequence[Sequence[int]]) -> None: ...
    def release(self, state: Any, row: int) -> None: ...
    def free(self) -> None: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def place(self, ids: Tensor, visual: Tensor, features: Tensor | None = None) -> Tensor: ...
    def unembed(self, hidden: Tensor) -> Tensor: ...
    def layer_weights(self, index: int) -> Mapping[str, Tensor]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def encode_dialogue(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]
    ) -> tuple[Prompt, Tensor]: ...
    def teacher(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Tensor],
        taps: Sequence[int] = (),
        mass_layers: Sequence[int] = (),
        pack: int = 0,
        weights: Sequence[Tensor] = (),
        instead: Tensor | None = None,
        hidden: bool = False,
    ) -> Features: ...
    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor: ...


class Drafter(Protocol):
    """Proposes trees. It is told of every committed token, and may fall behind when it is skipped."""

    taps: tuple[int, ...]

    def open(self, max_batch: int, max_tokens: int) -> None: ...
    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None: ...
    def propose(self, roots: Tensor, plan: Plan) -> Tree: ...
    def observe(self, round: Round) -> None: ...
    def evict(self, row: int) -> None: ...


class Sampler(Protocol):
    """Scores whose argmax is the chosen token; noise depends on (seed, request key, position) only.

    Args of `scores`: logits [B, N, V], keys [B] int64, positions [B, N] int64 (index of the token to be chosen), and
    the paths, None for a sampler whose `needs_history` is False: nobody keeps a history for it.
    """

    @property
    def needs_history(self) -> bool: ...
    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn; False where the best one is taken."""

    def scores(self, logits: Tensor, keys: Tensor, positions: Tensor, paths: Paths | None = None) -> Tensor: ...


class Verifier(Protocol):
    """Walks each tree from its root and says how far the target agrees. `scores` are the sampler's of these choices."""

    def accept(self, trees: Tree, scores: Tensor, choices: Choices) -> Accepted: ...


class Policy(Protocol):
    """Decides how much to draft: `sense` on the device before the step's one host sync, `plan` on the host after it."""

    max_depth: int
    max_budget: int
    senses: bool
    """Whether `sense` wants to be asked: evidence costs two gathers a step."""
    mass_layer: int | None
    """Decoder layer whose visual attention is to be among the evidence (0-based, -1 the last); None: of none."""

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        """Decoding begins: with so many rows, and tokens that are drawn or the best ones (`Sampler.sampled`)."""

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor | None:
        """What the plan needs, [R, any]: evidence is of the rows [R] int64 (all of them, or one just admitted)."""

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        """Decide for all rows: `sensed[b]` is what `sense` said of row b, `remaining[b]` tokens may still be emitted
        (0: the row is idle)."""

    def observe(self, trace: StepTrace) -> None: ...


Unembed = Callable[[Tensor], Tensor]
