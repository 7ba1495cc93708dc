"""Where seeing the image pays: acceptance by decile of visual dependence, of a head and its blind twin side by side.

    python -m eval.dependence --ckpt runs/eagle3_tiny --ckpt runs/eagle3_tiny_blind --data synth:test --out runs/where

Every checkpoint decodes the same prompts with its own tree, untimed and one at a time; all emit the target's own text.
Then the target reads each answer once more with its image features replaced (`mmspec/dependence.py`), which gives each
generated token its visual dependence. A token counts as offered where the draft had candidates for its place, and as
accepted where one of them was right.

Invariant: deciles are of all generated tokens but the first of each answer, which nobody drafts; they are the same for
every checkpoint and every topic.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eval.mmspec import open_target, output_folder
from eval.options import add_records, add_target
from eval.plots import Series, standalone
from eval.summary import clean, gained, hardware, versions
from eval.tasks import (
    Dialogues,
    Task,
    check_left_out,
    data_folder,
    data_name,
    image_of,
    limit_pixels,
    load_records,
    system_text,
)
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import find_device, make_drafter
from mmspec.arguments import Parser, at_least, command
from mmspec.checkpoint import Checkpoint, write_json
from mmspec.dependence import blurred, mean_feature, of_conversations
from mmspec.files import write_text
from mmspec.loop import all_complete, generate
from mmspec.policy import FixedPolicy
from mmspec.records import Quarantine, Record, RecordError, open_image
from mmspec.sampling import GreedySampler
from mmspec.types import (
    COUNTERFACTUALS,
    Drafter,
    Forward,
    InputError,
    Output,
    Plan,
    Prompt,
    Request,
    Round,
    Target,
    Tree,
)

PROGRAM = "eval.dependence"
SCHEMA = "mmspec-dependence/1"
N_DECILES = 10
IMAGES = 256
"""Images of the data that the mean feature is taken of."""
NOT_OFFERED, REJECTED, ACCEPTED = -1, 0, 1
DEFINITIONS = {
    "dependence": "KL(p || q) in nats of the target's distributions of a token with the image (p) and without (q)",
    "decile": "of all generated tokens by dependence, the first token of each answer left out; 1 depends least; "
    "equal ones are split by chance",
    "zeros": "share of those tokens whose dependence is exactly 0",
    "offered": "tokens of whose place the draft had candidates, all before it being right",
    "acceptance": "accepted / offered",
    "gain": "acceptance of the first checkpoint less that of this one, with a 95% bootstrap interval over images; of "
    "one image there is none",
}


@dataclass
class Answered:
    """One request, decoded by every checkpoint.

    Args:
        id, topic, image: of its record; for `image` see `tasks.image_of`.
        kl: [n] dependence of the generated tokens behind the first.
        outcomes: by checkpoint, of the same tokens.
        turn: of the record.
        tokens: of the answer, the first included.
    """

    id: str
    topic: str
    image: str
    kl: Tensor
    outcomes: dict[str, Tensor] = field(default_factory=dict)
    turn: int = 1
    tokens: Sequence[int] = ()


class Watched:
    """A drafter whose trees are kept on the host."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.taps = drafter.taps
        self.trees: list[tuple[list[int], list[int]]] = []

    def open(self, max_batch: int, max_tokens: int) -> None:
        self._drafter.open(max_batch, max_tokens)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        self._drafter.admit(row, request, forward, root)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        tree = self._drafter.propose(roots, plan)
        self.trees.append((tree.tokens[0].tolist(), tree.parents[0].tolist()))
        return tree

    def observe(self, round: Round) -> None:
        self._drafter.observe(round)

    def evict(self, row: int) -> None:
        self._drafter.evict(row)


def outcomes(output: Output, trees: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """What the draft had for each generated token behind the first, [n] int8.

    Args:
        output: of a request that was decoded alone.
        trees: (tokens, parents) of its rounds that drafted, in order; a padding node has the parent -1.
    """
    said, at, left = [], 1, list(trees)
    for action, _, _, emitted in output.rounds:
        tokens, parents = left.pop(0) if action == "draft" else ([0], [-1])
        node: int | None = 0
        for token in output.tokens[at : at + emitted]:
            children = [child for child in range(1, len(tokens)) if parents[child] == node] if node is not None else []
            node = next((child for child in children if tokens[child] == token), None)
            said.append(ACCEPTED if node is not None else REJECTED if children else NOT_OFFERED)
        at += emitted
    return torch.tensor(said, dtype=torch.int8)


def deciles(kl: Tensor, seed: int = 0) -> Tensor:
    """The decile 0..9 of each of N values: their ranks in ten equal parts. Ties are split by chance, as the order
    of tokens is that of topics."""
    mixed = torch.randperm(len(kl), generator=torch.Generator().manual_seed(seed))
    ranks = torch.empty_like(mixed)
    ranks[mixed[kl[mixed].argsort(stable=True)]] = torch.arange(len(kl))
    return (ranks * N_DECILES).div(max(len(kl), 1), rounding_mode="floor")


def table(answers: Sequence[Answered], names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Acceptance by decile, overall and by topic; see DEFINITIONS.

    Args:
        answers: of all requests.
        names: of the checkpoints; gains are of the first over each other one.
    """
    kl = torch.cat([answer.kl for answer in answers])
    place = deciles(kl, seed).split([len(answer.kl) for answer in answers])
    whole = list(zip(answers, place))
    return {
        "zeros": float((kl == 0).double().mean()),
        "overall": _rows(whole, names, seed),
        "topics": {
            topic: _rows([(a, p) for a, p in whole if a.topic == topic], names, seed)
            for topic in dict.fromkeys(answer.topic for answer in answers)
        },
    }


def _rows(members: Sequence[tuple[Answered, Tensor]], names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    rows = []
    images = [answer.image for answer, _ in members]
    for decile in range(N_DECILES):
        kl = torch.cat([answer.kl[place == decile] for answer, place in members])
        row: dict[str, Any] = {"decile": decile + 1, "tokens": len(kl)}
        if len(kl):
            row |= {"dependence": float(kl.mean()), "from": float(kl.min()), "to": float(kl.max())}
        counts = {
            name: _counts([answer.outcomes[name][place == decile] for answer, place in members]) for name in names
        }
        row["checkpoints"] = {name: _cell(counts[name], counts[names[0]], images, seed) for name in names}
        rows.append(row)
    return rows


def _counts(outcomes: Sequence[Tensor]) -> list[list[float]]:
    """How many tokens of each answer were accepted, and how many were offered."""
    return [[float((found >= least).sum()) for found in outcomes] for least in (ACCEPTED, REJECTED)]


def _cell(mine: list[list[float]], first: list[list[float]], images: Sequence[str], seed: int) -> dict[str, Any]:
    """Figures of one checkpoint in one decile; see `_counts`, and for the images `metrics.contrast`."""
    accepted, offered = map(sum, mine)
    cell: dict[str, Any] = {"offered": int(offered), "acceptance": accepted / offered if offered else None}
    if mine is not first and offered and sum(first[1]):
        gain, _ = metrics.contrast([*first, *mine], images, _gain, 0.0, seed=seed)
        cell |= {"gain": gain.value, "gain_lo": gain.lo, "gain_hi": gain.hi}
    return cell


def _gain(totals: Tensor) -> Tensor:
    """The ratio of the first two of four totals [..., 4] less that of the others."""
    return metrics.ratio(totals[..., :2]) - metrics.ratio(totals[..., 2:])


class Decoder:
    """Decodes requests with every checkpoint and measures the dependence of what came out.

    Args:
        target: frozen.
        loaded: checkpoints by name, checked against the target.
        instead: the mean image feature; None: images are blurred, or hidden from answers.
        hidden: whether they are.
    """

    def __init__(
        self, target: Target, loaded: dict[str, Checkpoint], instead: Tensor | None, hidden: bool = False
    ) -> None:
        self.target, self.instead, self.hidden = target, instead, hidden
        self.drafters = {name: Watched(make_drafter(ckpt, target)) for name, ckpt in loaded.items()}
        self.policies = {name: FixedPolicy(ckpt.tree.depth, ckpt.tree.budget) for name, ckpt in loaded.items()}

    def answer(self, task: Task, unseen: Prompt) -> tuple[Answered | None, list[int]]:
        """One request by all checkpoints, and its tokens; None where these differ (a tie of the target's logits).

        Args:
            unseen: the request's prompt, encoded with blurred images where these stand for the mean.
        """
        found: dict[str, Tensor] = {}
        tokens: list[int] = []
        for name, drafter in self.drafters.items():
            drafter.trees.clear()
            [output] = all_complete(
                generate(self.target, [task.request], drafter, self.policies[name], GreedySampler(), max_batch=1)
            )
            if tokens and output.tokens != tokens:
                return None, tokens
            tokens = output.tokens
            found[name] = outcomes(output, drafter.trees)
        prompt = task.request.prompt
        marks = torch.cat([torch.zeros(len(prompt), dtype=torch.long), torch.ones(len(tokens), dtype=torch.long)])
        whole, other = (longer(p, tokens) for p in (prompt, unseen))
        blind = [] if self.instead is not None or self.hidden else [other]
        [measured] = of_conversations(self.target, [whole], [marks], self.instead, blind, self.hidden)
        record = task.record
        kl = measured.kl[1:]
        return Answered(record.id, record.topic, image_of(record), kl, found, task.turn, tokens), tokens


def longer(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """A prompt with generated tokens behind it."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])
    visual = torch.cat([prompt.visual, torch.zeros(len(tokens), dtype=torch.bool)])
    return replace(prompt, input_ids=ids, visual=visual)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decode, measure and write everything; returns what was written to `dependence.json`.

    Raises:
        InputError: the input is wrong.
    """
    loaded = {Path(path).name: checkpoints.load(path, args.target, args.dtype) for path in args.ckpt}
    if len(loaded) < len(args.ckpt):
        raise InputError("--ckpt: the folders need different names, by which they are reported")
    first = next(iter(loaded.values()))
    out = output_folder(Path(args.out))
    quarantine = Quarantine(out / "quarantine.jsonl", fresh=True)
    read = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    records = [record for record in read if record.image is not None]
    if not records:
        raise InputError(f"--data {args.data} has no record with an image: nothing depends on one")
    target = open_target([first], args.target, args.dtype, args.device)
    for ckpt in loaded.values():
        ckpt.check_target(target)
    limit_pixels(target, None)
    system = system_text(target, args.system)
    dialogues = Dialogues(target, records, system, args.max_new_tokens, quarantine)
    blur, mean = args.counterfactual == "blur", args.counterfactual == "mean"
    instead = mean_feature(target, (alone(target, record) for record in records[:IMAGES])) if mean else None
    decoder = Decoder(target, loaded, instead, hidden=not blur and not mean)
    answers: list[Answered] = []
    differing = 0
    for [task] in track(dialogues.groups(1), "decoding", total=dialogues.n_turns, console=console):
        unseen = _unseen(dialogues, task) if blur else task.request.prompt
        answered, tokens = decoder.answer(task, unseen)
        dialogues.answer(task, target.decode(tokens))
        differing += answered is None
        answers += [answered] if answered is not None and len(answered.kl) else []
    check_left_out(quarantine, args.max_bad_share)
    if not answers:
        raise InputError(f"no usable record in {args.data} has an answer of more than one token")
    result = {
        "schema": SCHEMA,
        "checkpoints": {n: {"kind": c.kind, "blind": c.blind, "tree": c.tree.__dict__} for n, c in loaded.items()},
        **table(answers, list(loaded), args.seed),
        "n_requests": len(answers),
        "n_differing": differing,
        "settings": {
            "data": data_name(args.data),
            "counterfactual": args.counterfactual, "max_new_tokens": args.max_new_tokens, "limit": args.limit,
            "dtype": args.dtype, "seed": args.seed, "fingerprint": target.fingerprint, "system": system,
        },
        "definitions": DEFINITIONS,
        "versions": versions(),
        "hardware": hardware(target.device),
    }  # fmt: skip
    result = clean(result)
    write_results(out, result, answers)
    return result


def alone(target: Target, record: Record) -> Prompt:
    """A prompt that is a record's image and nothing else."""
    assert record.image is not None
    return target.encode([{"role": "user", "content": [{"type": "image"}]}], [open_image(record.image)])


def _unseen(dialogues: Dialogues, task: Task) -> Prompt:
    """The prompt of a task with its image blurred."""
    record = task.record
    assert record.image is not None
    try:
        return dialogues.target.encode(dialogues.messages(record, task.turn), [blurred(open_image(record.image))])
    except RecordError as error:
        raise InputError(f"record {record.id} could be read a moment ago: {error}") from error


def write_results(out: Path, result: dict[str, Any], answers: Sequence[Answered]) -> None:
    """Write `dependence.json`, `tokens.jsonl` (every token) and the plots, as SVG and on one page."""
    with (out / "tokens.jsonl").open("w", encoding="utf-8") as file:
        for answer in answers:
            line = {"id": answer.id, "turn": answer.turn, "topic": answer.topic, "tokens": list(answer.tokens)}
            line["kl"] = [round(v, 5) for v in answer.kl.tolist()]
            found = {name: said.tolist() for name, said in answer.outcomes.items()}
            file.write(json.dumps({**line, "outcomes": found}) + "\n")
    write_json(out / "dependence.json", result)
    charts = [chart(result["overall"], list(result["checkpoints"]), "all topics")]
    charts += [chart(rows, list(result["checkpoints"]), topic) for topic, rows in result["topics"].items()]
    write_text(out / "dependence.svg", charts[0])
    title = f"Acceptance by visual dependence: {', '.join(result['checkpoints'])}"
    words = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in DEFINITIONS.items())
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="color-scheme" content="light dark"><style>body{font:15px/1.5 system-ui,sans-serif;margin:24px}'
        "section{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}</style>"
        f"<h1>{escape(title)}</h1><section>{''.join(charts)}</section><dl>{words}</dl></html>\n"
    )
    write_text(out / "dependence.html", page)


def chart(rows: Sequence[dict[str, Any]], names: Sequence[str], title: str) -> str:
    """Acceptance over the deciles, one line a checkpoint; places without an offered token are left out."""
    lines = []
    for k, name in enumerate(names):
        cells = [(row["decile"], row["checkpoints"][name]["acceptance"]) for row in rows]
        lines.append(Series(name, f"m{k}", [(float(x), y) for x, y in cells if y is not None]))
    ticks = [float(x) for x in range(1, N_DECILES + 1)]
    return standalone(title, lines, "decile of visual dependence", "acceptance", ticks, [0, 0.2, 0.4, 0.6, 0.8, 1])


def show(result: dict[str, Any], console: Console) -> None:
    """The overall table on the terminal."""
    names = list(result["checkpoints"])
    console.print("decile  KL nats   " + "  ".join(f"{name:>22}" for name in names) + "   gain of the first")
    for row in result["overall"]:
        cells = [row["checkpoints"][name] for name in names]
        words = "  ".join("-".rjust(22) if c["acceptance"] is None else f"{c['acceptance']:22.3f}" for c in cells)
        gain = gained(cells[-1]) if "gain" in cells[-1] else ""
        console.print(f"{row['decile']:>6}  {row.get('dependence', 0):7.4f}   {words}   {gain}", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("--ckpt", action="append", required=True, metavar="DIR", help="a run folder; again for each further one")
    add("--out", required=True, metavar="DIR", help="where the results go")
    add_records(parser, "synth:testmini")
    add_target(parser)
    add("--counterfactual", choices=COUNTERFACTUALS, default="mean", help="what stands for the image (default: mean)")
    add("--system", metavar="TEXT", help="system text (default: as of eval.mmspec)")
    add("--seed", type=int, default=0, help="of the bootstrap and of ties (default: 0)")
    return parser


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    console = Console()
    at_least(args, limit=1, max_new_tokens=1)
    args.device = find_device(args.device)
    result = run(args, console)
    show(result, console)
    console.print(f"report: {Path(args.out) / 'dependence.html'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
