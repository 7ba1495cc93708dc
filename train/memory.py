"""How many bytes a training process holds at most: counted moment by moment, from what the code allocates.

Invariant: nothing is fitted. Every term below is a tensor that some line of this project or of DeepSpeed allocates, and
is named after it; a step's peak is that of its fullest moment. Left out are the libraries' own memory (a CUDA context,
workspaces), fragmentation, and tensors of a few bytes a token (ids, marks, order).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmspec.heads import medusa
from mmspec.heads._unrolled import UnrolledHead
from mmspec.losses import CACHED, LossConfig
from mmspec.recipe import DeepSpeedNode, Optim, Recipe
from mmspec.targets._rows import lay_out
from train.engine import engine_settings
from train.measure import BATCH as EVALUATED
from train.shapes import BYTES, TargetFacts

PREFETCH = 50_000_000
"""Elements that ZeRO-3 gathers ahead of use."""
PROMPT = 256
"""Tokens of text that are assumed of a held-out prompt."""
DECODING = ("answers", "evaluation")
"""The moments that are no part of a training step."""
QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a weight of the text model's layers: int8 rows; 4-bit blocks of 64 with an fp32 scale."""


@dataclass(frozen=True)
class Batch:
    """The conversations of one micro-batch, each with one reply at its end.

    Args:
        lengths: tokens of each.
        answers: tokens of each one's reply.
        visual: image placeholders of each, all before its reply; empty: none.
    """

    lengths: tuple[int, ...]
    answers: tuple[int, ...]
    visual: tuple[int, ...] = ()

    def padded(self, pack: int) -> int:
        """Tokens of the target's pass, padding included: rows x the longest row."""
        places = lay_out(self.lengths, pack)
        return (1 + max(place.row for place in places)) * max(place.stop for place in places)

    @property
    def drafts(self) -> tuple[int, ...]:
        """Draft positions of each: from the last token before the reply on, while a token lies two ahead."""
        return tuple(max(min(n, length - 1) - 1, 0) for length, n in zip(self.lengths, self.answers))

    @property
    def read(self) -> int:
        """N, tokens that a draft position sees: all but the last two of a conversation."""
        return sum(length - 2 for length, n in zip(self.lengths, self.drafts) if n)

    @property
    def seen(self) -> int:
        """Image placeholders among them."""
        return sum(shown for shown, n in zip(self.visual, self.drafts) if n)

    def predictions(self, steps: int) -> int:
        """R: a position drafts `steps` tokens, or as many as are left of its reply."""
        return sum(max(n - step, 0) for n in self.drafts for step in range(steps))


@dataclass(frozen=True)
class HeadFacts:
    """What the count needs of a head.

    Args:
        kind: of the recipe.
        n: trained parameters.
        largest: parameters of its largest matrix.
        width, attention, keys, inner, n_heads, head_dim: D, Hq x Dh, Hkv x Dh, MLP width, Hq, Dh of its block.
        read: width of what it reads of the target.
        n_taps: hidden states it reads beside the last.
        vocabulary: V' of an unembedding of its own, 0: the target's is used.
        paired, input_norm: see `mmspec.nn.DecoderBlock`.
        exact: False for a head that is neither of EAGLE's family nor Medusa, counted as if it were of the first.
        n_ahead: heads side by side, each with an unembedding where there is a vocabulary (Medusa), else 0.
        n_blocks: of each of those.
        image_input: see `mmspec.heads._prefix`.
    """

    kind: str
    n: int
    largest: int
    width: int
    attention: int
    keys: int
    inner: int
    n_heads: int
    head_dim: int
    read: int
    n_taps: int
    vocabulary: int
    paired: bool
    input_norm: bool
    exact: bool
    n_ahead: int = 0
    n_blocks: int = 0
    image_input: str = "embeds"


def head_facts(kind: str, head: nn.Module, facts: TargetFacts) -> HeadFacts:
    """Facts of a head, which may be on the meta device."""
    sizes = [parameter.numel() for parameter in head.parameters() if parameter.requires_grad]
    shape, taps = facts.shape, len(set(getattr(head, "taps", ())))
    attention, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    n, largest = sum(sizes), max(sizes)
    if isinstance(head, medusa.Head):
        c, no_block = head.config, dict.fromkeys(("attention", "keys", "inner", "n_heads", "head_dim", "n_taps"), 0)
        return HeadFacts(
            kind=kind,
            n=n,
            largest=largest,
            width=c.hidden_size,
            read=c.hidden_size,
            vocabulary=c.vocab_size if c.own_head else 0,
            paired=False,
            input_norm=False,
            exact=True,
            n_ahead=c.n_ahead,
            n_blocks=c.n_blocks,
            **no_block,
        )
    if not isinstance(head, UnrolledHead):
        D = shape.hidden_size
        rest = (D, attention, keys, shape.intermediate_size, shape.n_heads, shape.head_dim, max(taps, 1) * D, taps)
        return HeadFacts(kind, n, largest, *rest, vocabulary=0, paired=True, input_norm=True, exact=False)
    block, config, own = head.block, head.config, getattr(head, "lm_head", None)
    return HeadFacts(
        kind=kind,
        n=n,
        largest=largest,
        width=config.hidden_size,
        attention=block.sizes[0],
        keys=block.sizes[1],
        inner=block.mlp.gate_proj.out_features,
        n_heads=block.sizes[0] // block.head_dim,
        head_dim=block.head_dim,
        read=head.feature_size,
        n_taps=taps,
        vocabulary=own.out_features if isinstance(own, nn.Linear) else 0,
        paired=block.hidden_norm is not None,
        input_norm=not isinstance(block.input_layernorm, nn.Identity),
        exact=True,
        image_input=config.image_input,
    )


@dataclass(frozen=True)
class Memory:
    """What one process holds.

    Args:
        moments: {moment: {what: bytes on the device}}; "optimizer step" and so on.
        host: {what: bytes in the host's memory}, of what is offloaded; on a CPU it is in the moments.
    """

    moments: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def fullest(self) -> str:
        """The moment of a training step that holds the most."""
        return max((name for name in self.moments if name not in DECODING), key=self.total)

    @property
    def peak(self) -> int:
        """Bytes on the device at most, over all moments."""
        return max(map(self.total, self.moments))

    def total(self, moment: str) -> int:
        """Bytes on the device at a moment."""
        return sum(self.moments[moment].values())


def count(recipe: Recipe, facts: TargetFacts, head: HeadFacts, batch: Batch, processes: int, decoding: bool) -> Memory:
    """Memory of one process of a run.

    Args:
        batch: its largest micro-batch.
        processes: that share the work.
        decoding: whether answers and evaluations, which decode, are among the moments.
    """
    cpu = recipe.target.device == "cpu"
    engine = _Engine(recipe.deepspeed, head, processes, recipe.optim, cpu)
    target, target_host = _target(recipe, facts, processes)
    lasting = {"target": target, "head weights": engine.weights, "optimizer state": engine.states}
    host = {"target": target_host, "head weights": engine.host_weights, "optimizer state": engine.host_states}
    host = {what: size for what, size in host.items() if size}
    if cpu:
        lasting |= {what: lasting[what] + size for what, size in host.items()}
    features, one = _features(recipe, facts, head, batch)
    again = recipe.optim.accumulate > 1
    carried = engine.carried if again else 0
    acts = activations(head, batch, recipe.loss, 2 if recipe.deepspeed.bf16 else 4)
    own = max(head.n_ahead, 1) * head.vocabulary * head.width * engine.half
    scores = chunk_bytes(recipe, head, facts, batch)
    seen = {**lasting, "features": features}
    moments = {
        # Of the previous micro-batch there are gradients and features still.
        "target pass": lasting
        | {"gradients": carried, "features": features - one + (features if again else 0)}
        | {"activations": _layer(recipe, facts, batch)},
        # The gradient of the unembedding is formed on the way forward, before it is anybody's `.grad`.
        "vocabulary loss": seen | {"gradients": carried + own, "activations": acts + scores},
        # `_Known` hands out what the forward pass formed; states, predictions and truth are gone.
        "start of backward": seen
        | {"gradients": carried + own, "engine buffers": engine.reserved}
        | {"activations": acts - (recipe.loss.steps + 1) * sum(batch.drafts) * head.width * engine.half},
        "end of backward": seen | {"gradients": engine.gradients, "engine buffers": engine.reduced},
        "optimizer step": seen | {"gradients": engine.partition, "engine buffers": engine.stepping},
    }
    if decoding:
        moments |= _decoding(recipe, facts, head, lasting)
    moments = {name: {what: size for what, size in parts.items() if size} for name, parts in moments.items()}
    return Memory(moments, {} if cpu else host)


# ---- the head's own pass ----


def activations(head: HeadFacts, batch: Batch, loss: LossConfig, half: int) -> int:
    """Bytes that autograd keeps of `UnrolledHead.forward` until its backward pass, with what the loss is given.

    Per token, in elements of the head's dtype (D width, A = Hq Dh, K = Hkv Dh, I inner, W read):

      context, N tokens   keys and values 2K, cos and sin 2Dh; paired: features W, [e; s] normed 2D, 2 norms;
                          else [e; s] 2D, projected D
      each step, M        queries A, output A, the residual's norm, normed D, gate, up, silu(gate), product 4I, state D,
                          cos and sin 2Dh
      step 0              paired: as of the context; else the projected pair D
      later steps         as of the context, own keys and values 2K
      an input norm       of the unpaired, wherever there is a pair: the norm, normed D
      predictions, R      states D, their gradient D; with an unembedding of its own the norm, normed D
      truth, P = M        D

    A norm keeps what it read, x, and x / rms(x), in fp32 both; attention the fp32 log-sum-exp of each head. Recomputed,
    the residual's norm and what follows it are there for one step at a time; what is before them, A and D, for each.

    Where image positions are left out they are no context. Compressed, each is read by the adaptor, D, which has keys
    and values of it, 2A; and the layer that injects an image reads the state of each pair of the context, D.

    Medusa has the target's states D once, of each block what enters SiLU and what leaves the block, 2D, and of each
    prediction and truth the same as above; an unembedding of its own is given a copy of its predictions, D.
    """
    if head.n_ahead:
        M, R, D = sum(batch.drafts), batch.predictions(loss.steps), head.width
        kept = M * (1 + 2 * head.n_ahead * head.n_blocks + 1) + R * (3 if head.vocabulary else 2)
        return kept * D * half
    D, A, K, I = head.width, head.attention, head.keys, head.inner
    norm = 8 * D
    again = 4 * D if half == 4 else 8 * D  # a norm of what is counted as something else already
    M, R = sum(batch.drafts), batch.predictions(loss.steps)
    N = batch.read - (batch.seen if head.image_input in ("none", "compressed") else 0)
    angles = 2 * head.head_dim
    if head.paired:
        pair = first = 2 * D * half + 2 * norm
        context = pair + (head.read + 2 * K + angles) * half
    else:
        first = D * half + (D * half + again if head.input_norm else 0)
        pair = 2 * D * half + first
        context = pair + (2 * K + angles) * half
    feed = (D + 4 * I) * half + norm
    block = (2 * A + D + angles) * half + 4 * head.n_heads + ((A + D) * half if loss.recompute else feed)
    later = (loss.steps - 1) * (pair + 2 * K * half)
    predicted = 2 * D * half + (D * half + again if head.vocabulary else 0)
    once = feed if loss.recompute else 0
    if head.image_input == "compressed":
        context, images = context + D * half, batch.seen * (D + 2 * A) * half
    else:
        images = 0
    return images + N * context + M * (loss.steps * block + once + first + later + D * half) + R * predicted


def chunk_bytes(recipe: Recipe, head: HeadFacts, facts: TargetFacts, batch: Batch) -> int:
    """Bytes of one chunk of `vocabulary_losses`: C predictions over V' tokens, aimed at P positions.

    Held by all chunks: the target's distribution [P, V'] in fp32, the logits [C, V'] and, of as many rows A as a pass
    works on, q and p in fp32. Beside them either the target's logits [P, V] that the distribution is made of, or what
    the losses take: with 16-bit logits a copy of A rows in fp32, with total variation or acceptance two more, and where
    the target unembeds predictions too, what it returned [C, V].
    """
    loss, V = recipe.loss, facts.shape.vocab_size
    own, width = head.vocabulary or V, BYTES[recipe.target.dtype]
    half = (2 if recipe.deepspeed.bf16 else 4) if head.vocabulary else width
    positions = min(max(loss.chunk // loss.steps, 1), max(sum(batch.drafts), 1))
    at_once = 1 if head.n_ahead and head.vocabulary else loss.steps  # heads that unembed by themselves do it in turn
    predictions = min(positions * at_once, batch.predictions(loss.steps))
    rows = min(predictions, max(CACHED // own, 1)) if recipe.target.device == "cpu" else predictions
    shared = 4 * positions * own + half * predictions * own + 8 * rows * own
    truth = positions * (V * (width if width == 4 else width + 4) + (4 * own if own < V else 0))
    losses = rows * own * ((4 if half < 4 else 0) + (8 if loss.total_variation or loss.acceptance else 0))
    losses += 0 if head.vocabulary else predictions * V * width
    return shared + max(truth, losses)


# ---- the target ----


def held_bytes(recipe: Recipe, facts: TargetFacts) -> int:
    """Bytes of all of the frozen target's weights, wherever they are."""
    width = BYTES[recipe.target.dtype]
    layers = round(facts.n_layers_parameters * QUANTISED.get(recipe.target.quantize, width))
    return layers + (facts.n_parameters - facts.n_layers_parameters) * width


def _target(recipe: Recipe, facts: TargetFacts, processes: int) -> tuple[int, int]:
    """Bytes of the frozen target on the device and on the host.

    Text layers may be quantised; sharded or offloaded, two of them (the one at work and the next) and what is used
    outside of them (embedding, unembedding, vision tower) are on the device.
    """
    rest = (facts.n_parameters - facts.n_layers_parameters) * BYTES[recipe.target.dtype]
    layers = held_bytes(recipe, facts) - rest
    two = -(-2 * layers // facts.shape.n_layers)
    if recipe.target.placement == "sharded" and processes > 1:
        return rest + layers // processes + two, 0
    if recipe.target.placement == "offloaded":
        return rest + two, layers
    return rest + layers, 0


def _features(recipe: Recipe, facts: TargetFacts, head: HeadFacts, batch: Batch) -> tuple[int, int]:
    """Bytes of one micro-batch's Features (last hidden state, embeddings, taps; ids, marks), and of one state in them.

    Two ids of 8 bytes and two marks of one a token; packed rows have their segments besides.
    """
    pack = recipe.data.pack
    tokens, D = batch.padded(pack), facts.shape.hidden_size
    one = tokens * D * BYTES[recipe.target.dtype]
    return (2 + head.n_taps) * one + tokens * (26 if pack else 18), one


def _layer(recipe: Recipe, facts: TargetFacts, batch: Batch) -> int:
    """Bytes of the fullest moment of one decoder layer of the target's pass, which keeps nothing for a backward pass.

    MLP: residual D, normed D, silu(gate), up and their product 3I. Attention: residual D, normed D, queries A, keys and
    values 2K, rotated queries with the temporaries of the rotation 3A.
    """
    if recipe.data.features:
        return 0
    s, tokens = facts.shape, batch.padded(recipe.data.pack)
    attention = 4 * s.n_heads * s.head_dim + 2 * s.n_kv_heads * s.head_dim
    return tokens * (2 * s.hidden_size + max(3 * s.intermediate_size, attention)) * BYTES[recipe.target.dtype]


def _decoding(
    recipe: Recipe, facts: TargetFacts, head: HeadFacts, lasting: dict[str, int]
) -> dict[str, dict[str, int]]:
    """The moments that decode: answers before there is an engine, evaluation beside it with a copy of the head."""
    width = BYTES[recipe.target.dtype]
    decoded = facts.visual_tokens + PROMPT + recipe.run.eval_max_new_tokens
    evaluation = {"key-value buffers": EVALUATED * decoded * facts.kv_bytes(width)}
    evaluation |= {"head copy": head.n * width}
    moments = {"evaluation": lasting | evaluation}
    if answers := _answer_buffers(recipe, facts):
        moments["answers"] = {"target": lasting["target"], "key-value buffers": answers}
    return moments


def _answer_buffers(recipe: Recipe, facts: TargetFacts) -> int:
    """Bytes of the key-value buffers in which the target answers the training questions."""
    if recipe.data.answers != "regenerated" or recipe.data.features:
        return 0
    return recipe.data.answer_batch * longest_tokens(recipe, facts) * facts.kv_bytes(BYTES[recipe.target.dtype])


def longest_tokens(recipe: Recipe, facts: TargetFacts) -> int:
    """Tokens of the longest conversation that is trained on."""
    limits = [limit for limit in (recipe.data.max_length, facts.context) if limit]
    return min(limits) if recipe.data.max_length else min([*limits, ASSUMED_TOKENS])


ASSUMED_TOKENS = 2048
"""Length of the longest conversation where the recipe sets no data.max_length."""


# ---- DeepSpeed's engine ----


class _Engine:
    """Bytes of DeepSpeed's engine on one process, by stage (n parameters, n/P of them this process's part).

    Stage 0: weights, gradients, AdamW's two moments in fp32; with bf16 a master copy, and at the step fp32 gradients.
    Stages 1 to 3: the part's master copy in fp32 always, also of fp32 weights; gradients are moved through a bucket
    that a GPU reserves whole, into a buffer of the part (a second one is added to it when micro-batches accumulate);
    at the step the part's gradients are flattened into one tensor, in fp32. AdamW's own temporaries are the root of the
    second moment: for all tensors at once on a GPU, twice for one tensor after the other on a CPU (the part is one).
    Averaged weights (`optim.ema`) lie beside the moments.

    Attributes:
        half: bytes of a weight; weights, states: on the device; host_weights, host_states: offloaded.
        carried: gradients from one micro-batch to the next; gradients: at the end of the backward pass; partition: at
        the step; reserved, reduced, stepping: buffers when the backward pass starts, when it ends, and at the step.
    """

    def __init__(self, node: DeepSpeedNode, head: HeadFacts, processes: int, optim: Optim, cpu: bool) -> None:
        n, stage, bf16 = head.n, node.zero_stage, node.bf16
        self.half = half = 2 if bf16 else 4
        part = -(-n // processes) if stage else n
        bucket = int(engine_settings(node, optim, processes, n)["zero_optimization"]["reduce_bucket_size"])
        self.weights, self.states = n * half, part * ((12 if bf16 or stage else 8) + (4 if optim.ema else 0))
        self.host_weights = self.host_states = 0
        self.reserved = self.reduced = 0
        roots = 4 * part if not cpu else 8 * (part if stage else head.largest)
        self.gradients = self.carried = n * half
        self.partition = part * (4 if stage else half)
        self.stepping = roots + (4 * n if bf16 and not stage else 0)
        if stage:
            moved = part * half * (2 if optim.accumulate > 1 and stage >= 2 else 1)
            self.gradients = moved if stage >= 2 else n * half + moved
            self.carried = part * half if stage >= 2 else n * half
            # What a CPU reserves and never writes is not resident.
            self.reserved = 0 if cpu else bucket * half
            filled = min(bucket, n) * half if cpu else bucket * half
            self.reduced = filled if stage >= 2 or not cpu else 0
        if stage == 3:
            gathered = (head.largest + min(n - head.largest, PREFETCH)) * half
            self.weights = part * half + gathered
            if node.offload_param:
                self.weights, self.host_weights = gathered, part * half
        if node.offload_optimizer:
            # Master copy and moments, fp32 gradients, and the weights on their way back; what stays is a buffer for the
            # largest gradient.
            self.host_states, self.states = self.states + part * (4 + half), 0
            self.partition, self.stepping = (part * 4, 0) if cpu else (0, 0)
            self.reduced += head.largest * half


def worst(recipe: Recipe, facts: TargetFacts) -> Batch:
    """The largest micro-batch: all conversations as long as they may be, and all but the picture an answer."""
    longest = longest_tokens(recipe, facts)
    answer = max(longest - facts.visual_tokens - 1, 1)
    visual = min(facts.visual_tokens, longest - 1)
    return Batch(*((n,) * recipe.optim.micro_batch for n in (longest, answer, visual)))
