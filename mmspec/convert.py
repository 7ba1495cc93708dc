"""Draft heads of other repositories and engines as run folders: names, shapes and settings translated, or refused.

Invariant: nothing is guessed and nothing is left over. A tensor without a place here, a place without a tensor, a
setting that this project's head does not have, frozen copies of another target: each is an error of one line. Files
are read behind the checks of `safety.py`: safetensors alone, nothing is unpickled.

Layouts (facts of the files; the heads themselves are described in `mmspec/heads`):

    eagle                EAGLE-1 and -2: fc, layers.0.* without an input norm
    eagle3               EAGLE-3 of its authors and SGLang: midlayer.*, fc, norm, lm_head, d2t, t2d
    eagle3_speculators   the same under layers.0.*, as speculators writes it for vLLM
    medusa               Medusa's own: {head}.{block}.linear.*, {head}.{n_blocks}.weight
    medusa_vllm          blocks.{head}.layers.{block}.*, lm_heads.{head}.weight
    msd                  EAGLE's names, with an input norm in some
    vispec               EAGLE's names, imadpt.*, img_fc
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmspec import checkpoint, safety
from mmspec.export.engines import ENGINES
from mmspec.export.layouts import ATTENTION, FEEDFORWARD
from mmspec.recipe import build_config, import_head
from mmspec.types import InputError, Target

CLOSE = 0.02
"""Relative difference of frozen copies: roundings to 8 bits are 0.004, other targets are around 1."""
UNITS = 256
"""Unit vectors whose logits [UNITS, V] exist at a time."""
DEPTH, WIDTH, BUDGET = 6, 10, 59
"""Of the tree that a converted head gets: EAGLE-2's for targets of 7 B."""


class Source:
    """A published head: settings of config.json, and tensors that are taken one by one.

    Args:
        place: a folder, or a safetensors file beside its config.json.

    Raises:
        InputError: there are no weights that can be read.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        folder = place if place.is_dir() else place.parent
        if not place.exists():
            raise InputError(f"{place} does not exist; give a folder with a head's safetensors and config.json")
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not files:
            for file in sorted(file for file in place.iterdir() if file.suffix.lower() in safety.PICKLES):
                safety.check_file(file)
            raise InputError(f"{place} has no *.safetensors; give the folder of a published head")
        self.settings = _settings(folder / "config.json")
        self.files = files
        self.tensors: dict[str, Tensor] = {}
        for file in files:
            safety.check_header(safety.check_file(file))
            try:
                read = load_file(str(file))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is damaged ({str(error).splitlines()[0]}); fetch it again") from error
            if twice := sorted(set(read) & set(self.tensors)):
                raise InputError(f"{place} has {twice[0]} in two files; name the right file instead of the folder")
            self.tensors |= read

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        """A tensor that must be there.

        Raises:
            InputError: it is not.
        """
        if name not in self.tensors:
            raise InputError(f"{self.place} has no {name}; is its layout another one (--layout)?")
        return self.tensors.pop(name)

    def numbers(self, pattern: str) -> int:
        """How many heads or blocks there are: one more than the highest number that the pattern's group finds."""
        found = [re.fullmatch(pattern, name) for name in self.tensors]
        return 1 + max((int(match[1]) for match in found if match), default=-1)


@dataclass(frozen=True)
class Found:
    """A head in this project's terms.

    Args:
        kind: file name under `mmspec/heads`.
        values: fields of its `Config`.
        state: its weights by their names here.
    """

    kind: str
    values: dict[str, Any]
    state: dict[str, Tensor]


def convert(
    place: Path | str,
    layout: str,
    target: Target,
    out: Path | str,
    taps: Sequence[int] = (),
    image_input: str | None = None,
    origin: str | None = None,
) -> checkpoint.Checkpoint:
    """Writes a published head as a run folder.

    Args:
        place: its folder, or one safetensors file beside its config.json.
        layout: one of LAYOUTS, or "auto", which goes by the names (an MSD head without input norm has EAGLE's: say so).
        target: what the head was made for.
        out: the run folder.
        taps: EAGLE-3's hidden states, indices as in `mmspec.heads.eagle3`, where its files do not say or say wrong.
        image_input: what the head was trained to see at image positions, where it is not its kind's default.
        origin: where `place` is from, for the record; default: `place`.

    Raises:
        InputError: a file, name, shape or setting without a counterpart, or another target.
    """
    source = Source(Path(place))
    if layout not in ("auto", *LAYOUTS):
        raise InputError(f"--layout {layout!r} is unknown; there are: auto, {', '.join(LAYOUTS)}")
    layout = _detect(source) if layout == "auto" else layout
    names = sorted(source.tensors)
    found = LAYOUTS[layout](source, target)
    if left := sorted(source.tensors):
        raise InputError(f"{place} has {left[0]}, for which the {layout} layout has no place; name it by --layout")
    values = found.values | ({"taps": tuple(taps)} if taps else {})
    values |= {"image_input": image_input} if image_input else {}
    config = build_config(str(place), import_head(found.kind).Config, values).resolve(target.shape)
    head = checkpoint.build_head(found.kind, config)
    state = _fitting(head.state_dict(), found.state, target, place)
    folder = Path(out)
    checkpoint.save_head(folder, state, config, target)
    depth = min(DEPTH, values.get("n_ahead", DEPTH))
    checkpoint.save_tree(folder, checkpoint.DraftTree(depth, WIDTH, BUDGET))
    checkpoint.write_json(
        folder / "provenance.json",
        {
            "schema": checkpoint.SCHEMA,
            "converted": {"from": origin or checkpoint.discreet(str(place)), "layout": layout, "tensors": names},
            "commit": checkpoint.git_commit(),
            "target": {"name": checkpoint.discreet(target.name), "fingerprint": target.fingerprint},
        },
    )
    return checkpoint.load(folder)


def _settings(path: Path) -> dict[str, Any]:
    """What config.json says; of a file that is not there nothing, as some heads need none."""
    return safety.read_settings(path) if os.path.lexists(path) else {}


def _fitting(
    wanted: Mapping[str, Tensor], state: dict[str, Tensor], target: Target, place: Path | str
) -> dict[str, Tensor]:
    """The weights, when names and shapes are those of the head. What a head keeps of its target it gets from there."""
    if "placeholder" in wanted and "placeholder" not in state:
        if target.image_token_id >= target.shape.vocab_size:
            raise InputError(f"--image-input aux: {target.name} has no embedding of its image placeholder")
        token = torch.tensor([target.image_token_id], device=target.device)
        state = state | {"placeholder": target.embed(token)[0].cpu()}
    for name in sorted(set(wanted) | set(state)):
        if name not in state or name not in wanted:
            raise InputError(f"{place}: {name} is {'missing' if name in wanted else 'more'} than its config.json says")
        if wanted[name].shape != state[name].shape:
            raise InputError(
                f"{place}: {name} has shape {tuple(state[name].shape)}, its config.json asks for "
                f"{tuple(wanted[name].shape)}"
            )
    return state


def _detect(source: Source) -> str:
    """The layout, by names that no other one has."""
    marks = {
        "eagle3": r"midlayer\..*",
        "medusa_vllm": r"(medusa_heads\.)?blocks\.\d+\.layers\..*",
        "medusa": r"(medusa_heads?\.)?\d+\.\d+\.linear\.weight",
        "vispec": r"imadpt\..*",
        "eagle3_speculators": r"layers\.0\.hidden_norm\.weight",
        "msd": r"layers\.0\.input_layernorm\.weight",
        "eagle": r"layers\.0\.self_attn\.q_proj\.weight",
    }
    for layout, pattern in marks.items():
        if any(re.fullmatch(pattern, name) for name in source.tensors):
            return layout
    some = ", ".join(sorted(source.tensors)[:3])
    raise InputError(f"{source.place} is of no known layout (it has {some}); give --layout: {', '.join(LAYOUTS)}")


# ---- what layouts share ----


def _shape(source: Source, target: Target, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a head of EAGLE's family, from settings with the names of transformers' Llama.

    Raises:
        InputError: the head was made for another width or vocabulary, or for a block that is not here.
    """
    said = {key: value for key, value in settings.items() if value is not None}

    def must(key: str) -> int:
        if key not in said:
            raise InputError(f"{source.place}: config.json does not say {key!r}; fetch the head's own config.json")
        return int(said[key])

    for key, least in (("hidden_size", target.shape.hidden_size), ("target_hidden_size", target.shape.hidden_size)):
        if said.get(key, least) != least:
            raise InputError(f"{source.place} has {key} {said[key]}, but the target {target.name} has {least}")
    if said.get("vocab_size", 0) > target.shape.vocab_size:
        raise InputError(
            f"{source.place} has vocab_size {said['vocab_size']}, but the target {target.name} has "
            f"{target.shape.vocab_size}"
        )
    for key, known in (("num_hidden_layers", 1), ("hidden_act", "silu")):
        if said.get(key, known) != known:
            raise InputError(f"{source.place} has {key} {said[key]!r}; heads here have {known!r}")
    rope = {**(said.get("rope_parameters") or {}), **(said.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise InputError(f"{source.place} has rope_scaling {kind!r}; heads here have none")
    heads = must("num_attention_heads")
    width = int(said.get("head_dim", must("hidden_size") // heads))
    side = 3 * (width // 2) // 8
    if rope.get("mrope_section") not in (None, [width // 2 - 2 * side, side, side]):
        raise InputError(f"{source.place} has mrope_section {rope['mrope_section']}; heads here split 1 : 1.5 : 1.5")
    return {
        "intermediate_size": must("intermediate_size"),
        "n_heads": heads,
        "n_kv_heads": int(said.get("num_key_value_heads", heads)),
        "head_dim": width,
        "rms_eps": float(said.get("rms_norm_eps", target.shape.rms_eps)),
        "rope_theta": float(said.get("rope_theta", rope.get("rope_theta", 10000.0))),
        "rope": "mrope" if "mrope_section" in rope else "1d",
    }


def _block(source: Source, prefix: str, norms: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of the decoder block: {name here: tensor}.

    Args:
        norms: {name there: name here} of those beside the one before the MLP.

    Raises:
        InputError: something is missing, or the layer has biases.
    """
    state = {f"block.{name}.weight": source.take(f"{prefix}self_attn.{name}.weight") for name in ATTENTION}
    state |= {f"block.mlp.{name}.weight": source.take(f"{prefix}mlp.{name}.weight") for name in FEEDFORWARD}
    for theirs, ours in {"post_attention_layernorm": "post_attention_layernorm", **norms}.items():
        state[f"block.{ours}.weight"] = source.take(f"{prefix}{theirs}.weight")
    for name in [name for name in source.tensors if name.startswith(prefix) and name.endswith(".bias")]:
        if source.tensors[name].any():
            raise InputError(f"{source.place} has {name}: the block of heads here has no biases")
        source.take(name)
    return state


def _frozen(source: Source, name: str, target: Target, rows: Callable[[Tensor], Tensor]) -> None:
    """Takes a copy of the target's that a head need not keep, where there is one.

    Args:
        rows: the target's own rows [n, D] of some tokens.

    Raises:
        InputError: it is another target's.
    """
    if name not in source:
        return
    copy = source.take(name)
    if copy.dim() != 2 or copy.shape[1] != target.shape.hidden_size or len(copy) > target.shape.vocab_size:
        raise InputError(f"{source.place}: {name} has shape {tuple(copy.shape)}, which is none of {target.name}'s")
    tokens = torch.linspace(0, len(copy) - 1, min(64, len(copy))).long()
    mine, theirs = rows(tokens).double().cpu(), copy[tokens].double()
    if float((mine - theirs).norm()) > CLOSE * float(mine.norm()):
        raise InputError(f"{source.place}: {name} is not that of {target.name}; give --target the head's own target")


def _embeddings(source: Source, target: Target) -> None:
    """Takes the frozen copy of the input embedding."""
    _frozen(source, "embed_tokens.weight", target, lambda tokens: target.embed(tokens.to(target.device)))


def _unembedding(source: Source, name: str, target: Target) -> None:
    """Takes the frozen copy of the unembedding."""

    def rows(tokens: Tensor) -> Tensor:
        D = target.shape.hidden_size
        # A target hands out no weights; of all unit vectors at once the logits would be gigabytes.
        units = (F.one_hot(part, D).to(target.device, target.dtype) for part in torch.arange(D).split(UNITS))
        return torch.cat([target.unembed(some)[:, tokens.to(target.device)] for some in units]).T

    _frozen(source, name, target, rows)


# ---- one function a layout ----


def _eagle(source: Source, target: Target, kind: str = "eagle") -> Found:
    values = _shape(source, target, source.settings)
    values["input_norm"] = "layers.0.input_layernorm.weight" in source
    norms = {"input_layernorm": "input_layernorm"} if values["input_norm"] else {}
    state = {"fc.weight": source.take("fc.weight"), **_block(source, "layers.0.", norms)}
    bias = torch.zeros(len(state["fc.weight"]), dtype=state["fc.weight"].dtype)
    state["fc.bias"] = source.take("fc.bias") if "fc.bias" in source else bias
    _embeddings(source, target)
    return Found(kind, values, state)


def _msd(source: Source, target: Target) -> Found:
    return _eagle(source, target, "msd")


def _vispec(source: Source, target: Target) -> Found:
    eagle, D = _eagle(source, target, "vispec"), target.shape.hidden_size
    state = {f"adaptor.{name}.weight": source.take(f"imadpt.{name}.weight") for name in ATTENTION[1:]}
    state["adaptor.query"] = source.take("imadpt.q")
    whole = source.take("img_fc.weight")
    state["inject_state.weight"], state["inject_image.weight"] = whole[:, :D], whole[:, D:]
    state["inject_state.bias"] = source.take("img_fc.bias")
    values = {"n_queries": len(state["adaptor.query"]), "image_input": "compressed"}
    return Found("vispec", eagle.values | values, eagle.state | state)


def _eagle3(source: Source, target: Target, prefix: str = "midlayer.", format: str = "sglang") -> Found:
    settings = source.settings | (source.settings.get("transformer_layer_config") or {})
    values = _shape(source, target, settings)
    for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if source.settings.get(key):
            raise InputError(f"{source.place} has {key}=true: the eagle3 head here is without it")
    eagle: Mapping[str, Any] = source.settings.get("eagle_config") or {}
    if eagle.get("use_aux_hidden_state") is False:
        raise InputError(f"{source.place} has use_aux_hidden_state=false: the eagle3 head here reads three states")
    ids = source.settings.get("eagle_aux_hidden_state_layer_ids") or eagle.get("eagle_aux_hidden_state_layer_ids")
    values["taps"] = tuple(int(layer) + ENGINES[format].layer_offset for layer in ids or ())
    norms = {"input_layernorm": "input_layernorm", "hidden_norm": "hidden_norm"}
    state = {f"{name}.weight": source.take(f"{name}.weight") for name in ("fc", "norm", "lm_head")}
    state |= _block(source, prefix, norms)
    _embeddings(source, target)
    ids_here = _draft_ids(source, len(state["lm_head.weight"]), target)
    values["draft_vocab_size"] = len(ids_here)
    if len(ids_here) < target.shape.vocab_size:
        state["draft_ids"] = ids_here
    return Found("eagle3", values, state)


def _eagle3_speculators(source: Source, target: Target) -> Found:
    # Without a word on it vLLM takes the norm to stand before the residual, which it does not do here.
    if source.settings.get("norm_before_residual") is None:
        raise InputError(f"{source.place}: config.json does not say norm_before_residual; set it as it was trained")
    return _eagle3(source, target, "layers.0.", "speculators")


def _draft_ids(source: Source, size: int, target: Target) -> Tensor:
    """[V'] int64, ascending: the target's ids of the draft vocabulary.

    Raises:
        InputError: the two maps contradict each other or leave the target's vocabulary.
    """
    ids = torch.arange(size)
    if "d2t" in source:
        offsets = source.take("d2t").long()
        if offsets.shape != ids.shape:
            raise InputError(f"{source.place}: d2t has {len(offsets)} entries for the {size} rows of lm_head.weight")
        ids = ids + offsets
    if size > target.shape.vocab_size or int(ids.max()) >= target.shape.vocab_size or bool((ids.diff() <= 0).any()):
        raise InputError(
            f"{source.place}: its draft vocabulary is no ascending part of the {target.shape.vocab_size} tokens of "
            f"{target.name}"
        )
    if "t2d" in source:
        inside = source.take("t2d").bool().nonzero().squeeze(1)
        if not torch.equal(inside, ids):
            raise InputError(f"{source.place}: t2d and d2t name different tokens; fetch it again")
    return ids


def _medusa(source: Source, target: Target) -> Found:
    """Medusa's own names, of which those of vLLM are another spelling."""
    source.tensors = {re.sub(r"^medusa_heads?\.", "", name): tensor for name, tensor in source.tensors.items()}
    n_blocks = source.numbers(r"0\.(\d+)\.linear\.weight")
    for head in range(source.numbers(r"(\d+)\.0\.linear\.weight")):
        for block in range(n_blocks):
            for part in ("weight", "bias"):
                source.tensors[f"blocks.{head}.layers.{block}.{part}"] = source.take(f"{head}.{block}.linear.{part}")
        if f"{head}.{n_blocks}.weight" in source:
            source.tensors[f"lm_heads.{head}.weight"] = source.take(f"{head}.{n_blocks}.weight")
    return _medusa_vllm(source, target)


def _medusa_vllm(source: Source, target: Target) -> Found:
    source.tensors = {name.removeprefix("medusa_heads."): tensor for name, tensor in source.tensors.items()}
    if "token_map" in source:
        raise InputError(f"{source.place} has token_map: the medusa head here has the target's whole vocabulary")
    if source.settings.get("logit_scale", 1.0) != 1.0:
        raise InputError(f"{source.place} has logit_scale {source.settings['logit_scale']}; the medusa head has none")
    n_ahead = source.numbers(r"blocks\.(\d+)\.layers\.0\.weight")
    n_blocks = source.numbers(r"blocks\.0\.layers\.(\d+)\.weight")
    state: dict[str, Tensor] = {}
    for head in range(n_ahead):
        for block in range(n_blocks):
            there, here = f"blocks.{head}.layers.{block}", f"blocks.{head}.{block}.linear"
            state[f"{here}.weight"] = weight = source.take(f"{there}.weight")
            none = torch.zeros(len(weight), dtype=weight.dtype)
            state[f"{here}.bias"] = source.take(f"{there}.bias") if f"{there}.bias" in source else none
    if source.settings.get("original_lm_head"):
        for name in ("lm_head.weight", "lm_heads.0.weight"):
            _unembedding(source, name, target)
    own = "lm_heads.0.weight" in source
    for head in range(n_ahead if own else 0):
        state[f"lm_heads.{head}.weight"] = source.take(f"lm_heads.{head}.weight")
    if not n_ahead:
        raise InputError(
            f"{source.place} has no residual block of a medusa head; is its layout another one (--layout)?"
        )
    return Found("medusa", {"n_ahead": n_ahead, "n_blocks": n_blocks, "own_head": own}, state)


LAYOUTS: dict[str, Callable[[Source, Target], Found]] = {
    "eagle": _eagle,
    "eagle3": _eagle3,
    "eagle3_speculators": _eagle3_speculators,
    "medusa": _medusa,
    "medusa_vllm": _medusa_vllm,
    "msd": _msd,
    "vispec": _vispec,
}
"""Reads what a layout's files hold, {name: reader}."""
