"""Phase 1 of building the embedded target: its vision tower learns to see, its projector to hand over what is seen.

From each single patch the tower has to tell the shape and colour in its cell, the word in its row and the bar in its
column. Without that a language model learns where and how many, but not what.
"""

import math
import random

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmspec.assets.tiny_files import EMBEDDING_STD, IMAGE_SIZE, PATCH_SIZE
from mmspec.synth import SPLITS, TOPICS, sample, scene_of
from mmspec.synth.lexicon import COLOURS, SHAPES, WORDS
from mmspec.synth.scene import MAX_BAR_VALUE, Scene

FIRST_INDEX = SPLITS["train"] // 2
"""The target is built from the second half of the train split; the first half stays unseen."""

BATCH = 64
PEAK_LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
SIDE = IMAGE_SIZE // PATCH_SIZE
LABELS = ("shape", "colour", "word", "bar", "bar colour")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5% of the steps, then a cosine to 2% of the peak."""
    rise = max(1, steps // 20)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


def draw_index(rng: random.Random, weights: tuple[float, ...]) -> int:
    """A random index of the second half of the train split, topics by weight."""
    topic = rng.choices(range(len(TOPICS)), weights)[0]
    first = -(-FIRST_INDEX // len(TOPICS))
    return rng.randrange(first, SPLITS["train"] // len(TOPICS)) * len(TOPICS) + topic


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
            weight = torch.ones(self.sizes[k], device=logits.device)
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
    device = model.device
    heads = PatchHeads(tower.config.hidden_size).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=WEIGHT_DECAY, fused=True)
    rng = random.Random(seed)
    bar = tqdm(range(steps), desc="vision", unit="step", mininterval=5)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_LEARNING_RATE)
        indices = [draw_index(rng, (0.3, 0.4, 0.0, 0.3, 0.0, 0.0)) for _ in range(BATCH)]
        images = [sample("train", i).image for i in indices]
        labels = torch.stack([patch_labels(scene_of("train", i)) for i in indices]).to(device)
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            loss, right = heads(features, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            shown = " ".join(f"{n} {r:.2f}" for n, r in zip(LABELS, right.tolist(), strict=True))
            tqdm.write(f"vision step {step}: loss {loss.item():.3f} right {shown}")


@torch.no_grad()
def calibrate(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Sets the projector so that image features enter the language model centred and as large as text embeddings.

    The warmed-up tower's features are large and share a common part. Projected by untouched weights they came out
    hundreds of times larger than the text, and the language model learnt neither to read the question nor to look.
    """
    images = [sample("train", FIRST_INDEX + i).image for i in range(BATCH)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    projector = model.model.multi_modal_projector
    for linear, std in ((projector.linear_1, 1.0), (projector.linear_2, EMBEDDING_STD)):
        out = nn.functional.linear(hidden, linear.weight)
        scale = std / out.std(0)
        linear.weight.mul_(scale[:, None])
        linear.bias.copy_(-out.mean(0) * scale)
        hidden = projector.act(linear(hidden))
