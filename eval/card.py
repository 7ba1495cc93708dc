"""The model card of a published head: Markdown with the metadata that the Hub reads, written from the run.

Invariant: every figure is in `summary.json`, everything else in the run's own files; what is not known is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from eval.plots import N_COLOURS, Series, standalone, ticks
from eval.report_charts import N_DEPTHS
from eval.summary import DEFINITIONS, PLAIN, interval, number
from mmspec.assets import EMBEDDED
from mmspec.checkpoint import Checkpoint
from mmspec.export.engines import ENGINES
from mmspec.hub import is_repo
from mmspec.safety import read_settings
from mmspec.types import InputError

LIBRARY = "mmspec-toolkit"
PIPELINE = "image-text-to-text"
NAMES = {
    "eagle": "EAGLE",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "msd": "MSD",
    "vispec": "ViSpec",
}
SHOWN = ("mat", "speedup", "exact_match", "ties", "skip_rate", "latency_p50_s", "tokens_per_s")
"""Figures whose definitions the card gives."""
SEES = {
    "embeds": "the image's features, which only newer versions of SGLang hand on (`--merged-images`)",
    "none": "nothing",
    "aux": "the target's states and the placeholder's embedding, as engines do",
    "compressed": "a few vectors made of the image, which no engine does",
}
"""What a head reads at image positions, by its `image_input`."""


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Args:
        repo: `org/name`.
        checkpoint: the run.
        base_model: the target on the Hub; None is the embedded one.
        license: of the head; None is the target's.
        summary: of its evaluation, if there is one.
        doubts: what speaks against it, see `eval.publish.objections`.
    """

    repo: str
    checkpoint: Checkpoint
    base_model: str | None
    license: str | None
    summary: Mapping[str, Any] | None
    doubts: Sequence[str]


def write(facts: Facts, folder: Path) -> str:
    """The card as text.

    Args:
        facts: see there.
        folder: what is published, already without paths; recipe, provenance and plots are read from it.
    """
    parts = [_opening(facts), _warnings(facts), _scores(facts, folder), _data(facts, folder), _use(facts)]
    parts += [_engines(facts), _making(folder), _licence(facts)]
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def metadata(facts: Facts) -> ModelCardData:
    """The card's head, as the Hub reads it."""
    kind = facts.checkpoint.kind
    tags = ["speculative-decoding", "draft-head", "vision-language", "mmspec", kind]
    tags += ["viskip"] if facts.checkpoint.viskip is not None else []
    more: dict[str, Any] = {}
    if facts.base_model is not None:
        # Of the relations that the Hub knows: it is of no use without its base, whose weights it leaves alone.
        more = {"base_model": facts.base_model, "base_model_relation": "adapter"}
    license, name = _license(facts)
    if name is not None:
        more |= {"license_name": name, "license_link": f"https://huggingface.co/{facts.base_model}"}
    results = None
    # What is doubted is no claim for the Hub's tables.
    if facts.summary is not None and not facts.doubts:
        settings = facts.summary.get("settings") or {}
        synthetic = str(settings.get("data", "")).startswith("synth:")
        overall = facts.summary["methods"][facts.summary["primary"]]["overall"]
        results = [
            EvalResult(
                task_type=PIPELINE,
                dataset_type="synthetic" if synthetic else "mmspec",
                dataset_name=f"{'synthetic records, ' if synthetic else ''}{settings.get('data', 'MMSpec')}",
                metric_type=key,
                metric_name=words,
                metric_value=round(overall[key], 4),
            )
            for key, words in (("mat", "mean accepted tokens (tau)"), ("speedup", "speedup over plain decoding"))
            if overall.get(key) is not None
        ]
    return ModelCardData(
        license=license,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=tags,
        model_name=facts.repo.split("/")[1],
        eval_results=results or None,
        **more,
    )


def validate(text: str) -> None:
    """Checks a card without asking the Hub, which checks it once more when it is committed.

    Raises:
        InputError: its metadata cannot be read back as they are, or hold what the Hub refuses.
    """
    try:
        data = ModelCard(text).data
        head = yaml.safe_load(text.split("---\n", 2)[1])
    except (ValueError, yaml.YAMLError, IndexError) as error:
        raise InputError(f"the model card's metadata are wrong: {' '.join(str(error).split())}") from error
    read = data.to_dict()
    if read != head:
        raise InputError("the model card's metadata do not read back as they were written")
    if "base_model" in read and not is_repo(read["base_model"]):
        raise InputError(f"the model card's base_model {read['base_model']!r} is no repository of the Hub")
    if read.get("license") == "other" and not read.get("license_name"):
        raise InputError("the model card's license is 'other' without a license_name; give --license")
    if not isinstance(read.get("license"), str) or not all(isinstance(tag, str) for tag in read.get("tags", [])):
        raise InputError("the model card's license and tags must be words")


def plots(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The card's plots, {file name: SVG}.

    Args:
        summary: of the evaluation.
        rows: lines of its `requests.jsonl`.
    """
    methods = summary["methods"]
    names = [name for name in methods if name != PLAIN]
    colour = {name: f"m{place % N_COLOURS}" for place, name in enumerate(names)} | {PLAIN: f"m{N_COLOURS - 1}"}
    drawn = {}
    depths = {name: methods[name]["overall"].get("accept_by_depth") or [] for name in names}
    deepest = min(max((len(shares) for shares in depths.values()), default=0), N_DEPTHS)
    if deepest:
        lines = [Series(n, colour[n], list(enumerate(depths[n][:deepest], start=1))) for n in names]
        ends = [float(depth) for depth in range(deepest + 1)]
        shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
        title = "Rounds that accepted at least k draft tokens"
        drawn["acceptance.svg"] = standalone(title, lines, "draft depth k", "share of drafting rounds", ends, shares)
    # Of a sweep the first cell, which is the one that the summary's figures are of.
    rows = [row for row in rows if all(row.get(key) == rows[0].get(key) for key in ("batch", "temperature"))]
    if rows:
        lines = []
        for name in methods:
            seconds = sorted(_seconds(row) for row in rows if row["method"] == name)
            points = [(0.0, 0.0)] + [(second, (n + 1) / len(seconds)) for n, second in enumerate(seconds)]
            lines.append(Series(name, colour[name], points, steps=True))
        longest = ticks(max(line.points[-1][0] for line in lines))
        shares = [0, 0.25, 0.5, 0.75, 1]
        title = "Requests done within t seconds"
        drawn["latency.svg"] = standalone(title, lines, "seconds", "share of requests", longest, shares)
    return drawn


def _seconds(row: Mapping[str, Any]) -> float:
    """From the start of a request's prefill to its last token; lines of schema 2 call it the total."""
    return float(row["total_s"] if "total_s" in row else row["latency_s"])


def n_parameters(path: Path) -> int:
    """Numbers in a safetensors file, counted from its header."""
    total = 0
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            total += size
    return total


def _opening(facts: Facts) -> str:
    loaded = facts.checkpoint
    head = n_parameters(loaded.folder / "head.safetensors")
    target = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else _embedded()
    text = (
        f"# {facts.repo.split('/')[1]}: {NAMES.get(loaded.kind, loaded.kind)} draft head for "
        f"{facts.base_model or EMBEDDED}\n\n"
        f"It accelerates the decoding of {target} without changing its text: the head proposes several tokens, the "
        "target verifies them in one pass, and only what the target itself would have written is kept.\n\n"
    )
    rows = [
        ("head", f"{NAMES.get(loaded.kind, loaded.kind)}, {head / 1e6:.2f} M parameters"),
        (
            "draft tree",
            f"depth {loaded.tree.depth}, {loaded.tree.width} candidates a level, {loaded.tree.budget} nodes",
        ),
        ("target's fingerprint", f"`{loaded.target.fingerprint}` (another target is refused when it is loaded)"),
    ]
    if loaded.viskip is not None:
        size = n_parameters(loaded.folder / "viskip.safetensors")
        words = f"ViSkip, {size / 1e6:.2f} M parameters: decides how much to draft, before anything is drafted"
        rows.insert(1, ("controller", words))
    if loaded.blind:
        rows.append(("vision", "a blind twin: it reads constants wherever an image stands"))
    return text + _table(("", ""), rows)


def _embedded() -> str:
    return f"`{EMBEDDED}`, the small LLaVA that comes with the toolkit,"


def _warnings(facts: Facts) -> str:
    lines = [f"> **Warning:** published although {doubt}." for doubt in facts.doubts]
    contention = (facts.summary or {}).get("contention") or {}
    if contention.get("unreliable"):
        lines.append(f"> Other work used {contention['other_cores']:.1f} cores meanwhile: times are unreliable.")
    return "\n>\n".join(lines)


def _scores(facts: Facts, folder: Path) -> str:
    if facts.summary is None:
        return "## Scores\n\nIt was not evaluated."
    summary = facts.summary
    methods, settings = summary["methods"], summary.get("settings") or {}
    names = [name for name in methods if name != PLAIN]
    rows = []
    for topic in [*methods[PLAIN]["topics"], "overall"]:
        for name in names:
            row = methods[name]["overall"] if topic == "overall" else methods[name]["topics"][topic]
            label = f"**{_cell(topic)}**" if topic == "overall" else _cell(topic)
            cells = (str(row["n_requests"]), number(row["mat"]), interval(row), number(row["exact_match"], 3))
            rows.append((label, _cell(name), *cells))
    data = str(settings.get("data", "MMSpec"))
    what = (
        f"`{data}`, records of the toolkit's synthetic corpus in MMSpec's schema and six topics (not MMSpec's own)"
        if data.startswith("synth:")
        else f"`{data}`, records in the layout of [MMSpec](https://arxiv.org/abs/2603.14989)"
    )

    def said(key: str) -> str:
        return str(settings.get(key, "?"))

    machine = summary.get("hardware") or {}
    device = machine.get("gpu") or f"{machine.get('cpu', 'a CPU')} ({machine.get('threads', '?')} threads)"
    parts = [
        "## Scores on MMSpec" if not data.startswith("synth:") else "## Scores",
        f"Data: {what}; {said('n_records')} records, batch size {said('batch_size')}, {said('dtype')}, "
        f"temperature {said('temperature')}, at most {said('max_new_tokens')} tokens an answer, on {device}. Every "
        "method ran through one decode loop on the same prompts.",
        _table(("topic", "method", "n", "MAT", "speedup [95%]", "exact match"), rows),
        "\n".join(f"- `{key}`: {(summary.get('definitions') or DEFINITIONS)[key]}" for key in SHOWN),
        *(
            f"![{path.stem}](plots/{path.name})"
            for path in (sorted((folder / "plots").glob("*.svg")) if (folder / "plots").is_dir() else [])
        ),
        "All figures, by method and topic: [eval/summary.json](eval/summary.json).",
    ]
    if (folder / "eval" / "report.html").is_file():
        parts[-1] += " The whole report, with sample answers: [eval/report.html](eval/report.html)."
    return "\n\n".join(parts)


def _data(facts: Facts, folder: Path) -> str:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return "## Data\n\nNothing is known here of the data it was trained on."
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data") or {}
    lines = []
    for source in data.get("sources") or []:
        limit = f", at most {source['limit']} conversations" if source.get("limit") else ""
        weight = f", weight {source['weight']:g}" if source.get("weight", 1.0) != 1.0 else ""
        lines.append(f"- `{source['path']}`{limit}{weight}")
    answers = (
        "The target answered the training questions itself; what is verified is what was learned."
        if data.get("answers") == "regenerated"
        else "The answers are those of the data."
    )
    synthetic = all(str(source["path"]).startswith("synth:") for source in data.get("sources") or [])
    if data.get("decontaminated"):
        clean = (
            "Samples whose picture, source or question MMSpec holds too were left out before training (list: "
            f"`{Path(str(data['decontaminated'])).name}`)."
        )
    elif synthetic:
        clean = "Splits of the synthetic corpus are disjoint by construction; no list of overlaps was needed."
    else:
        clean = "**The data were not searched for samples of the benchmark**; its scores may be flattered by that."
    return "\n\n".join(["## Data", "\n".join(lines), f"{answers} {clean}"])


def _use(facts: Facts) -> str:
    return f"""## Use

With the toolkit installed (`pip install .` in its checkout):

```python
import mmspec

model = mmspec.Speculator.from_pretrained("{facts.repo}")  # finds the target by itself
answer = model.generate("What is in this image?", images=["picture.png"])[0]
print(answer.text, answer.mat, answer.tokens_per_s)
```

```bash
python -m mmspec.chat --ckpt hub:{facts.repo} --image picture.png --prompt "Describe it." --compare
python -m eval.mmspec --ckpt hub:{facts.repo} --data MMSPEC_FOLDER
```

`hub:{facts.repo}@REVISION` pins a branch, tag or commit; `HF_HUB_OFFLINE=1` uses what was fetched before. Costs of
drafting and verifying are measured anew on other hardware."""


def _engines(facts: Facts) -> str:
    """How to serve it elsewhere, by what `mmspec.export` says of engines; a guide, as the export itself decides."""
    loaded = facts.checkpoint
    name = NAMES.get(loaded.kind, loaded.kind)
    layouts = {layout: engine for layout, engine in ENGINES.items() if engine.kind == loaded.kind}
    if not layouts:
        text = f"No engine serves {name} heads of vision-language models; `scripts/export.py` refuses them."
        return f"## In SGLang and vLLM\n\n{text}"
    alone = " --head-only" if loaded.viskip is not None else ""
    commands = "\n".join(
        f"python scripts/export.py hub:{facts.repo} --format {layout} --out exported/{layout} --verify{alone}"
        for layout in layouts
    )
    limits = ["vLLM drafts chains, no trees, so fewer tokens are accepted there than above."]
    if loaded.viskip is not None:
        limits.append("ViSkip's controller stays behind: an engine drafts the same amount every round.")
    sees = getattr(loaded.config, "image_input", None)
    if sees is not None:
        limits.append(f"At image positions this head reads {SEES.get(sees, sees)} (`image_input: {sees}`).")
        if refusing := [layout for layout, engine in layouts.items() if sees not in engine.image_inputs]:
            limits.append(f"So the export refuses it as {' and '.join(refusing)}: there it would draft badly.")
    limits.append("Not every target has a hook in every engine; LLaVA-1.5 has none (the export warns).")
    listing = "\n".join(f"- {limit}" for limit in limits)
    return f"## In SGLang and vLLM\n\n```bash\n{commands}\n```\n\nWhat engines do otherwise:\n\n{listing}"


def _making(folder: Path) -> str:
    path = folder / "provenance.json"
    if not path.is_file():
        return ""
    made = read_settings(path)
    if "converted" in made:
        origin = made["converted"]
        return f"## Origin\n\nTranslated from `{origin['from']}` (layout {origin['layout']}); it was not trained here."
    rows = [("commit of the toolkit", f"`{made.get('commit')}`"), ("seed", str(made.get("seed")))]
    rows += [("data", f"`{made.get('data_hash')}`")]
    rows += [(_cell(name), _cell(str(version))) for name, version in (made.get("libraries") or {}).items() if version]
    command = " ".join(made.get("command") or [])
    return (
        "## How it was made\n\n"
        f"```bash\n{command}\n```\n\n{_table(('', ''), rows)}\n\nThe whole recipe: [recipe.yaml](recipe.yaml)."
        if (folder / "recipe.yaml").is_file()
        else f"## How it was made\n\n```bash\n{command}\n```\n\n{_table(('', ''), rows)}"
    )


def _license(facts: Facts) -> tuple[str, str | None]:
    """Identifier and, for `other`, name: as given, else the embedded target's, else whatever the target's is."""
    if facts.license is not None:
        return facts.license, None
    return ("apache-2.0", None) if facts.base_model is None else ("other", "as-base-model")


def _licence(facts: Facts) -> str:
    license, name = _license(facts)
    if name is None:
        return f"## Licence\n\n{license}. The target has a licence of its own."
    return (
        "## Licence\n\nThe head was trained on the states and answers of "
        f"[{facts.base_model}](https://huggingface.co/{facts.base_model}), and is under the terms of its licence."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = "|".join(" --- " for _ in header)
    return "\n".join([f"| {' | '.join(header)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
