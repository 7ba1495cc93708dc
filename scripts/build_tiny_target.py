"""Builds the embedded target, mmspec/assets/tiny_llava: a small LLaVA trained on the synthetic corpus.

    python scripts/build_tiny_target.py                # about 40 minutes on two cores; killed, the same command goes on
    python scripts/build_tiny_target.py --eval-only    # scores of what is there

Three phases: (1) the vision tower learns to tell, from each single patch, the shape and colour in its cell, the word in
its row and the bar in its column, without which the language model learns where and how many but not what; (2)
everything learns the answers' tokens; (3) the weights as stored in bf16 are loaded back and scored in fp32 on
held-out images. Samples are drawn from the second half of the corpus's train split, each seen about once: whoever
trains on the first half trains on prompts that this target has never seen.
"""

import argparse
import json
import math
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

from mmspec.assets import TINY_LLAVA
from mmspec.assets.tiny_files import EMBEDDING_STD, N_IMAGE_TOKENS, make_model, make_processor, make_tokenizer
from mmspec.assets.tiny_scores import REQUIRED, failures, load, score, table
from mmspec.synth import CORPUS_VERSION, SPLITS, TOPICS, sample, scene_of
from mmspec.synth.lexicon import COLOURS, SHAPES, WORDS
from mmspec.synth.scene import MAX_BAR_VALUE, Scene

FIRST_INDEX = SPLITS["train"] // 2
TOPIC_WEIGHTS = (0.24, 0.22, 0.12, 0.22, 0.12, 0.08)  # short answers teach to see, and cost little
BATCH_TOKENS = 3600
GROUP = 8  # batches drawn together and sorted by length
WARMUP_BATCH = 64
LEARNING_RATE = 1.5e-3
VISION_LEARNING_RATE = 4e-4
PROJECTOR_LEARNING_RATE = 1e-4  # of its first layer only: its inputs are large, so small steps go far
WEIGHT_DECAY = 0.05
SIDE = 6  # patches a side
WORK = Path("runs/build_tiny_target")


@dataclass
class Progress:
    """Where a build stands; what a checkpoint holds beside the weights."""

    warmup_steps: int = 0
    steps: int = 0
    group: int = 0  # of batches
    position: int = 0  # within the group
    wall_s: float = 0.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5% of the steps, then a cosine to 2% of the peak."""
    rise = max(1, steps // 20)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


# --- phase 1: the vision tower


class PatchHeads(nn.Module):
    """What each patch should know, read from its last-but-one tower layer by one linear map; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(SHAPES) + 1, len(COLOURS) + 1, len(WORDS) + 1, MAX_BAR_VALUE + 1, len(COLOURS) + 1)
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy.

        Args:
            features: [B, 36, D] of the tower.
            labels: [B, 36, 5] classes; 0 means that there is nothing.

        Returns:
            The mean loss, and per kind of label the share of right patches among those with something, [5].
        """
        losses, right = [], []
        for k, logits in enumerate(self.read(features).split(self.sizes, dim=-1)):
            wanted = labels[..., k]
            weight = torch.ones(self.sizes[k])
            weight[0] = 0.2  # most patches show nothing
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), weight))
            there = wanted > 0
            right.append((logits.argmax(-1) == wanted)[there].float().mean())
        return torch.stack(losses).mean(), torch.stack(right)


def patch_labels(scene: Scene) -> Tensor:
    """What each of the 36 patches shows: shape, colour, word, bar value, bar colour; [36, 5]."""
    labels = torch.zeros(SIDE, SIDE, 5, dtype=torch.long)
    colours = list(COLOURS)
    for item in scene.items:
        r, c = 2 * (item.cell // 3), 2 * (item.cell % 3)
        labels[r : r + 2, c : c + 2, 0] = SHAPES.index(item.shape) + 1
        labels[r : r + 2, c : c + 2, 1] = colours.index(item.colour) + 1
    for sign in scene.signs:
        rows = slice(2 * sign.row, 2 * sign.row + 2)
        labels[rows, :, 1] = colours.index(sign.colour) + 1
        labels[rows, :, 2] = WORDS.index(sign.word) + 1
    for bar in scene.bars:
        labels[:, bar.slot + 1, 3] = bar.value
        labels[:, bar.slot + 1, 4] = colours.index(bar.colour) + 1
    return labels.flatten(0, 1)


def warm_up(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int) -> None:
    """Phase 1, in place. Prints the share of right patches at its end."""
    tower = model.model.vision_tower
    heads = PatchHeads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=WEIGHT_DECAY, fused=True)
    rng = random.Random(seed)
    bar = tqdm(range(steps), desc="vision", unit="step", mininterval=5)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        indices = [draw_index(rng, (0.3, 0.4, 0.0, 0.3, 0.0, 0.0)) for _ in range(WARMUP_BATCH)]
        images = [sample("train", i).image for i in indices]
        labels = torch.stack([patch_labels(scene_of("train", i)) for i in indices])
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            loss, right = heads(features, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            names = ("shape", "colour", "word", "bar", "bar colour")
            shown = " ".join(f"{n} {r:.2f}" for n, r in zip(names, right.tolist(), strict=True))
            tqdm.write(f"vision step {step}: loss {loss.item():.3f} right {shown}")


@torch.no_grad()
def calibrate(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Sets the projector so that image features enter the language model centred and as large as text embeddings.

    The warmed-up tower's features are large and share a common part. Projected by untouched weights they came out
    hundreds of times larger than the text, and the language model learnt neither to read the question nor to look.
    """
    images = [sample("train", FIRST_INDEX + i).image for i in range(WARMUP_BATCH)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    projector = model.model.multi_modal_projector
    for linear, std in ((projector.linear_1, 1.0), (projector.linear_2, EMBEDDING_STD)):
        out = nn.functional.linear(hidden, linear.weight)
        scale = std / out.std(0)
        linear.weight.mul_(scale[:, None])
        linear.bias.copy_(-out.mean(0) * scale)
        hidden = projector.act(linear(hidden))


# --- phase 2: everything


@dataclass(frozen=True)
class Example:
    """One record as token ids; `is_answer` marks what the model has to produce."""

    ids: list[int]
    is_answer: list[bool]
    index: int


def draw_index(rng: random.Random, weights: tuple[float, ...]) -> int:
    """A random index of the second half of the train split, topics by weight."""
    topic = rng.choices(range(len(TOPICS)), weights)[0]
    first = -(-FIRST_INDEX // len(TOPICS))
    return rng.randrange(first, SPLITS["train"] // len(TOPICS)) * len(TOPICS) + topic


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


def group_of_batches(processor: LlavaProcessor, seed: int, group: int) -> list[list[Example]]:
    """Group number `group` of batches of about `BATCH_TOKENS` padded tokens each: a pure function of seed and group."""
    rng = random.Random(f"{seed}:{group}")
    examples: list[Example] = []
    while sum(len(e.ids) for e in examples) < GROUP * BATCH_TOKENS:
        examples.append(encode(processor, draw_index(rng, TOPIC_WEIGHTS)))
    examples.sort(key=lambda e: len(e.ids))
    batches: list[list[Example]] = [[]]
    for example in examples:
        if (len(batches[-1]) + 1) * len(example.ids) > BATCH_TOKENS and batches[-1]:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def batches_from(processor: LlavaProcessor, seed: int, at: Progress) -> Iterator[list[Example]]:
    """Batches without end from where `at` stands; `at` is kept up to date."""
    while True:
        group = group_of_batches(processor, seed, at.group)
        while at.position < len(group):
            at.position += 1
            yield group[at.position - 1]
        at.group, at.position = at.group + 1, 0


def answer_loss(model: LlavaForConditionalGeneration, processor: LlavaProcessor, batch: list[Example]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, </s> included."""
    longest = max(len(e.ids) for e in batch)
    pad = processor.tokenizer.pad_token_id
    ids = torch.tensor([e.ids + [pad] * (longest - len(e.ids)) for e in batch])
    wanted = torch.tensor([e.is_answer + [False] * (longest - len(e.ids)) for e in batch])
    images = [sample("train", e.index).image for e in batch]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.autocast("cpu", torch.bfloat16):
        # Right padding: causal attention alone keeps the padding away from every token that counts.
        hidden = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][wanted[:, 1:]])  # position t predicts token t + 1
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted[:, 1:]])


def optimiser_of(model: LlavaForConditionalGeneration) -> torch.optim.AdamW:
    """AdamW with a slow group for the warmed-up tower; no decay for norms and biases."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        peak = VISION_LEARNING_RATE if "vision_tower" in name else LEARNING_RATE
        peak = PROJECTOR_LEARNING_RATE if "linear_1" in name else peak
        groups.setdefault((peak, WEIGHT_DECAY if parameter.ndim > 1 else 0.0), []).append(parameter)
    parts = [{"params": p, "peak": peak, "weight_decay": decay} for (peak, decay), p in groups.items()]
    return torch.optim.AdamW(parts, lr=LEARNING_RATE, betas=(0.9, 0.97), fused=True)


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace, at: Progress
) -> None:
    """Both training phases, from the last checkpoint if there is one."""
    optimiser = optimiser_of(model)
    checkpoint = args.work / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["seed"] != args.seed or state["of_steps"] != args.steps:
            raise ValueError(f"{checkpoint} is of another seed or number of steps: remove it or use --no-resume")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        at.__dict__.update(state["progress"])
    began = time.monotonic() - at.wall_s
    if at.warmup_steps < args.warmup_steps:
        warm_up(model, processor, args.warmup_steps, args.seed)
        calibrate(model, processor)
        at.warmup_steps = args.warmup_steps
        at.wall_s = time.monotonic() - began
        save_checkpoint(model, optimiser, at, args)
    batches = batches_from(processor, args.seed, at)
    bar = tqdm(
        range(at.steps, args.steps), desc="answers", unit="step", initial=at.steps, total=args.steps, mininterval=5
    )
    smooth = 0.0
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, group["peak"])
        loss = answer_loss(model, processor, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth == 0.0 else 0.98 * smooth + 0.02 * loss.item()
        at.steps, at.wall_s = step + 1, time.monotonic() - began
        if at.steps % 50 == 0:
            tqdm.write(f"step {at.steps}: loss {smooth:.4f} after {at.wall_s:.0f} s")
        if at.steps % args.save_every == 0 or at.steps == args.steps:
            save_checkpoint(model, optimiser, at, args)
            export(model, processor, args.out)


def save_checkpoint(
    model: LlavaForConditionalGeneration, optimiser: torch.optim.AdamW, at: Progress, args: argparse.Namespace
) -> None:
    """Everything that a killed build needs to go on, replaced in one move."""
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": dict(at.__dict__),
        "seed": args.seed,
        "of_steps": args.steps,
    }
    fresh = args.work / "checkpoint.tmp"
    torch.save(state, fresh)
    fresh.replace(args.work / "checkpoint.pt")


# --- phase 3: store and score


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
        "command": f"python scripts/build_tiny_target.py --steps {args.steps} --seed {args.seed}",
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help="steps of phase 2 (default %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=1200, help="steps of phase 1 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default %(default)s)")
    parser.add_argument("--out", type=Path, default=TINY_LLAVA, help="folder of the target (default: the package's)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of checkpoints (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on if killed")
    parser.add_argument("--eval-only", action="store_true", help="score --out on val and test, write nothing")
    return parser.parse_args()


def main() -> int:
    """Builds or scores.

    Returns:
        0, or 1 if a score is below what is required.
    """
    args = arguments()
    torch.set_num_threads(args.threads)
    at = Progress()
    if not args.eval_only:
        args.work.mkdir(parents=True, exist_ok=True)
        texts = (text for i in range(6000) for text in sample("train", FIRST_INDEX + i).answers)
        asked = (f"USER: \n{text} ASSISTANT:" for i in range(6000) for text in sample("train", FIRST_INDEX + i).turns)
        processor = make_processor(make_tokenizer([*texts, *asked]))
        model = make_model(processor.tokenizer, args.seed)
        train(model, processor, args, at)
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
