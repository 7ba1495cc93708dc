"""A frozen Hugging Face vision-language model as a decoding target, unmodified.

What the model is given instead of patches: explicit positions, an additive 4-D mask for the tree, a cache whose
layers write into ragged buffers (`mmspec.cache`), and an attention function of our own (both in `_adapters.py`).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from mmspec.cache import RaggedKV
from mmspec.targets._adapters import RECORDER, SEGMENTS, MassRecorder, RaggedLayer
from mmspec.targets._facts import context_limit, fingerprint, special_ids, stop_ids, text_shape, vocabulary_of
from mmspec.targets._hooks import measure, note, tap
from mmspec.targets._packed import pack
from mmspec.targets._prompts import Prompting
from mmspec.targets._rows import Place, fill, lay_out, spread
from mmspec.targets._static import StaticPasses, padded_slots
from mmspec.types import Accepted, Features, Forward, InputError, Prompt, Tree


@dataclass
class HFState:
    """Decoding state: ragged buffers, their transformers face, and per-row position offsets (0 but for M-RoPE)."""

    kv: RaggedKV
    cache: Cache
    rope_delta: Tensor
    passes: StaticPasses | None = None
    mass_layer: int | None = None
    """Decoder layer whose visual attention is measured."""
    visual: Tensor | None = None
    """[B, S] bool, slots that hold image positions; kept where attention is measured."""

    @property
    def lengths(self) -> list[int]:
        return self.kv.lengths

    @property
    def lengths_device(self) -> Tensor:
        return self.kv.lengths_device


class HFTarget(Prompting):
    """Mechanics common to all families; a family's file says how images enter and what positions look like.

    Args:
        model: a `...ForConditionalGeneration`, frozen, in eval mode, its text model on the `mmspec` attention.
        processor: the matching processor.
        name: what the user called it.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor, self.name = processor, name
        self.text_model: Any = model.model.language_model
        self.lm_head: Any = model.get_output_embeddings()
        self.embedding: Any = model.get_input_embeddings()
        pack(self.text_model.layers)
        text = model.config.get_text_config()
        self.shape = text_shape(text)
        self.image_token_id = int(model.config.image_token_id)
        self.max_length = context_limit(text)
        self.stop_ids = stop_ids(model.generation_config, processor.tokenizer)
        self.special_ids = special_ids(processor.tokenizer) | {self.image_token_id}
        self.device = self.lm_head.weight.device
        self.dtype = self.lm_head.weight.dtype
        vocabulary = vocabulary_of(processor.tokenizer)
        self.vocabulary = fingerprint(vocabulary)
        self.fingerprint = self._fingerprint(vocabulary)
        self._seen, self._hidden = torch.tensor([0.0, float("-inf")], dtype=self.dtype, device=self.device)
        """What an additive mask holds where a node sees another, and where not."""
        self.static = self.device.type == "cuda"
        """Whether verification runs at fixed shapes, as CUDA graphs need it; set it before a state is opened."""
        self._shelf: deque[HFState] = deque(maxlen=1)

    # ---- what a family overrides ----

    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Projected features of all images of one prompt, [n_visual, D], in order of their placeholders.

        Columns beyond D, where a family has them, go to `deep_inputs`.
        """
        raise NotImplementedError

    def deep_inputs(self, visual: Tensor, features: Tensor) -> dict[str, Any]:
        """What the text model takes of images besides its input embeddings.

        Args:
            visual: [B, T] bool.
            features: [n_visual, W - D], columns beyond D of all rows' `image_features`.
        """
        return {}

    def prompt_positions(self, prompt: Prompt) -> tuple[Tensor, int]:
        """Position ids of a prompt and its rope delta (next position = length + delta)."""
        return torch.arange(len(prompt), device=self.device).unsqueeze(0), 0

    def position_ids(self, positions: Tensor) -> Tensor:
        """Position ids for text at [B, M] positions, in the shape that the family's text model takes."""
        return positions

    # ---- decoding ----

    def open(self, max_batch: int, max_tokens: int, mass_layer: int | None = None) -> HFState:
        """Buffers for `max_batch` rows of `max_tokens` slots each, tree nodes included.

        Args:
            mass_layer: decoder layer (0-based, -1 the last) whose visual attention is to be in every `Forward`.
        """
        text = self.model.config.get_text_config()
        s = self.shape
        capacity = padded_slots(max_tokens) if self.static else max_tokens
        kept = self._shelf.pop() if self.static and self._shelf else None
        fits = kept is not None and kept.kv.lengths_device.shape[0] == max_batch and kept.kv.capacity >= capacity
        if kept is not None and fits and kept.mass_layer == mass_layer:
            for row in range(max_batch):
                kept.kv.set_length(row, 0)
            return self._lend(kept)
        kept = None  # its buffers go before others are made: a GPU need not hold both
        kv = RaggedKV(s.n_layers, max_batch, s.n_kv_heads, capacity, s.head_dim, self.dtype, self.device)
        cache = Cache(layers=[RaggedLayer(kv, i) for i in range(text.num_hidden_layers)])
        state = HFState(kv, cache, torch.zeros(max_batch, dtype=torch.long, device=self.device), None, mass_layer)
        if mass_layer is not None:
            state.visual = torch.zeros((max_batch, capacity), dtype=torch.bool, device=self.device)
        if not self.static:
            return state
        seen = state.visual
        verify = functools.partial(self._verify, cache, mass_layer, seen)
        state.passes = StaticPasses(kv, state.rope_delta, lambda taps: functools.partial(verify, taps))
        return self._lend(state)

    def free(self) -> None:
        """Give up the buffers that are kept for the next run of the same size: long work without decoding follows."""
        self._shelf.clear()

    def _lend(self, state: HFState) -> HFState:
        """The state for one user; when it is dropped, its buffers and captured passes are kept for the next one."""
        lent = replace(state)
        weakref.finalize(lent, self._shelf.append, state).atexit = False
        return lent

    def prefill(self, state: HFState, row: int, prompt: Prompt, taps: Sequence[int] = ()) -> Forward:
        """Run a prompt into one row; logits of the last position only."""
        ids = prompt.input_ids.to(self.device).unsqueeze(0)
        visual = prompt.visual.to(self.device).unsqueeze(0)
        embeds, deep = self.merge(ids, visual, [prompt.pixels])
        positions, delta = self.prompt_positions(prompt)
        state.kv.begin_prefill(row)
        state.rope_delta[row] = delta
        mine = None
        if state.visual is not None:
            mine = state.visual[row : row + 1]
            mine.zero_()
            mine[:, : len(prompt)] = visual
        measuring = measure(self.text_model, state.mass_layer, mine)
        with tap(self.text_model, taps, self.name) as hidden, measuring as measured:
            last = self._text(embeds, positions, None, state.cache, **deep)
        state.kv.set_length(row, len(prompt))
        mass = measured.mass if measured else None
        axes = positions.expand(3, 1, -1)
        return Forward(self.unembed(last[:, -1:]), last, hidden, embeds, visual, mass, axes)

    def forward(self, state: HFState, trees: Tree, taps: Sequence[int] = ()) -> Forward:
        """Verify trees: every node sees its row's committed tokens and its own ancestors."""
        if state.passes is not None:
            return state.passes.run(trees, tuple(taps))
        kv = state.kv
        kv.begin_tree(trees.tokens.shape[1])
        positions = (kv.lengths_device + state.rope_delta).unsqueeze(1) + trees.depths
        mask = self._mask(kv, trees)
        return self._verify(state.cache, state.mass_layer, state.visual, taps, trees.tokens, positions, mask)

    def _verify(
        self,
        cache: Cache,
        mass_layer: int | None,
        visual: Tensor | None,
        taps: Sequence[int],
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
    ) -> Forward:
        """The tree pass over a cache: tokens and positions [B, N], mask [B, 1, N, S] or None."""
        tapping = tap(self.text_model, taps, self.name) if taps else contextlib.nullcontext(dict[int, Tensor]())
        measuring = contextlib.nullcontext() if visual is None else measure(self.text_model, mass_layer, visual)
        with tapping as hidden, measuring as measured:
            last = self._text(self.embed(tokens), self.position_ids(positions), mask, cache)
        return Forward(self.unembed(last), last, hidden, visual_mass=measured.mass if measured else None)

    def keep(self, state: HFState, accepted: Accepted, paths: Sequence[Sequence[int]]) -> None:
        """Commit each row's path and drop the other nodes."""
        state.kv.commit(accepted.path, paths)

    def release(self, state: HFState, row: int) -> None:
        """Free a row: it holds nothing until its next prefill."""
        state.kv.set_length(row, 0)

    def _mask(self, kv: RaggedKV, trees: Tree) -> Tensor | None:
        """Additive mask [B, 1, N, offset + N]; float, because eager attention adds a boolean one as 0 and 1.

        None where every node sees everything: one token behind rows of one length.
        """
        if trees.tokens.shape[1] == 1 and len(set(kv.lengths)) == 1:
            return None
        mask = F.pad(torch.where(trees.ancestors, self._seen, self._hidden).unsqueeze(1), (kv.offset, 0))
        if len(set(kv.lengths)) > 1:
            mask[..., : kv.offset].masked_fill_(~kv.visible(kv.offset)[:, None, None], float("-inf"))
        return mask

    def _text(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None, **deep: Any) -> Tensor:
        out = self.text_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **deep,
        )
        return out.last_hidden_state

    # ---- shared, frozen ends ----

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.to(self.dtype))

    def layer_weights(self, index: int) -> Mapping[str, Tensor]:
        """The weights of one decoder layer, complete and by their own names, to start a head from; not to be changed.

        Args:
            index: 0 is the first layer, -1 the last.

        Raises:
            InputError: there is no such layer.
        """
        layers = self.text_model.layers
        if not -len(layers) <= index < len(layers):
            raise InputError(f"layer {index} is outside 0..{len(layers) - 1}, the decoder layers of {self.name}")
        return {name: weight.detach() for name, weight in layers[index].state_dict().items()}

    def merge(
        self,
        ids: Tensor,
        visual: Tensor,
        pixels: Sequence[Mapping[str, Tensor]],
        instead: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Input embeddings [B, T, D] with image features at the placeholders, and the family's `deep_inputs`.

        Args:
            instead: [W], stands at every placeholder in place of the images' features.
        """
        if instead is None:
            features = [self.image_features(p) for p in pixels if p]
        else:
            features = [instead.to(self.device).expand(int(visual.sum()), -1)] * bool(visual.any())
        if not features:
            return self.place(ids, visual), {}
        stacked, D = torch.cat(features), self.shape.hidden_size
        if stacked.shape[0] != int(visual.sum()):
            raise ValueError(f"{int(visual.sum())} image placeholders but {stacked.shape[0]} image features")
        return self.place(ids, visual, stacked[:, :D]), self.deep_inputs(visual, stacked[:, D:].to(self.dtype))

    def place(self, ids: Tensor, visual: Tensor, features: Tensor | None = None) -> Tensor:
        """Input embeddings [B, T, D], with image features [n_visual, D] at the placeholders."""
        # The placeholder's own id may lie beyond a smaller embedding table; what stands there is overwritten anyway.
        embeds = self.embed(ids.masked_fill(visual, 0))
        return embeds if features is None else embeds.masked_scatter(visual.unsqueeze(-1), features.to(embeds.dtype))

    # ---- training ----

    @torch.no_grad()
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
    ) -> Features:
        """Teacher-forced states of finished conversations, right-padded: causal attention needs no padding mask then.

        Args:
            prompts, answers: as `encode_dialogue` gives them.
            taps: indices into hidden_states to return as well.
            mass_layers: decoder layers (0-based) whose visual attention mass is wanted; not of packed rows.
            pack: tokens of a row that several conversations share, each as if it were alone; 0: one a row.
            weights: [L] of each conversation, handed on as `Features.weight`; empty: none.
            instead: [W], a feature that stands at every image position: what would the target do without the image?
            hidden: states of answers, and those that chose their tokens, see no image position; not of packed rows.
        """
        if pack and (mass_layers or hidden):
            raise ValueError(
                f"visual attention is measured and hidden in rows of one conversation, not with pack={pack}"
            )
        places = lay_out([len(prompt) for prompt in prompts], pack)
        rows = fill(prompts, answers, places, self.device)
        # Image features are merged row by row.
        in_rows = [prompts[i] for i in sorted(range(len(prompts)), key=lambda i: (places[i].row, places[i].start))]
        embeds, deep = self.merge(rows.input_ids, rows.visual, [prompt.pixels for prompt in in_rows], instead)
        recorder = MassRecorder(mass_layers, rows.visual) if mass_layers else None
        noted = {RECORDER: recorder} if recorder else {SEGMENTS: [place.at for place in places]} if pack else {}
        positions = self._positions(prompts, places, rows.segment)
        mask = self._without_images(rows.answer, rows.visual) if hidden else None
        with tap(self.text_model, taps, self.name) as tapped, note(self.text_model, noted):
            last = self._text(embeds, positions, mask, None, **deep)
        mass = torch.stack([recorder.mass[layer] for layer in mass_layers], -1) if recorder else None
        return Features(
            rows.input_ids,
            rows.segment > 0,
            rows.answer,
            rows.visual,
            last,
            embeds,
            tapped,
            mass,
            rows.segment if pack else None,
            positions.expand(3, *rows.input_ids.shape),
            spread(weights, places, rows.segment) if weights else None,
        )

    def _without_images(self, answer: Tensor, visual: Tensor) -> Tensor:
        """Additive mask [B, 1, T, T], causal, in which answers and the states that chose their tokens see no image."""
        T = answer.shape[1]
        blind = answer > 0
        blind = blind | F.pad(blind[:, 1:], (0, 1))
        seen = torch.ones(T, T, dtype=torch.bool, device=answer.device).tril()
        seen = seen & ~(blind.unsqueeze(2) & visual.unsqueeze(1))
        return torch.where(seen, self._seen, self._hidden).unsqueeze(1)

    def _positions(self, prompts: Sequence[Prompt], places: Sequence[Place], segment: Tensor) -> Tensor:
        """Position ids of a batch; padding stands at 0, where no token before it looks."""
        positions = self.position_ids(torch.zeros_like(segment)).clone()
        for prompt, place in zip(prompts, places):
            positions[(..., *place.at)] = self.prompt_positions(prompt)[0][..., 0, :]
        return positions

    def _fingerprint(self, vocabulary: bytes) -> str:
        """Identifies the weights a head was trained on: shape, vocabulary, and samples of three tensors in bf16.

        bf16, so that one checkpoint gives one fingerprint in whatever dtype it is run.
        """
        samples = [repr(self.shape).encode(), vocabulary]
        for weight in (self.embedding.weight, self.lm_head.weight, self.text_model.norm.weight):
            sample = weight.detach().flatten()[:65536].to("cpu", torch.bfloat16).view(torch.int16)
            samples.append(sample.numpy().tobytes())
        return fingerprint(*samples)
