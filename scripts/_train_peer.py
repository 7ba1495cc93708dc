"""The peer's side of bench_train: one training step of speculators' `Eagle3DraftModel`, in its own environment."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from _sides import optimised, serve
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig


def build(settings: dict[str, Any]) -> Eagle3DraftModel:
    """Its model with random weights: a Llama block, eager attention, the verifier's whole vocabulary."""
    layer = LlamaConfig(
        vocab_size=settings["vocab"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["inner"],
        num_hidden_layers=1,
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        head_dim=settings["hidden"] // settings["heads"],
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    proposal = GreedyTokenProposalConfig(speculative_tokens=settings["steps"])
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=settings["vocab"],
        eagle_aux_hidden_state_layer_ids=[0, 1, 2],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    model = Eagle3DraftModel(config)
    for ends in (model.embed_tokens, model.lm_head, model.verifier_lm_head):  # left undefined until a verifier is read
        torch.nn.init.normal_(ends.weight, std=settings["hidden"] ** -0.5)
    return model.train()


def main() -> None:
    """Serves steps on one row of conversations, with the settings of bench_train."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    lengths, width = settings["rows"][0], settings["hidden"]
    T = sum(lengths)
    batch = {
        "hidden_states": torch.randn(1, T, 3 * width),
        "input_ids": torch.randint(settings["vocab"], (1, T)),
        "document_ids": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        "loss_mask": torch.cat([torch.arange(n) >= n - round(settings["answers"] * n) for n in lengths]).unsqueeze(0),
        "verifier_last_hidden_states": torch.randn(1, T, width),
    }
    model, loss = build(settings), resolve_loss_config("kl_div", "eager")
    steps = {"ttt_steps": settings["steps"], "ttt_step_loss_decay": 0.8, "loss_config": loss}
    serve(optimised(list(model.parameters()), lambda: model(**batch, **steps)[1]))


if __name__ == "__main__":
    main()
