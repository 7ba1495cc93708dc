"""Runs every method over the same groups of requests and pairs each output with plain decoding's.

Invariant: within a group all methods see the same `Request` objects, one directly after another, in an order that is
reversed from group to group (ABBA), so that a drift of the machine's speed falls on all of them alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.tasks import Dialogues, Task
from mmspec import metrics
from mmspec.loop import all_complete, generate
from mmspec.types import Drafter, Output, Policy, Request, StepTrace, Target, Verifier

PLAIN = "plain"
N_WARMUP = 3
PHASES = ("draft_s", "verify_s", "commit_s", "control_s")


@dataclass
class Method:
    """A drafter with the policy that steers it, under the name it is reported by.

    Args:
        seconds: where the loop's seconds went, summed over the timed groups.
    """

    name: str
    drafter: Drafter
    policy: Policy
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


@dataclass(frozen=True)
class Result:
    """One request decoded by one method.

    Args:
        id, topic, image: of the record; `image` is the path as text, or the id for a text-only record.
        turn: 1-based.
        method: name.
        output: what the loop returned.
        text: decoded and stripped.
        group: number of its group in the run; groups are the units of time at batch > 1.
        group_s: seconds of the whole group by this method.
        match: against plain decoding; None where only the distribution is the same.
        prompt_tokens, visual_tokens: length of the prompt and image placeholders in it.
    """

    id: str
    topic: str
    image: str
    turn: int
    method: str
    output: Output
    text: str
    group: int
    group_s: float
    match: metrics.Match | None
    prompt_tokens: int
    visual_tokens: int

    def row(self) -> dict[str, Any]:
        """The line of `requests.jsonl`."""
        output = self.output
        return {
            "id": self.id,
            "topic": self.topic,
            "turn": self.turn,
            "method": self.method,
            "prompt_tokens": self.prompt_tokens,
            "visual_tokens": self.visual_tokens,
            "output_ids": output.tokens,
            "text": self.text,
            "finish_reason": output.finish_reason,
            "ttft_s": output.ttft_s,
            "latency_s": output.latency_s,
            "group": self.group,
            "group_s": self.group_s,
            "rounds": [list(round) for round in output.rounds],
            "identical": self.match.identical if self.match else None,
            "tie": self.match.tie if self.match else None,
            "first_divergence": self.match.first_divergence if self.match else None,
        }


@dataclass
class Bench:
    """Everything that is fixed during a run.

    Args:
        target: shared by all methods.
        methods: plain decoding first.
        sampler: shared; its noise is keyed by request and position.
        batch_size: rows decoded together.
        tie_gap: see `metrics.compare`.
        verifier: of all methods; None is the one that gives plain decoding's text, and any other one is taken to be
            lossless in distribution only.
    """

    target: Target
    methods: list[Method]
    sampler: Any
    batch_size: int
    tie_gap: float = metrics.TIE_GAP
    verifier: Verifier | None = None
    n_groups: int = field(default=0, init=False)

    def warm_up(self, tasks: Sequence[Task]) -> None:
        """Decode a few requests with every method, untimed: allocator, kernels and threads settle before the clock.

        What was made while loading is kept from the garbage collector: a full pass over it takes longer than an answer.
        """
        requests = [replace(task.request, max_new_tokens=min(32, task.request.max_new_tokens)) for task in tasks]
        for method in self.methods:
            if requests:
                self._decode(method, requests)
        gc.collect()
        gc.freeze()

    def run(
        self,
        dialogues: Dialogues,
        on_group: Callable[[list[Result]], None],
    ) -> None:
        """Decode all groups by all methods.

        Args:
            dialogues: makes the groups and takes plain decoding's answers.
            on_group: told of each finished group, its results ordered by method, then request.
        """
        for group in dialogues.groups(self.batch_size):
            order = self.methods if self.n_groups % 2 == 0 else self.methods[::-1]
            timed = {method.name: self._timed(method, [task.request for task in group]) for method in order}
            texts = [self.target.decode(output.tokens).strip() for output in timed[PLAIN][0]]
            for task, text in zip(group, texts):
                dialogues.answer(task, text)
            on_group(self._results(group, timed))
            self.n_groups += 1

    def _results(self, group: Sequence[Task], timed: dict[str, tuple[list[Output], float]]) -> list[Result]:
        """Pair every output with plain decoding's."""
        reference = timed[PLAIN][0]
        differs = self.verifier is None and any(
            metrics.first_divergence(output.tokens, plain.tokens) is not None
            for outputs, _ in timed.values()
            for output, plain in zip(outputs, reference)
        )
        # Gaps cost plain decoding time at every token, so they are fetched in a second, untimed pass, if ever.
        gaps = self._gaps(group, reference) if differs else [[] for _ in group]
        results = []
        for name, (outputs, group_s) in timed.items():
            for task, output, plain, gap in zip(group, outputs, reference, gaps):
                record, prompt = task.record, task.request.prompt
                results.append(
                    Result(
                        id=record.id,
                        topic=record.topic,
                        image=str(record.image or record.id),
                        turn=task.turn,
                        method=name,
                        output=output,
                        text=self.target.decode(output.tokens).strip(),
                        group=self.n_groups,
                        group_s=group_s,
                        match=metrics.compare(output.tokens, plain.tokens, gap, self.tie_gap)
                        if self.verifier is None or name == PLAIN
                        else None,
                        prompt_tokens=len(prompt),
                        visual_tokens=int(prompt.visual.sum()),
                    )
                )
        place = {method.name: number for number, method in enumerate(self.methods)}
        return sorted(results, key=lambda result: place[result.method])

    def _gaps(self, group: Sequence[Task], reference: Sequence[Output]) -> list[list[float]]:
        """Top-2 gaps of plain decoding, [] for a row that did not repeat itself (then nothing can be called a tie)."""
        again = self._decode(self.methods[0], [task.request for task in group], want_gaps=True)
        return [a.gaps if a.tokens == b.tokens else [] for a, b in zip(again, reference)]

    def _timed(self, method: Method, requests: Sequence[Request]) -> tuple[list[Output], float]:
        """Decode one group. Returns its outputs and its seconds, first prefill to last token."""
        traces: list[StepTrace] = []
        start = time.perf_counter()
        outputs = self._decode(method, requests, traces=traces)
        makespan_s = time.perf_counter() - start
        for phase in PHASES:
            method.seconds[phase] += sum(getattr(trace, phase) for trace in traces)
        # Alone in its group, a request's own clock is the sharper one: it leaves out the opening of the buffers.
        return outputs, outputs[0].latency_s if len(outputs) == 1 else makespan_s

    def _decode(
        self,
        method: Method,
        requests: Sequence[Request],
        want_gaps: bool = False,
        traces: list[StepTrace] | None = None,
    ) -> list[Output]:
        outputs = generate(
            self.target,
            list(requests),
            method.drafter,
            method.policy,
            self.sampler,
            max_batch=self.batch_size,
            verifier=self.verifier,
            want_gaps=want_gaps,
            traces=traces,
        )
        return all_complete(outputs)
