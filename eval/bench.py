"""Runs every method over the same groups of requests and pairs each output with plain decoding's.

Invariant: within a group all methods see the same `Request` objects, one directly after another, in an order that is
reversed from group to group (ABBA), so that a drift of the machine's speed falls on all of them alike.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eval.meters import Meter
from eval.tasks import PLAIN, Dialogues, Task, image_of
from mmspec import metrics
from mmspec.heads.viskip import Deployed
from mmspec.loop import all_complete, generate
from mmspec.types import Drafter, Output, Policy, Request, StepTrace, Target, Verifier

N_WARMUP = 3
PHASES = ("draft_s", "verify_s", "commit_s", "control_s")


@dataclass
class Method:
    """A drafter with the policy that steers it, under the name it is reported by.

    Args:
        facts: of the drafter, for each of its results: what it is, its weights' hash and number.
    """

    name: str
    drafter: Drafter
    policy: Policy
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One request decoded by one method.

    Args:
        id, topic, image: of the record; for `image` see `tasks.image_of`.
        turn: 1-based.
        method: name.
        output: what the loop returned.
        text: decoded and stripped.
        group: number of its group in the run; groups are the units of time at batch > 1.
        group_s: seconds of the whole group by this method.
        match: against plain decoding; None where only the distribution is the same.
        prompt_tokens, visual_tokens: length of the prompt and image placeholders in it.
        category: of the record.
        steps: per round its planned depth, and the microseconds of drafting, verification and commit, of its batch.
        phases_s: where the seconds of the loop went, of the whole group.
        energy_j, peak_bytes: of the whole group, where the device tells.
        gap: top-2 gap of plain decoding at the first divergence, where there is one.
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
    category: str = ""
    steps: Sequence[tuple[int, ...]] = ()
    phases_s: Mapping[str, float] = field(default_factory=dict)
    energy_j: float | None = None
    peak_bytes: int | None = None
    gap: float | None = None


@dataclass(frozen=True)
class _Timed:
    """One group decoded by one method."""

    outputs: list[Output]
    group_s: float
    traces: list[StepTrace]
    energy_j: float | None
    peak_bytes: int | None


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
        first, stride: numbers of the groups are `first`, `first + stride`, ...: of one process among several.
        frozen: every group starts from the policies as they were made, so that what was decoded before changes neither
            plans nor rounds.
    """

    target: Target
    methods: list[Method]
    sampler: Any
    batch_size: int
    tie_gap: float = metrics.TIE_GAP
    verifier: Verifier | None = None
    first: int = 0
    stride: int = 1
    frozen: bool = False
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
        recall: Callable[[int, Sequence[Task]], list[Result] | None] = lambda number, group: None,
    ) -> None:
        """Decode all groups by all methods.

        Args:
            dialogues: makes the groups and takes the answers.
            on_group: told of each finished group, its results ordered by method, then request.
            recall: what is known of a group by its number, or None: then it is decoded.
        """
        self.meter = Meter(self.target.device)
        for group in dialogues.groups(self.batch_size):
            number = self.first + self.stride * self.n_groups
            results = recall(number, group)
            if results is None:
                order = self.methods if self.n_groups % 2 == 0 else self.methods[::-1]
                timed = {method.name: self._timed(method, group) for method in order}
                results = self._results(number, group, timed)
            for place, result in enumerate(results):
                dialogues.answer(group[place % len(group)], result.text, result.method)
            on_group(results)
            self.n_groups += 1

    def _results(self, number: int, group: Sequence[Task], timed: Mapping[str, _Timed]) -> list[Result]:
        """Pair every output with plain decoding's."""
        reference = timed[PLAIN].outputs
        differs = self.verifier is None and any(
            metrics.first_divergence(output.tokens, plain.tokens) is not None
            for one in timed.values()
            for output, plain in zip(one.outputs, reference)
        )
        # Gaps cost plain decoding time at every token, so they are fetched in a second, untimed pass, if ever.
        gaps = self._gaps(group, reference) if differs else [[] for _ in group]
        results = []
        for method in self.methods:
            one = timed[method.name]
            phases_s = {phase: sum(getattr(trace, phase) for trace in one.traces) for phase in PHASES}
            steps = _steps(one.outputs, one.traces)
            for place, (task, output, plain) in enumerate(zip(group, one.outputs, reference)):
                record, prompt = task.record, task.asked(method.name).prompt
                match = self._match(task, method.name, output, plain, gaps[place])
                at = match.first_divergence if match else None
                results.append(
                    Result(
                        id=record.id,
                        topic=record.topic,
                        image=image_of(record),
                        turn=task.turn,
                        method=method.name,
                        output=output,
                        text=self.target.decode(output.tokens).strip(),
                        group=number,
                        group_s=one.group_s,
                        match=match,
                        prompt_tokens=len(prompt),
                        visual_tokens=int(prompt.visual.sum()),
                        category=record.category,
                        steps=steps[place],
                        phases_s=phases_s,
                        energy_j=one.energy_j,
                        peak_bytes=one.peak_bytes,
                        gap=gaps[place][at] if at is not None and at < len(gaps[place]) else None,
                    )
                )
        return results

    def _match(
        self, task: Task, name: str, output: Output, plain: Output, gaps: Sequence[float]
    ) -> metrics.Match | None:
        """How an output compares with plain decoding's; None where only the distribution is the same."""
        if self.verifier is not None and name != PLAIN:
            return None
        match = metrics.compare(output.tokens, plain.tokens, gaps, self.tie_gap)
        # Behind an answer of its own that differed, a method answers another prompt: what counts is the first answer.
        return metrics.Match(match.first_divergence, not match.identical) if name in task.own else match

    def _gaps(self, group: Sequence[Task], reference: Sequence[Output]) -> list[list[float]]:
        """Top-2 gaps of plain decoding, [] for a row that did not repeat itself (then nothing can be called a tie)."""
        again = self._decode(self.methods[0], [task.request for task in group], want_gaps=True)
        return [a.gaps if a.tokens == b.tokens else [] for a, b in zip(again, reference)]

    def _timed(self, method: Method, group: Sequence[Task]) -> _Timed:
        """Decode one group; its seconds are those from the first prefill to the last token."""
        traces: list[StepTrace] = []
        requests = [task.asked(method.name) for task in group]
        self.meter.start()
        start = time.perf_counter()
        outputs = self._decode(method, requests, traces=traces)
        makespan_s = time.perf_counter() - start
        # Alone in its group, a request's own clock is the sharper one: it leaves out the opening of the buffers.
        group_s = outputs[0].latency_s if len(outputs) == 1 else makespan_s
        return _Timed(outputs, group_s, traces, *self.meter.stop())

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
            frozen_copy(method.policy) if self.frozen else method.policy,
            self.sampler,
            max_batch=self.batch_size,
            verifier=self.verifier,
            want_gaps=want_gaps,
            traces=traces,
        )
        return all_complete(outputs)


def frozen_copy(policy: Policy) -> Policy:
    """A copy that learns without the original; a controller, which never changes, is shared."""
    shared = {id(part): part for part in vars(policy).values() if isinstance(part, Deployed)}
    return copy.deepcopy(policy, shared)


def _steps(outputs: Sequence[Output], traces: Sequence[StepTrace]) -> list[list[tuple[int, ...]]]:
    """Per output and round: planned depth (0 of a skip), microseconds of drafting, verification and commit.

    All requests of a group fit into the batch, and one that ends with its first token makes room for the next: so those
    that have rounds have the first rows, in order.
    """
    steps: list[list[tuple[int, ...]]] = []
    row = 0
    for output in outputs:
        mine = [trace for trace in traces if trace.active[row]] if output.rounds else []
        steps.append(
            [
                (trace.plan.depth if entry[0] == "draft" else 0, *(round(1e6 * s) for s in _seconds(trace)))
                for trace, entry in zip(mine, output.rounds)
            ]
        )
        row += bool(output.rounds)
    return steps


def _seconds(trace: StepTrace) -> tuple[float, float, float]:
    return trace.draft_s, trace.verify_s, trace.commit_s
