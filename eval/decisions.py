"""What the controller decides along an answer, and how good its decisions are: one page to look at.

    python -m eval.decisions --ckpt runs/viskip_tiny --out runs/decisions.html
    python -m eval.decisions --ckpt runs/viskip_tiny --data synth:test --limit 60 --out runs/many.html

Every request is decoded twice, to the same tokens. Steered by the controller: this is what is shown along the answers.
Then with the largest draft in every round while the controller is asked all the same: so what it would have left out
or cut short is known too, and its foresight, its choices and the best choices in hindsight are compared on the same
rounds. Seconds are those of the cost table, measured here and kept beside the head; up to `--max-batch` requests
together they say up to where drafting pays. Beside the page, the figures as JSON under the same name.

Invariant: no figure here is a measured speedup, and rounds that a request's last token cut short are not judged; an
answer that has no other rounds is left out, and counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eval import decision_page
from eval.bench import frozen_copy
from eval.decision_figures import Answered, Asked, Decision, figures
from eval.dependence import IMAGES, alone, longer
from eval.mmspec import open_target, output_folder
from eval.options import add_records, add_target
from eval.policy_runs import Timed
from eval.summary import clean, hardware, versions
from eval.tasks import (
    Dialogues,
    Task,
    check_left_out,
    data_folder,
    data_name,
    limit_pixels,
    load_records,
    system_text,
)
from mmspec import checkpoint as checkpoints
from mmspec.api import drafter_and_policy, find_device
from mmspec.arguments import Parser, at_least, command
from mmspec.checkpoint import write_json
from mmspec.dependence import mean_feature, of_conversations
from mmspec.hindsight import Recorder
from mmspec.loop import all_complete, generate
from mmspec.policies._learned import LearnedPolicy
from mmspec.policy import FixedPolicy
from mmspec.records import Quarantine
from mmspec.sampling import GreedySampler
from mmspec.types import Drafter, InputError, Output, Plan, Policy, StepTrace, Target

PROGRAM = "eval.decisions"
SCHEMA = "mmspec-decisions/1"


class Steered(Timed):
    """A controller whose decisions for a request alone in its batch are kept."""

    def __init__(self, policy: LearnedPolicy) -> None:
        super().__init__(policy)
        self.learned = policy
        self.decisions: list[Decision] = []

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        if max(remaining) < 2:
            unseen = "nothing to draft"
        elif not self.learned.asks:
            unseen = "not asked"
        else:
            unseen = "asleep" if self.learned.asleep else ""
        made = super().plan(sensed, remaining)
        chances = None if unseen else tuple(self.learned.said[0])
        self.decisions.append(Decision(made.depth, self.learned.offered[made.depth], chances, unseen))
        return made


class Shadow(Steered):
    """The same where the largest draft is made whatever the controller says: it is told what its own would have done.

    Args:
        policy: asked.
        recorder: of the drafter.
    """

    def __init__(self, policy: LearnedPolicy, recorder: Recorder) -> None:
        super().__init__(policy)
        self.recorder = recorder
        self.largest = FixedPolicy(policy.max_depth, policy.max_budget)
        self.asked: list[Asked] = []
        self.emitted = 1

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        super().open(max_batch, device, sampled)
        self.recorder.steps.clear()
        self.asked, self.emitted = [], 1

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        self.made = super().plan(sensed, remaining)
        return self.largest.plan(sensed, remaining)

    def observe(self, trace: StepTrace) -> None:
        decision, accepted = self.decisions[-1], min(trace.accepted[0], self.made.depth)
        if self.recorder.steps:
            [[outcome]] = self.recorder.steps
            self.recorder.steps.clear()
            accepted = outcome.accepted(decision.depth, decision.nodes)
            self.asked.append(Asked(decision, outcome, self.emitted))
        self.emitted += trace.emitted[0]
        super().observe(
            replace(trace, plan=self.made, accepted=(accepted,), n_nodes=1 + decision.nodes, nodes=(decision.nodes,))
        )


class Decoder:
    """Decodes requests and measures the dependence of what came out.

    Args:
        target: frozen.
        drafter, policy: a head and its controller.
        instead: the mean image feature, None where there is none.
    """

    def __init__(self, target: Target, drafter: Drafter, policy: LearnedPolicy, instead: Tensor | None) -> None:
        self.target, self.drafter, self.instead = target, drafter, instead
        self.steered, self.recorder = Steered(policy), Recorder(drafter)
        copied = frozen_copy(policy)  # what it learns of larger drafts must not change the decisions that are shown
        assert isinstance(copied, LearnedPolicy)
        self.shadow = Shadow(copied, self.recorder)

    def answer(self, task: Task) -> tuple[Answered | None, str]:
        """A request and its text; None where its two answers differ (a tie of the target's logits)."""
        self.steered.decisions, self.steered.own_s = [], 0.0
        output = self._decode(task, self.drafter, self.steered)
        again = self._decode(task, self.recorder, self.shadow)
        text = self.target.decode(output.tokens)
        if again.tokens != output.tokens:
            return None, text
        kl = None if self.instead is None else self._dependence(task, output.tokens)
        return Answered(task, output, self.steered.decisions, self.shadow.asked, kl, self.steered.own_s), text

    def _decode(self, task: Task, drafter: Drafter, policy: Policy) -> Output:
        [output] = all_complete(generate(self.target, [task.request], drafter, policy, GreedySampler(), max_batch=1))
        return output

    def _dependence(self, task: Task, tokens: Sequence[int]) -> Tensor:
        prompt = task.request.prompt
        marks = torch.cat([torch.zeros(len(prompt), dtype=torch.long), torch.ones(len(tokens), dtype=torch.long)])
        [measured] = of_conversations(self.target, [longer(prompt, tokens)], [marks], self.instead)
        return measured.kl


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decode, judge and write everything; returns what was written as JSON.

    Raises:
        InputError: the input is wrong.
    """
    loaded = checkpoints.load(args.ckpt, args.target, args.dtype)
    if loaded.viskip is None:
        raise InputError(f"--ckpt {args.ckpt} has no controller (viskip.safetensors), so it decides nothing")
    path = Path(args.out)
    quarantine = Quarantine(output_folder(path.parent) / f"{path.stem}.quarantine.jsonl", fresh=True)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    target = open_target([loaded], args.target, args.dtype, args.device)
    limit_pixels(target, None)
    system = system_text(target)
    dialogues = Dialogues(target, records, system, args.max_new_tokens, quarantine)
    drafter, policy = drafter_and_policy(loaded, target, "viskip", args.max_batch)
    assert isinstance(policy, LearnedPolicy)
    shown = [record for record in records if record.image is not None][:IMAGES]
    decoder = Decoder(target, drafter, policy, mean_feature(target, (alone(target, record) for record in shown)))
    answers: list[Answered] = []
    differing = short = 0
    for [task] in track(dialogues.groups(1), "decoding", total=dialogues.n_turns, console=console):
        answered, text = decoder.answer(task)
        dialogues.answer(task, text)
        if answered is None:
            differing += 1
        elif answered.asked:
            answers.append(answered)
        else:
            short += 1
    check_left_out(quarantine, args.max_bad_share)
    if not answers:
        raise InputError(f"no usable record in {args.data} has an answer that takes more than one round")
    result = {
        "schema": SCHEMA,
        "asks": bool(policy.asks),
        **figures(answers, policy, loaded.tree),
        "control_share": sum(one.own_s for one in answers) / sum(one.output.latency_s for one in answers),
        "n_requests": len(answers),
        "n_differing": differing,
        "n_short": short,
        "settings": {
            "checkpoint": loaded.folder.resolve().name, "head": loaded.kind, "tree": loaded.tree.__dict__,
            "target": Path(target.name).name, "fingerprint": target.fingerprint, "dtype": args.dtype,
            "data": data_name(args.data),
            "limit": args.limit, "max_new_tokens": args.max_new_tokens, "max_batch": args.max_batch, "system": system,
        },
        "versions": versions(),
        "hardware": hardware(target.device),
    }  # fmt: skip
    result = clean(result)
    write_json(path.with_suffix(".json"), result)
    decision_page.write(path, result, decision_page.collect(target, answers))
    return result


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="a run folder with a head and its controller")
    add("--out", required=True, metavar="FILE", help="the page; the figures go beside it as JSON")
    add_records(parser, "synth:testmini")
    add("--max-batch", type=int, default=8, metavar="N", help="largest batch whose costs are measured (default: 8)")
    add_target(parser)
    return parser


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    console = Console()
    at_least(args, limit=1, max_new_tokens=2, max_batch=1)
    if not args.out.endswith(".html"):
        raise InputError(f"--out {args.out} must end in .html: the figures go beside it as .json")
    args.device = find_device(args.device)
    result = run(args, console)
    for line in decision_page.words(result):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"page: {args.out}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
