"""Writes the text-only twin of a recipe's training data: the same questions and answers, without any picture.

    python scripts/text_twin.py recipes/eagle_tiny.yaml --out runs/text.jsonl
    python train/distill.py recipes/eagle_tiny.yaml data.train=runs/text.jsonl data.answers=given run.name=text_only

A head that is trained on the second file learns what trainers for text-only models teach: words whose target saw no
picture while they were read. The answers are the target's own to the questions with their pictures, made now or found
in data.answers_dir, so that both heads learn from the same words. (A target that was never trained without pictures has
no answers of its own to such questions: the embedded one breaks off in mid-sentence.)

An answer that was cut at its limit, and what follows it, is left out, since given answers are taken to be whole. The
file is in ShareGPT's layout and appears at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmspec.arguments import Parser, add_recipe, command  # noqa: E402
from mmspec.files import write_text  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from train.distill import leave, train, writing  # noqa: E402
from train.sample import IMAGE_MARK, Sample  # noqa: E402

if TYPE_CHECKING:
    from train.answers import Dialogue
    from train.session import Session


def twin(sample: Sample, dialogue: Dialogue) -> dict[str, Any] | None:
    """A record without pictures; None where no whole answer or no words are left."""
    said = [] if sample.system is None else [{"from": "system", "value": sample.system}]
    n_system = len(said)
    for turn, answer, whole in zip(sample.turns, dialogue.answers, dialogue.finished):
        question = turn.replace(IMAGE_MARK, "").strip()
        if not (whole and question and answer.strip()):
            break
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample.id, "topic": sample.topic, "conversations": said} if len(said) > n_system else None


@command("text_twin")
def main() -> int:
    """The command; returns the exit code."""
    arguments = _parse()
    out = Path(arguments.out)
    recipe = load(arguments.recipe, arguments.overrides)

    def write(session: Session) -> None:
        found = (
            twin(session.corpus.samples[index], dialogue) for index, dialogue in session.prepared.dialogues.items()
        )
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in found if record is not None]
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, "".join(lines))
        session.tracker.say(f"{len(lines)} conversations without pictures: {out}")

    return train(recipe, instead=write)


def _parse() -> argparse.Namespace:
    parser = Parser(prog="scripts/text_twin.py", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines, a conversation each")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    leave(main())
