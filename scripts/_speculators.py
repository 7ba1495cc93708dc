"""Draft logits of an exported folder by the `speculators` package, in whatever Python has it; imports nothing of ours

    PYTHON -I scripts/_speculators.py FOLDER INPUTS.safetensors OUT.safetensors

INPUTS has `hidden` [1, N, 3D] and `input_ids` [1, N], OUT the logits [S + 1, N, V'] of S + 1 draft steps from every
position, and `d2t` where the head has one. `export.py --verify` runs it with the Python that MMSPEC_SPECULATORS_PYTHON
names, or its own.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STEPS = 3


def main(folder: str, inputs: str, out: str) -> None:
    """Loads, drafts, writes."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config: Any = SpeculatorModelConfig.from_pretrained(folder)
    # Its own attention, FlexAttention, takes no sequence that is not a multiple of its blocks.
    config.transformer_layer_config._attn_implementation = "eager"
    model: Any = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    given, logits = load_file(inputs), []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    with torch.no_grad():
        model(given["hidden"], given["input_ids"], torch.zeros_like(given["input_ids"]), ttt_steps=STEPS)
    result = {"logits": torch.stack(logits)} | ({} if model.d2t is None else {"d2t": model.d2t})
    said = {
        "version": version("speculators"),
        "class": type(model).__name__,
        "layer_ids": config.eagle_aux_hidden_state_layer_ids,
        "norm_before_residual": config.norm_before_residual,
    }
    save_file(result, out, {"said": json.dumps(said)})


if __name__ == "__main__":
    main(*sys.argv[1:])
