"""What a target's own config and tokenizer say of it: shape, longest context, tokens with a meaning, fingerprints."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import GenerationConfig

from mmspec.types import InputError, TargetShape


def fingerprint(*parts: bytes) -> str:
    """A short hash of some bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def vocabulary_of(tokenizer: Any) -> bytes:
    """All tokens of a tokenizer with their ids, in one canonical form."""
    return repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode()


def stop_ids(generation: GenerationConfig | None, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    ids = generation.eos_token_id if generation is not None else None
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)


def special_ids(tokenizer: Any) -> frozenset[int]:
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
