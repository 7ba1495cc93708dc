"""Builds the embedded target, mmspec/assets/tiny_llava: a small LLaVA trained on the synthetic corpus.

    python scripts/build_tiny_target.py                # about two hours on two cores; resumes if killed
    python scripts/build_tiny_target.py --eval-only    # scores of what is there

Another of 460 M parameters, on a GPU:

    python scripts/build_tiny_target.py --device cuda --size 16 1536 4096 12 --lr 4e-4 --batch-tokens 14400 \
        --warmup-steps 300 --steps 600 --no-score --out runs/mid/target --work runs/mid/work

Three phases: (1) the vision tower learns to tell, from each single patch, the shape and colour in its cell, the word in
its row and the bar in its column, without which the language model learns where and how many but not what; (2)
everything learns the answers' tokens; (3) the weights as stored in bf16 are loaded back and scored in fp32 on
held-out images. Samples are drawn from the second half of the corpus's train split, each seen about once: whoever
trains on the first half trains on prompts that this target has never seen.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmspec.arguments import Parser, command
from mmspec.assets import TINY_LLAVA
from mmspec.assets.tiny_files import (
    N_IMAGE_TOKENS,
    VOCAB_SIZE,
    TextSize,
    make_model,
    make_processor,
    make_tokenizer,
)
from mmspec.assets.tiny_scores import REQUIRED, failures, load, score, table
from mmspec.assets.tiny_vision import FIRST_INDEX, WEIGHT_DECAY, calibrate, draw_index, learning_rate, warm_up
from mmspec.checkpoint import discreet
from mmspec.synth import CORPUS_VERSION, SPLITS, sample
from mmspec.synth.lexicon import COLOURS, NUMBERS, POSITIONS, SHAPES, plural

TOPIC_WEIGHTS = (0.24, 0.22, 0.12, 0.22, 0.12, 0.08)  # short answers teach to see, and cost little
BATCH_TOKENS = 3600
GROUP = 8  # batches drawn together and sorted by length
LEARNING_RATE = 1.5e-3
VISION_LEARNING_RATE = 4e-4
PROJECTOR_LEARNING_RATE = 1e-4  # of its first layer only: its inputs are large, so small steps go far
SHORT_WEIGHTS = (0.58, 0.1, 0.05, 0.05, 0.2, 0.02)  # of the third cycle: counting is learnt late
LOOKUP_WEIGHTS = (0.62, 0.16, 0.04, 0.04, 0.12, 0.02)  # of the fourth: finding what the question names, later still
MIXED_WEIGHTS = (0.32, 0.14, 0.13, 0.06, 0.2, 0.15)  # of the fifth: the long answers come back, the look-ups stay
LAST_WEIGHTS = (0.34, 0.1, 0.09, 0.03, 0.32, 0.12)  # of the last three: finding all that the question names
LOOKUPS = frozenset({"count", "colour", "position"})


@dataclass(frozen=True)
class Cycle:
    """One cosine cycle of training on answers: `peak` is a share of the learning rates, `content` the weight of tokens
    that say what is seen against those of the free wording. A record whose first fact is of none of the `preferred`
    kinds is drawn again, up to `redraws` times."""

    steps: int
    peak: float
    content: float
    topics: tuple[float, ...]
    preferred: frozenset[str] = frozenset()
    redraws: int = 0


CYCLES = (
    Cycle(1600, 1.0, 1.0, TOPIC_WEIGHTS),
    Cycle(1600, 0.7, 3.0, TOPIC_WEIGHTS),
    Cycle(700, 0.5, 5.0, SHORT_WEIGHTS, frozenset({"count"}), 2),
    Cycle(1400, 0.8, 5.0, LOOKUP_WEIGHTS, LOOKUPS, 3),
    Cycle(1000, 0.6, 4.0, MIXED_WEIGHTS, LOOKUPS, 1),
    Cycle(1000, 0.7, 3.0, LAST_WEIGHTS, frozenset({"count"}), 3),
    Cycle(800, 0.5, 3.0, LAST_WEIGHTS, frozenset({"count"}), 3),
    Cycle(400, 0.4, 3.0, LAST_WEIGHTS, frozenset({"count"}), 3),
)
LAST_SHARE = 0.7
"""The weights that ship are a mean of the ends of the last two cycles, with this share of the last one: each forgets a
little of what the other knows (arXiv 1803.05407)."""
WORK = Path("runs/build_tiny_target")


@dataclass
class Progress:
    """Where a build stands; what a checkpoint holds beside the weights."""

    warmup_steps: int = 0
    steps: int = 0
    group: int = 0  # of batches
    position: int = 0  # within the group
    wall_s: float = 0.0


def cycle_of(step: int) -> tuple[Cycle, float]:
    """The cycle that a step belongs to, and its factor of the learning rates."""
    for cycle in CYCLES:
        if step < cycle.steps:
            return cycle, learning_rate(step, cycle.steps, cycle.peak)
        step -= cycle.steps
    return CYCLES[-1], 0.0


def _cycle(step: int, args: argparse.Namespace) -> tuple[Cycle, float]:
    """As `cycle_of`; a build of fewer steps than the first cycle has anneals over those it has."""
    if args.steps < CYCLES[0].steps:
        return CYCLES[0], learning_rate(step, args.steps, CYCLES[0].peak)
    return cycle_of(step)


# --- training on answers (phase 1, the vision tower, is in mmspec/assets/tiny_vision.py)


@dataclass(frozen=True)
class Example:
    """One record as token ids; `is_answer` marks what the model has to produce."""

    ids: list[int]
    is_answer: list[bool]
    index: int


def encode(processor: LlavaProcessor, index: int) -> Example:
    """The record as the chat template renders it, image tokens expanded."""
    one = sample("train", index)
    tokenizer = processor.tokenizer
    ids, is_answer = [tokenizer.bos_token_id], [False]
    for turn, (question, answer) in enumerate(zip(one.turns, one.answers, strict=True)):
        image = processor.image_token * N_IMAGE_TOKENS + "\n" if turn == 0 else ""
        asked = tokenizer(f"USER: {image}{question} ASSISTANT:", add_special_tokens=False)["input_ids"]
        said = tokenizer(f" {answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        ids += asked + said
        is_answer += [False] * len(asked) + [True] * len(said)
    return Example(ids, is_answer, index)


def draw(rng: random.Random, cycle: Cycle) -> int:
    """Index of a training record, preferably of the kinds that the cycle is for."""
    for _ in range(cycle.redraws):
        index = draw_index(rng, cycle.topics)
        if sample("train", index).facts[0].kind in cycle.preferred:
            return index
    return draw_index(rng, cycle.topics)


def group_of_batches(
    processor: LlavaProcessor, seed: int, group: int, cycle: Cycle, tokens: int = BATCH_TOKENS
) -> list[list[Example]]:
    """Group number `group` of batches of about `tokens` padded tokens each: a function of its arguments."""
    rng = random.Random(f"{seed}:{group}")
    examples: list[Example] = []
    while sum(len(e.ids) for e in examples) < GROUP * tokens:
        examples.append(encode(processor, draw(rng, cycle)))
    examples.sort(key=lambda e: len(e.ids))
    batches: list[list[Example]] = [[]]
    for example in examples:
        if (len(batches[-1]) + 1) * len(example.ids) > tokens and batches[-1]:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def batches_from(
    processor: LlavaProcessor, seed: int, at: Progress, tokens: int = BATCH_TOKENS
) -> Iterator[list[Example]]:
    """Batches without end from where `at` stands; `at` is kept up to date."""
    while True:
        group = group_of_batches(processor, seed, at.group, cycle_of(at.steps)[0], tokens)
        while at.position < len(group):
            at.position += 1
            yield group[at.position - 1]
        at.group, at.position = at.group + 1, 0


def content_tokens(processor: LlavaProcessor) -> Tensor:
    """Which tokens say what is seen: colours, shapes, places, numbers, option letters, words of signs, and whether a
    list goes on; bool [V]."""
    content = {*COLOURS, *SHAPES, *map(plural, SHAPES), *" ".join(POSITIONS).split(), *NUMBERS, "and", ",", ".", "so"}
    names = [processor.tokenizer.decode([i]).strip(' "()') for i in range(VOCAB_SIZE)]
    return torch.tensor([name in content or name.isupper() or name.isdigit() for name in names])


def answer_loss(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, batch: list[Example], weights: Tensor
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, </s> included, weighted by token: `weights` is [V]."""
    longest = max(len(e.ids) for e in batch)
    pad = processor.tokenizer.pad_token_id
    device = model.device
    ids = torch.tensor([e.ids + [pad] * (longest - len(e.ids)) for e in batch], device=device)
    wanted = torch.tensor([e.is_answer + [False] * (longest - len(e.ids)) for e in batch], device=device)
    images = [sample("train", e.index).image for e in batch]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        # Right padding: causal attention alone keeps the padding away from every token that counts.
        hidden = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][wanted[:, 1:]])  # position t predicts token t + 1
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted[:, 1:]], weights)


def optimiser_of(model: LlavaForConditionalGeneration, rate: float = LEARNING_RATE) -> torch.optim.AdamW:
    """AdamW with a slow group for the warmed-up tower; no decay for norms and biases."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        peak = VISION_LEARNING_RATE if "vision_tower" in name else rate
        peak = PROJECTOR_LEARNING_RATE if "linear_1" in name else peak
        groups.setdefault((peak, WEIGHT_DECAY if parameter.ndim > 1 else 0.0), []).append(parameter)
    parts = [{"params": p, "peak": peak, "weight_decay": decay} for (peak, decay), p in groups.items()]
    return torch.optim.AdamW(parts, lr=rate, betas=(0.9, 0.97), fused=True)


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace, at: Progress
) -> None:
    """Both training phases, from the last checkpoint if there is one."""
    optimiser = optimiser_of(model, args.lr)
    checkpoint = args.work / "checkpoint.pt"
    earlier: dict[str, Tensor] = {}  # the weights at the end of the last cycle but one
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=model.device)
        if state["seed"] != args.seed or state["of_steps"] != args.steps:
            raise ValueError(f"{checkpoint} is of another seed or number of steps: remove it or use --no-resume")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        at.__dict__.update(state["progress"])
        earlier = state["earlier"]
    began = time.monotonic() - at.wall_s
    if at.warmup_steps < args.warmup_steps:
        warm_up(model, processor, args.warmup_steps, args.seed)
        calibrate(model, processor)
        at.warmup_steps = args.warmup_steps
        at.wall_s = time.monotonic() - began
        save_checkpoint(model, optimiser, at, args, earlier)
    batches = batches_from(processor, args.seed, at, args.batch_tokens)
    content = content_tokens(processor).float().to(model.device)
    bar = tqdm(
        range(at.steps, args.steps), desc="answers", unit="step", initial=at.steps, total=args.steps, mininterval=5
    )
    smooth = 0.0
    for step in bar:
        cycle, factor = _cycle(step, args)
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        loss = answer_loss(model, processor, next(batches), 1.0 + (cycle.content - 1.0) * content)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth == 0.0 else 0.98 * smooth + 0.02 * loss.item()
        at.steps, at.wall_s = step + 1, time.monotonic() - began
        if at.steps % 50 == 0:
            tqdm.write(f"step {at.steps}: loss {smooth:.4f} after {at.wall_s:.0f} s")
        if args.steps > CYCLES[0].steps and at.steps == args.steps - CYCLES[-1].steps:
            earlier = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        if at.steps % args.save_every == 0 or at.steps == args.steps:
            save_checkpoint(model, optimiser, at, args, earlier)
    if earlier:
        last = model.state_dict()
        model.load_state_dict({name: earlier[name].lerp(last[name], LAST_SHARE) for name in last})
    export(model, processor, args.out)


def save_checkpoint(
    model: LlavaForConditionalGeneration,
    optimiser: torch.optim.AdamW,
    at: Progress,
    args: argparse.Namespace,
    earlier: dict[str, Tensor],
) -> None:
    """Everything that a killed build needs to go on, replaced in one move."""
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "earlier": earlier,
        "progress": dict(at.__dict__),
        "seed": args.seed,
        "of_steps": args.steps,
    }
    fresh = args.work / "checkpoint.tmp"
    torch.save(state, fresh)
    fresh.replace(args.work / "checkpoint.pt")


# --- storing and scoring


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes the target in Hugging Face layout, weights in bf16; the model in memory stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = LlavaForConditionalGeneration(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = model.generation_config
    stored.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    processor.save_pretrained(folder)


def git_commit() -> str | None:
    """The commit that the code is at, None outside of a repository or before its first commit."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def provenance(args: argparse.Namespace, at: Progress, scores: dict[str, object], parameters: int) -> dict[str, object]:
    """How the target came about and what it can do; no host names and no paths."""
    return {
        "command": " ".join(["python", "scripts/build_tiny_target.py", *map(discreet, args.said)]),
        "git_commit": git_commit(),
        "seed": args.seed,
        "warmup_steps": args.warmup_steps,
        "steps": args.steps,
        "wall_s": round(at.wall_s),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, bf16 autocast",
        "versions": {n: version(n) for n in ("torch", "transformers", "tokenizers", "pillow", "numpy")},
        "corpus_version": CORPUS_VERSION,
        "parameters": parameters,
        "required": REQUIRED,
        **scores,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=sum(c.steps for c in CYCLES), help="steps of phase 2 (default %(default)s)"
    )
    parser.add_argument("--warmup-steps", type=int, default=1200, help="steps of phase 1 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default %(default)s)")
    parser.add_argument("--out", type=Path, default=TINY_LLAVA, help="folder of the target (default: the package's)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of checkpoints (default %(default)s)")
    sizes = ("LAYERS", "HIDDEN", "INNER", "HEADS")
    parser.add_argument(
        "--size", type=int, nargs=4, metavar=sizes, help="of the language model (default: the embedded)"
    )
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak rate of phase 2 (default %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="of a step (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="to train on (default %(default)s)")
    parser.add_argument(
        "--no-score", action="store_true", help="leave the scores to eval: another target's need not do"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on if killed")
    parser.add_argument("--eval-only", action="store_true", help="score --out on val and test, write nothing")
    args = parser.parse_args()
    args.said = sys.argv[1:]
    return args


@command("build_tiny_target")
def main() -> int:
    """Builds or scores.

    Returns:
        0, 1 if a score is below what is required, or 2 for wrong input.
    """
    args = arguments()
    torch.set_num_threads(args.threads)
    at = Progress()
    if not args.eval_only:
        args.work.mkdir(parents=True, exist_ok=True)
        texts = (text for i in range(6000) for text in sample("train", FIRST_INDEX + i).answers)
        asked = (f"USER: \n{text} ASSISTANT:" for i in range(6000) for text in sample("train", FIRST_INDEX + i).turns)
        processor = make_processor(make_tokenizer([*texts, *asked]))
        size = TextSize(*args.size) if args.size else TextSize()
        model = make_model(processor.tokenizer, args.seed, size).to(args.device)
        train(model, processor, args, at)
        if args.no_score:
            return 0
    model, processor = load(args.out)
    scores = score(model, processor, {"val": range(SPLITS["val"]), "test": range(SPLITS["test"])})
    print(table(scores))
    if not args.eval_only:
        record = provenance(args, at, scores, sum(p.numel() for p in model.parameters()))
        (args.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    missed = failures(scores)
    for line in missed:
        print(f"too low: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
