"""Writes the frozen target's states of a recipe's training data, so that training need not run the target.

    python scripts/extract_features.py recipes/viskip_tiny.yaml --out features/tiny
    deepspeed --num_gpus 8 scripts/extract_features.py recipes/viskip_llava7b.yaml --out features/llava7b
    deepspeed --num_gpus 8 train/distill.py recipes/viskip_llava7b.yaml data.features=features/llava7b

when it pays
  Online training, the default, computes the states anew in every step and needs no disk. Stored ones pay when the same
  states are read several times: many epochs, several heads or a search over settings on one target and data set.

what is written
  per token   the last hidden state and those the recipe's head reads beside it; never logits (the frozen unembedding
              gives them), never text embeddings (the frozen table gives them)
  per image   its projected features, once however many conversations show it
  beside it   manifest.json (target, tokenizer, data, layers, checksums) and the regenerated answers

  A 7B target takes 8 GB per million tokens in bfloat16 and 4 in float8, times one more for each further layer that the
  head reads. The command says what it needs before it starts, and stops where the disk is too small.

precision
  By default states are stored in the target's dtype: training then reads exactly what the target computed. float8 keeps
  them with a scale per token to within 6% of each value; try it on a small run before you trust it.

Interrupted, the same command goes on: finished shards are verified by their checksums and kept, with any number of
processes. Training refuses a store of another target, tokenizer, data set or layers, and a damaged shard by its name.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
# As in train/distill.py: no more threads than cores, over all processes.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
)

from mmspec.arguments import Parser, add_recipe, at_least, command  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from train.distill import leave, train  # noqa: E402

STORED_AS = ("float32", "bfloat16", "float16", "float8")


@command("extract_features")
def main() -> int:
    """The command; returns the exit code."""
    arguments = _parse()
    recipe = load(arguments.recipe, arguments.overrides)
    # What is written here cannot come from there.
    recipe.data.features = ""
    from train.extract import Settings, extract, summary
    from train.session import Session

    settings = Settings(arguments.out, arguments.dtype, arguments.batch, arguments.shard_tokens)

    def write(session: Session) -> None:
        manifest = extract(session, settings)
        session.tracker.say(summary(manifest, arguments.out))

    return train(recipe, instead=write)


def _parse() -> argparse.Namespace:
    parser = Parser(prog="scripts/extract_features.py", description=__doc__)
    add = parser.add_argument
    add_recipe(parser)
    add("--out", required=True, type=Path, metavar="DIR", help="the folder to write; data.features=DIR trains from it")
    add("--dtype", default="", choices=STORED_AS, help="what states are stored as (default: the target's dtype)")
    add("--batch", type=int, default=8, metavar="N", help="conversations in one pass of the target (default: 8)")
    add("--shard-tokens", type=int, default=0, metavar="N", help="tokens per shard (default: as many as 256 MiB hold)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    at_least(arguments, batch=1, shard_tokens=0)
    return arguments


if __name__ == "__main__":
    leave(main())
