"""A frozen Hugging Face vision-language model as a decoding target, unmodified.

What the model is given instead of patches: explicit positions, an additive 4-D mask for the tree, a cache whose
layers write into ragged buffers (`mmspec.cache`), and an attention function of our own (both in `_adapters.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoProcessor, GenerationConfig
from transformers.cache_utils import Cache

from mmspec.cache import RaggedKV
from mmspec.targets._adapters import RECORDER, SEGMENTS, MassRecorder, NodeMass, RaggedLayer
from mmspec.targets._marks import locate, mark
from mmspec.targets._packed import pack
from mmspec.targets._rows import Place, fill, lay_out, spread
from mmspec.targets._static import StaticPasses, padded_slots
from mmspec.types import Accepted, Features, Forward, InputError, Prompt, TargetShape, Tree


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


class HFTarget:
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
        self.stop_ids = _stop_ids(model.generation_config, processor.tokenizer)
        self.special_ids = _special_ids(processor.tokenizer) | {self.image_token_id}
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

    @classmethod
    def load_processor(cls, path: str) -> Any:
        """The processor of a folder or Hub id: tokenizer, image processor and chat template behind one call."""
        return AutoProcessor.from_pretrained(path)

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

    # ---- prompts ----

    def encode(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Prompt:
        """Render the chat template with the generation prompt, expand image placeholders.

        Args:
            messages: Hugging Face chat messages, content as a list of {type: image} and {type: text, text}.
            images: PIL images in order of their placeholders.
        """
        return self._encode(self._render(messages, True), images)

    def encode_dialogue(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> tuple[Prompt, Tensor]:
        """A finished conversation and, per token, the number of the reply it belongs to.

        Replies are marked from the first token that the target would write to the stop token; see `_marks.py`.
        The processor, which is where images cost, runs once. Nothing is padded, whatever the tokenizer's side for that.

        Returns:
            Prompt of length L, and [L] int64: 0 outside replies, else 1-based.

        Raises:
            ValueError: a reply cannot be located exactly, or the template leaves an image out.
        """
        text, replies = locate(messages, self._render, self._stops(), self.name)
        wanted, shown = _n_images(messages), text.count(self.processor.image_token)
        if wanted != shown:
            raise ValueError(f"the chat template of {self.name} shows {shown} images of a conversation with {wanted}")
        prompt = self._encode(text, images)
        ids, numbers = mark(text, replies, self._tokenize, self.name)
        # Expanding an image repeats its placeholder: all other tokens are the same ones in the same order.
        others = ids != self.image_token_id
        if not torch.equal(ids[others], prompt.input_ids[~prompt.visual]):
            raise ValueError(f"the processor of {self.name} changes other tokens than those of images")
        answer = torch.zeros(len(prompt), dtype=torch.long)
        answer[~prompt.visual] = numbers[others]
        return prompt, answer

    def limit_pixels(self, least: int, most: int) -> None:
        """Bounds what images are scaled to, in pixels.

        Raises:
            ValueError: the family's images have a size of their own.
        """
        raise ValueError(f"{self.name} scales every image to one size; leave its pixels as they are")

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    def _render(self, messages: Sequence[Mapping[str, Any]], generate: bool) -> str:
        for message in messages:
            parts = [] if isinstance(message["content"], str) else message["content"]
            for kind in {part["type"] for part in parts} - {"image", "text"}:
                raise InputError(
                    f"a message with '{kind}' content cannot be encoded; targets take images and text only"
                )
        try:
            text = self.processor.apply_chat_template(list(messages), add_generation_prompt=generate, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.name} refuses the conversation: {error}") from error
        return str(text)

    def _stops(self) -> list[str]:
        """The stop tokens as text, the tokenizer's end of sequence first."""
        tokens = self.processor.tokenizer
        ids = sorted(self.stop_ids, key=lambda token: (token != tokens.eos_token_id, token))
        return [token for token in tokens.convert_ids_to_tokens(ids) if token]

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text with its placeholders as they are, and each one's characters where the tokenizer knows them."""
        tokens = self.processor.tokenizer
        out = tokens(text, add_special_tokens=not self._begun(text), return_offsets_mapping=tokens.is_fast)
        return out["input_ids"], out.get("offset_mapping", [])

    def _begun(self, text: str) -> bool:
        """Whether the template has already written the token that begins a sequence."""
        begin = self.processor.tokenizer.bos_token
        return bool(begin) and text.startswith(begin)

    def _encode(self, text: str, images: Sequence[Any]) -> Prompt:
        n_images = text.count(self.processor.image_token)
        if n_images > len(images):
            raise InputError(f"the prompt has {n_images} image placeholders but {len(images)} images came with it")
        out = self.processor(
            text=[text],
            images=list(images[:n_images]) or None,
            return_tensors="pt",
            add_special_tokens=not self._begun(text),
        )
        ids = out["input_ids"][0]
        pixels = {k: v for k, v in out.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        return Prompt(ids, ids == self.image_token_id, pixels)

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
        with self._tapped(taps) as hidden, self._measured(state.mass_layer, mine) as measured:
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
        tapped = self._tapped(taps) if taps else contextlib.nullcontext(dict[int, Tensor]())
        measuring = contextlib.nullcontext() if visual is None else self._measured(mass_layer, visual)
        with tapped as hidden, measuring as measured:
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
        with self._tapped(taps) as tapped, self._noted(noted):
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

    @contextlib.contextmanager
    def _tapped(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Outputs of the tapped layers during one pass: index k is what leaves the k-th layer (0: the embeddings)."""
        hidden: dict[int, Tensor] = {}
        handles = []
        for tap in taps:

            def save(_: nn.Module, args: tuple[Any, ...], tap: int = tap) -> None:
                hidden[tap] = args[0]

            handles.append(self._layer_or_norm(tap).register_forward_pre_hook(save))
        try:
            yield hidden
        finally:
            for handle in handles:
                handle.remove()

    def _layer_or_norm(self, tap: int) -> nn.Module:
        """The module whose input is hidden_states[tap] before the final norm."""
        layers = self.text_model.layers
        if not 0 <= tap <= len(layers):
            raise ValueError(f"tap {tap} is outside 0..{len(layers)}, the hidden states of {self.name}")
        return self.text_model.norm if tap == len(layers) else layers[tap]

    @contextlib.contextmanager
    def _measured(self, layer: int | None, visual: Tensor | None) -> Iterator[NodeMass | None]:
        """Visual attention of a layer's queries during one pass over a cache."""
        if layer is None or visual is None:
            yield None
            return
        attention, recorder = self.text_model.layers[layer].self_attn, NodeMass(visual)
        attention.__dict__[RECORDER] = recorder
        try:
            yield recorder
        finally:
            del attention.__dict__[RECORDER]

    @contextlib.contextmanager
    def _noted(self, notes: Mapping[str, Any]) -> Iterator[None]:
        """What our attention is to know during one pass besides its arguments."""
        modules = [layer.self_attn for layer in self.text_model.layers]
        for module in modules:
            module.__dict__.update(notes)
        try:
            yield
        finally:
            for module, name in itertools.product(modules, notes):
                del module.__dict__[name]

    def _fingerprint(self, vocabulary: bytes) -> str:
        """Identifies the weights a head was trained on: shape, vocabulary, and samples of three tensors in bf16.

        bf16, so that one checkpoint gives one fingerprint in whatever dtype it is run.
        """
        samples = [repr(self.shape).encode(), vocabulary]
        for weight in (self.embedding.weight, self.lm_head.weight, self.text_model.norm.weight):
            sample = weight.detach().flatten()[:65536].to("cpu", torch.bfloat16).view(torch.int16)
            samples.append(sample.numpy().tobytes())
        return fingerprint(*samples)


def fingerprint(*parts: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def vocabulary_of(tokenizer: Any) -> bytes:
    """All tokens of a tokenizer with their ids, in one canonical form."""
    return repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode()


def _n_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Images among the content of messages."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


def _stop_ids(generation: GenerationConfig | None, tokenizer: Any) -> frozenset[int]:
    ids = generation.eos_token_id if generation is not None else None
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that `decode` leaves out."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {int(i) for i, token in added if token.special}


def context_limit(text: Any) -> int:
    """Tokens a text model can hold while all its layers see all of them.

    Our attention knows no sliding window, which makes no difference until one is full.

    Raises:
        InputError: layers that are not attention, or attend to something else than the past.
    """
    kinds = set(getattr(text, "layer_types", None) or ())
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise InputError(f"a text model with layers of '{strange[0]}' cannot be a target; trees need full attention")
    window = getattr(text, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    limit = int(text.max_position_embeddings)
    return min(limit, int(window)) if window else limit


def text_shape(text: Any) -> TargetShape:
    """The shape of a text model from its transformers config."""
    rope = getattr(text, "rope_parameters", None) or {}
    return TargetShape(
        hidden_size=int(text.hidden_size),
        intermediate_size=int(text.intermediate_size),
        n_layers=int(text.num_hidden_layers),
        n_heads=int(text.num_attention_heads),
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        vocab_size=int(text.vocab_size),
        rms_eps=float(text.rms_norm_eps),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
