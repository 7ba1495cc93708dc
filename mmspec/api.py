"""One-line use: a target, a trained head and a policy behind one object, from prompts to text.

import mmspec
model = mmspec.Speculator.from_pretrained("runs/viskip_tiny")
answer = model.generate("How many stars are there?", images=["picture.png"])[0]
print(answer.text, answer.mat)

Without a checkpoint: `mmspec.Speculator.from_method("pld", target="llava-hf/llava-1.5-7b-hf")`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmspec import checkpoint as checkpoints
from mmspec.assets import EMBEDDED
from mmspec.checkpoint import Checkpoint
from mmspec.costs import load_or_measure, measure
from mmspec.drafters.hybrid import HybridDrafter
from mmspec.drafters.null import NullDrafter
from mmspec.generation import custom_generate
from mmspec.loop import error_line
from mmspec.loop import generate as decode
from mmspec.methods import HYBRID, make_hybrid, make_method, resolved
from mmspec.metrics import mat
from mmspec.policies import Parts, make_policy, policy_names
from mmspec.policy import AdaptivePolicy, Costs, FixedPolicy, SkipPolicy
from mmspec.records import count_images, open_image
from mmspec.sampling import make_sampler
from mmspec.static_tree import NAMED, StaticTree
from mmspec.targets import load_target
from mmspec.types import Drafter, Emission, InputError, Output, Policy, Request, Sampler, Target

STATIC = ("static", *NAMED)
"""Policies that fill one tree every round: the one fitted to the head, or a published one."""
FREE = tuple(name for name in policy_names() if not name.startswith("viskip"))
"""Policies that need no training, of any drafter."""
TRAINED = tuple(name for name in policy_names() if name not in FREE)
"""Policies of a trained controller."""
MEASURED = ("marginal", *TRAINED)
"""Policies that decide by measured costs."""
SHAPED = (*STATIC, "confidence", "marginal", "viskip_refined")
"""Policies of a fixed shape, or of one that the candidates decide: not for candidates that are drawn."""
POLICIES = ("auto", *FREE, *STATIC, *TRAINED, "plain")
METHOD_POLICIES = ("adaptive", *FREE)
STATIC_TREE = "static_tree.json"
"""In a run folder: a tree that was fitted to its head (scripts/fit_tree.py)."""

Messages = Sequence[Mapping[str, Any]]
Picture = Image.Image | str | Path


@dataclass(frozen=True)
class Answer:
    """What came of one prompt.

    Args:
        text: decoded, without special tokens.
        output: tokens, rounds and times as the loop returned them.
    """

    text: str
    output: Output

    @property
    def error(self) -> str | None:
        """What went wrong with this prompt, if anything."""
        return self.output.error

    @property
    def mat(self) -> float:
        """Tokens per target pass after the prefill, bonus tokens and skipped steps included; NaN before the second."""
        return mat([self.output])

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the request's own clock, prefill included."""
        return len(self.output.tokens) / self.output.latency_s if self.output.latency_s else 0.0


class Speculator:
    """Decodes with a draft head or a training-free method. Its text is plain decoding's, whatever these do.

    Args:
        target: frozen model.
        drafter: what proposes.
        policy: how much; the text does not depend on it.
    """

    def __init__(self, target: Target, drafter: Drafter, policy: Policy) -> None:
        self.target, self.drafter, self.policy = target, drafter, policy

    @classmethod
    def from_pretrained(
        cls,
        ckpt: str | Path,
        target: str | None = None,
        policy: str = "auto",
        dtype: str = "float32",
        device: str = "auto",
        max_batch: int = 1,
    ) -> Speculator:
        """Load a head with the target it was made for.

        Args:
            ckpt: run folder of train/distill.py, or a place on the Hub: "org/name", "hub:org/name@revision"
                (`mmspec.hub`), where a head in a public layout is translated first (`mmspec.convert`).
            target: another name or place of the same target; needed for a head that does not say its own.
            policy: "viskip" (the trained controller) or another file of `mmspec/policies`, "fixed" (its tree), "static"
                (the tree fitted to it), a name of `static_tree.NAMED` (that published tree), "plain" (no drafting), or
                "auto": the controller where there is one.
            dtype, device: of target and head; "auto" is cuda where there is one.
            max_batch: the largest batch to measure costs for, which the controller decides by.

        Raises:
            InputError: a checkpoint that is missing, damaged or made for another target; an unknown policy.
        """
        loaded = checkpoints.load(ckpt, target, dtype)
        model = load_target(target or loaded.target.name, dtype, find_device(device))
        loaded.check_target(model)
        return cls(model, *drafter_and_policy(loaded, model, policy, max_batch))

    @classmethod
    def from_method(
        cls,
        name: str,
        target: str | None = None,
        settings: Mapping[str, Any] | None = None,
        ckpt: str | Path | None = None,
        dtype: str = "float32",
        device: str = "auto",
        max_batch: int = 1,
        policy: str = "adaptive",
    ) -> Speculator:
        """Load a target and decode with a training-free method, or with the hybrid of one and a checkpoint's head.

        Args:
            name: a file of `mmspec/drafters`, such as "pld", or "hybrid", which needs a checkpoint.
            target: of any supported family (default: the checkpoint's, or the embedded one).
            settings: fields of the method's `Config`; what is not given has its default.
            ckpt, dtype, device, max_batch: as for `from_pretrained`.
            policy: "adaptive" (the budget that pays on this machine), "fixed" (the method's whole budget), or another
                of METHOD_POLICIES.

        Raises:
            InputError: an unknown method, policy, key or value; a checkpoint as for `from_pretrained`, or none for the
                hybrid.
        """
        resolved(name, settings)  # what is wrong is said before a large target is loaded
        loaded = checkpoints.load(ckpt, target, dtype) if ckpt is not None else None
        if name == HYBRID and loaded is None:
            raise InputError("hybrid needs a checkpoint: its head drafts where there is nothing to copy")
        model = load_target(target or (loaded.target.name if loaded else EMBEDDED), dtype, find_device(device))
        if loaded:
            loaded.check_target(model)
        return cls(model, *method_and_policy(name, model, settings, loaded, policy=policy, max_batch=max_batch))

    def generate(
        self,
        prompts: str | Sequence[str | Messages],
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        max_batch: int = 1,
        on_emission: Callable[[Emission], None] | None = None,
    ) -> list[Answer]:
        """Answer any number of prompts.

        Args:
            prompts: a question, or several; each a text or a list of Hugging Face chat messages.
            images: pictures or paths: of the one question, or for several one picture, a list of them or None each. As
                many as the messages have image parts; a text gets its own.
            max_new_tokens: limit of each answer.
            temperature, top_k, top_p, seed: 0 is greedy. Sampled text is a function of prompt, number and seed alone.
            repetition_penalty, no_repeat_ngram_size: as of transformers' generate; 1.0 and 0 are off.
            max_batch: prompts decoded together. More than the model was loaded for is right, but its policy then
                decides by the costs of smaller batches.
            on_emission: told of tokens as they are decided; `emission.request.id` is the prompt's number.

        Returns:
            One answer for each prompt. One that cannot be read or decoded carries its error; the others are unharmed.
        """
        single = isinstance(prompts, str)
        asked: Sequence[str | Messages] = [prompts] if isinstance(prompts, str) else prompts
        shown: Sequence[Any] = [images] if single else images or [()] * len(asked)
        if len(shown) != len(asked):
            raise InputError(f"{len(asked)} prompts but images for {len(shown)}; give each prompt its own, or none")
        requests: list[Request] = []
        answers: dict[str, Output] = {}
        for number, (prompt, pictures) in enumerate(zip(asked, shown)):
            id = str(number)
            try:
                requests.append(self._request(id, prompt, pictures, max_new_tokens))
            except Exception as error:  # of this prompt alone, as in the loop
                answers[id] = Output(id, [], "error", 0.0, 0.0, [], error=error_line(error))
        sampler = make_sampler(temperature, top_k, top_p, seed, repetition_penalty, no_repeat_ngram_size)
        outputs = decode(self.target, requests, self.drafter, self.policy, sampler, max_batch, on_emission=on_emission)
        answers |= {output.id: output for output in outputs}
        return [Answer(self.target.decode(o.tokens).strip(), o) for o in (answers[str(n)] for n in range(len(asked)))]

    def custom_generate(self, streamer: Any | None = None) -> Callable[..., Tensor]:
        """For `self.target.model.generate(**inputs, custom_generate=...)`: the same arguments and tokens, drafted.

        Args:
            streamer: of transformers; `generate` does not hand its own on.
        """
        return custom_generate(self.target, self.drafter, self.policy, streamer)

    def _request(self, id: str, prompt: str | Messages, pictures: Any, max_new_tokens: int) -> Request:
        several = isinstance(pictures, Sequence) and not isinstance(pictures, str)
        listed = list(pictures) if several else [] if pictures is None else [pictures]
        opened = [p.convert("RGB") if isinstance(p, Image.Image) else open_image(Path(p)) for p in listed]
        messages = prompt
        if isinstance(prompt, str):
            content = [*({"type": "image"} for _ in opened), {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
        if (places := count_images(messages)) != len(opened):  # type: ignore[arg-type]
            raise InputError(f"{places} images in the messages but {len(opened)} pictures came with them")
        # Two prompts of one text get different noise, the same prompt at the same place the same.
        key = zlib.crc32(f"{id}/{messages}".encode())
        return Request(id, self.target.encode(messages, opened), max_new_tokens, key)  # type: ignore[arg-type]


def generate(ckpt: str | Path, prompts: str | Sequence[str | Messages], images: Sequence[Any] = (), **how: Any) -> Any:
    """`Speculator.from_pretrained(ckpt).generate(prompts, images, **how)`: convenient once, wasteful in a loop."""
    batch = int(how.get("max_batch", 1))
    return Speculator.from_pretrained(ckpt, max_batch=batch).generate(prompts, images, **how)


def drafter_and_policy(
    checkpoint: Checkpoint,
    target: Target,
    policy: str,
    max_batch: int = 1,
    drafter: Drafter | None = None,
    sampler: Sampler | None = None,
) -> tuple[Drafter, Policy]:
    """What a checkpoint decodes with.

    Args:
        checkpoint: was checked against the target; costs measured on this machine are kept in its folder.
        target: what the head drafts for.
        policy: see `Speculator.from_pretrained`.
        max_batch: part of what the cost table is measured for.
        drafter: the head's, where it was made with settings of its own.
        sampler: that a static tree is to be filled with in view; others have it from the drafter.

    Raises:
        InputError: an unknown policy, or "viskip" without a trained controller.
    """
    if policy not in POLICIES:
        raise InputError(f"unknown policy {policy!r}; use one of {', '.join(POLICIES)}")
    if policy == "plain":
        return NullDrafter(), SkipPolicy()
    if policy in STATIC:
        shape = NAMED.get(policy) or StaticTree.load(checkpoint.folder / STATIC_TREE)
        return make_drafter(checkpoint, target, sampler, shape=shape), FixedPolicy(shape.depth, shape.budget)
    tree = checkpoint.tree
    if policy == "auto":
        policy = "viskip" if checkpoint.viskip is not None else "fixed"
    if policy in TRAINED and checkpoint.viskip is None:
        raise InputError(f"checkpoint {checkpoint.folder} has no controller; use --policy fixed, or train one")
    costs: Costs | None = None
    if policy in MEASURED:
        # Kept beside the head for every later run, so measured with the drafter as it usually is.
        usual = make_drafter(checkpoint, target)
        drafter = drafter or usual
        folder, width = checkpoint.folder / "costs", f"w{tree.width}"
        costs = load_or_measure(folder, target, usual, max_batch, tree.depth, tree.budget, width)
    controller = checkpoint.deployed(target) if policy in TRAINED else None
    drafter = drafter or make_drafter(checkpoint, target)
    return drafter, make_policy(policy, Parts(tree.depth, tree.budget, costs, controller, tree.width))


def method_and_policy(
    name: str,
    target: Target,
    settings: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
    head: Drafter | None = None,
    policy: str = "adaptive",
    max_batch: int = 1,
    costs: Path | None = None,
) -> tuple[Drafter, Policy]:
    """What a training-free method or the hybrid decodes with.

    Args:
        name, target, settings: see `mmspec.methods.make_method`.
        checkpoint: of the hybrid's head, else not needed.
        head: the head's drafter, where it was made already.
        policy: of METHOD_POLICIES; those that decide by costs measure them now.
        max_batch: the largest batch to measure costs for.
        costs: folder in which what was measured is kept and found again; None measures it now.

    Raises:
        InputError: see `mmspec.methods`; an unknown policy.
    """
    if policy not in METHOD_POLICIES:
        raise InputError(f"unknown policy {policy!r} of a method; use one of {', '.join(METHOD_POLICIES)}")
    if name != HYBRID or checkpoint is None:
        drafter, fixed = make_method(name, target, settings)
    else:
        tree = checkpoint.tree
        head = head or make_drafter(checkpoint, target)
        drafter, fixed = make_hybrid(target, head, tree.depth, tree.budget, settings)
    parts, cap = Parts(fixed.max_depth, fixed.max_budget), fixed.max_depth
    if isinstance(drafter, HybridDrafter):
        # Its head has scores, so drafts are priced by what each says of itself; no budget has to be found by trial.
        policy, cap = "marginal" if policy == "adaptive" else policy, drafter.depth
    if isinstance(drafter, HybridDrafter) or policy in ("adaptive", *MEASURED):
        asked = target, drafter, max_batch, cap, fixed.max_budget
        table = measure(*asked) if costs is None else load_or_measure(costs, *asked)
        parts = replace(parts, costs=table.flat_beyond(cap, fixed.max_depth))
    if isinstance(drafter, HybridDrafter):
        drafter.costs = parts.costs
    if policy == "adaptive":
        return drafter, AdaptivePolicy(parts.measured(policy), fixed.max_depth, fixed.max_budget)
    return drafter, make_policy(policy, parts)


def find_device(name: str) -> str:
    """The device to run on: "auto" is cuda where there is one.

    Raises:
        InputError: this machine does not have it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is unknown; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} is not on this machine, which has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported; use cpu, cuda or cuda:N")
    return name


def make_drafter(
    checkpoint: Checkpoint,
    target: Target,
    sampler: Sampler | None = None,
    widths: Sequence[int] = (),
    shape: StaticTree | None = None,
) -> Drafter:
    """The head's drafter, with weights in the target's dtype.

    Args:
        checkpoint, target: as above.
        sampler: what the verification samples with, for a drafter that shall share its noise.
        widths: children per level of a drawn tree, for the rejection rule.
        shape: a static tree to fill.
    """
    head: Any = checkpoint.head(target.dtype).to(target.device)
    drafter: Drafter = head.drafter(target, checkpoint.tree.width, sampler, widths, shape)
    return drafter
