"""The one decode loop: plain decoding, every drafter and every policy run this code on the same target.

    plan -> draft -> verify -> accept -> [host sync] -> emit -> keep -> observe

A step talks to the host once: accepted paths, new tokens and what the policy sensed travel in one transfer. Stop
tokens, length limits and truncation are decided here and nowhere else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmspec.tree import root_only
from mmspec.types import (
    Accepted,
    Choices,
    Drafter,
    Emission,
    Evidence,
    Forward,
    Output,
    Paths,
    Plan,
    Policy,
    Prompt,
    Request,
    Round,
    Sampler,
    StepTrace,
    Target,
    Tree,
    Verifier,
)
from mmspec.verify import MatchVerifier


@torch.inference_mode()
def generate(
    target: Target,
    requests: Sequence[Request],
    drafter: Drafter,
    policy: Policy,
    sampler: Sampler,
    max_batch: int = 1,
    verifier: Verifier | None = None,
    on_output: Callable[[Output], None] | None = None,
    on_emission: Callable[[Emission], None] | None = None,
    want_gaps: bool = False,
    traces: list[StepTrace] | None = None,
) -> list[Output]:
    """Decode any number of requests, `max_batch` rows at a time; a finished row makes room for the next request.

    A request that fails does not take others with it: its output carries the error. A drafter that raises loses the
    rows it was drafting for; they go on without one, to the same tokens, and their outputs say so.

    Args:
        target: frozen model.
        requests: of any lengths and image sizes.
        drafter, policy: what to propose and how much of it; neither changes the output.
        sampler: greedy, or keyed noise.
        verifier: MatchVerifier unless told otherwise.
        on_output: called with each result as soon as it is finished.
        on_emission: called with the tokens of each round as they are decided.
        want_gaps: also report how close the runner-up was at each token (for tie reports).
        traces: a list to which one StepTrace a round is added.

    Returns:
        Outputs in the order of the requests.

    Raises:
        ValueError: a batch below 1.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    if not requests:
        return []
    batch = min(max_batch, len(requests))
    run = _Run(target, requests, drafter, policy, sampler, batch, want_gaps, on_output, on_emission)
    verifier = verifier or MatchVerifier()
    clock = _Clock(target.device, traces is not None)
    while run.fill():
        start = clock.mark()
        plan = run.plan()
        planned = clock.mark()
        trees = run.draft(plan)
        drafted = clock.mark()
        forward = target.forward(run.state, trees, drafter.taps)
        choices = Choices(forward.logits, run.keys, run.positions(trees), run.paths_of(trees))
        scores = sampler.scores(choices.logits, choices.keys, choices.positions, choices.paths)
        accepted = verifier.accept(trees, scores, choices)
        sensed = policy.sense(run.evidence(trees, forward, accepted), run.all_rows) if policy.senses else None
        news = run.transfer(trees, accepted, scores, sensed)
        verified = clock.mark()
        told = run.emit(news)
        run.remember(trees, accepted)
        target.keep(run.state, accepted, run.paths)
        run.roots = accepted.next_tokens
        run.teach(trees, forward, accepted, news)
        run.retire()
        seconds = clock.lap(start, planned, drafted, verified)
        trace = StepTrace(plan, *told, trees.tokens.shape[1], tuple(news.nodes), *seconds)
        policy.observe(trace)
        if traces is not None:
            traces.append(trace)
    if traces is not None:
        clock.resolve(traces)
    return [run.outputs[i] for i in range(len(requests))]


def all_complete(outputs: list[Output]) -> list[Output]:
    """The outputs, where a run is worth nothing with a failed request or a failed drafter in it.

    Raises:
        RuntimeError: naming the first request with an error, and how many there are.
    """
    failed = [output for output in outputs if output.error]
    if failed:
        first = f"request '{failed[0].id}': {failed[0].error}"
        raise RuntimeError(first if len(failed) == 1 else f"{first} (and {len(failed) - 1} more)")
    return outputs


@dataclass
class _Row:
    """A request being decoded."""

    index: int
    request: Request
    limit: int
    started: float
    ttft: float = 0.0
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    rounds: list[tuple[str, int, int, int]] = field(default_factory=list)
    finish: str = ""
    error: str | None = None
    drafted: bool = False
    """Whether the drafter knows this row; it is forgotten when the drafter fails."""

    def take(self, tokens: Sequence[int], gaps: Sequence[float], stop_ids: frozenset[int]) -> int:
        """Append decided tokens up to the first stop token or the limit; returns how many were kept."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            self.gaps.extend(gaps[i : i + 1])
            if token in stop_ids:
                self.finish = "stop"
            elif len(self.tokens) >= self.limit:
                self.finish = "length" if self.limit == self.request.max_new_tokens else "context"
            if self.finish:
                return i + 1
        return len(tokens)


@dataclass(frozen=True)
class _News:
    """One step's transfer to the host, per row: draft nodes, kept path, tokens it decided (bonus last), their gaps."""

    nodes: list[int]
    paths: list[list[int]]
    tokens: list[list[int]]
    gaps: list[list[float]]


class _Run:
    """Rows, their device-side companions, and the bookkeeping between two verifications."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[Request],
        drafter: Drafter,
        policy: Policy,
        sampler: Sampler,
        batch: int,
        want_gaps: bool,
        on_output: Callable[[Output], None] | None,
        on_emission: Callable[[Emission], None] | None,
    ) -> None:
        self.target, self.drafter, self.policy, self.sampler = target, drafter, policy, sampler
        self.want_gaps, self.on_output, self.on_emission = want_gaps, on_output, on_emission
        self.queue = deque(enumerate(requests))
        self.outputs: dict[int, Output] = {}
        self.rows: list[_Row | None] = [None] * batch
        self.limits = {id(r): _limit(target, r) for r in requests}
        longest = max((len(r.prompt) + self.limits[id(r)] for r in requests if self.limits[id(r)] > 0), default=1)
        # Beyond the longest answer a last tree still needs its nodes, and a commit its path.
        self.n_slots = longest + policy.max_budget + policy.max_depth + 2
        self.state: Any = target.open(batch, self.n_slots, policy.mass_layer)
        drafter.open(batch, self.n_slots)
        policy.open(batch, target.device, sampler.sampled)
        zeros = torch.zeros(batch, dtype=torch.long, device=target.device)
        self.all_rows = torch.arange(batch, device=target.device)
        self.roots, self.keys = zeros.clone(), zeros.clone()
        self.n_prompt, self.n_visual = zeros.clone() + 1, zeros.clone()
        # Committed tokens per row, for penalties alone; a committed path may write beyond its end, never below it.
        self.history = zeros.unsqueeze(1).repeat(1, self.n_slots) if sampler.needs_history else None
        self.sensed: list[list[float]] = [[] for _ in range(batch)]
        self.paths: tuple[tuple[int, ...], ...] = ((),) * batch

    def fill(self) -> bool:
        """Admit waiting requests to free rows; False when nothing is left to decode."""
        for row in range(len(self.rows)):
            while self.rows[row] is None and self.queue:
                index, request = self.queue.popleft()
                fresh = _Row(index, request, self.limits[id(request)], time.perf_counter())
                try:
                    self._admit(row, fresh)
                except Exception as error:  # of this request alone: what is decoded beside it goes on
                    fresh.finish, fresh.error = "error", error_line(error)
                self.rows[row] = fresh
                if self.on_emission and fresh.tokens:
                    self.on_emission(Emission(request, tuple(fresh.tokens), 0, "prefill"))
                if fresh.finish:
                    self._finish(row)
        return any(self.rows)

    def _admit(self, row: int, fresh: _Row) -> None:
        """Prefill a request into a row and choose its first token.

        Raises:
            ValueError: its prompt leaves no room in the context, or it may not emit anything.
        """
        request, prompt = fresh.request, fresh.request.prompt
        if fresh.limit < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {request.max_new_tokens} leave no token to "
                f"decode in a context of {self.target.max_length}"
            )
        if request.cancel is not None and request.cancel.is_set():
            fresh.finish = "cancelled"
            return
        forward = self.target.prefill(self.state, row, prompt, self.drafter.taps)
        one = self.all_rows[row : row + 1]
        self.keys[row] = request.key
        self.n_prompt[row], self.n_visual[row] = len(prompt), int(prompt.visual.sum())
        position = self.n_prompt[one].unsqueeze(1)
        scores = self.sampler.scores(forward.logits, self.keys[one], position, self._prompt_path(row, prompt))
        self.roots[row] = scores[0, -1].argmax()
        try:
            self.drafter.admit(row, request, forward, self.roots[row])
            fresh.drafted = True
        except Exception as error:
            self._lose(fresh, error)
        news = [self.roots[one].double()]
        if self.want_gaps:
            top = scores[0, -1:].topk(2).values
            news.append((top[:, 0] - top[:, 1]).double())
        if self.policy.senses:
            sensed = self.policy.sense(self._first_evidence(one, forward), one)
            news += [] if sensed is None else [sensed[0].double()]
        token, *rest = torch.cat(news).tolist()
        gaps, self.sensed[row] = (rest[:1], rest[1:]) if self.want_gaps else ([], rest)
        fresh.ttft = time.perf_counter() - fresh.started
        fresh.take([int(token)], gaps, self.target.stop_ids)

    def plan(self) -> Plan:
        """The policy's plan, without a budget for rows that the drafter has lost."""
        plan = self.policy.plan(self.sensed, self.remaining())
        if all(row is None or row.drafted for row in self.rows):
            return plan
        return replace(plan, budget=tuple(n if row and row.drafted else 0 for n, row in zip(plan.budget, self.rows)))

    def draft(self, plan: Plan) -> Tree:
        """The drafter's trees, or the roots alone where nothing is planned or the drafter fails."""
        if plan.depth and any(plan.budget):
            try:
                trees = self.drafter.propose(self.roots, plan)
            except Exception as error:
                self._lose_all(error)
            else:
                return trees if plan.prune is None or trees.scores is None else plan.prune(trees)
        return root_only(self.roots)

    def teach(self, trees: Tree, forward: Forward, accepted: Accepted, news: _News) -> None:
        """Tell the drafter what became of the round, for the rows it still knows."""
        known = [bool(path) and row is not None and row.drafted for path, row in zip(self.paths, self.rows)]
        paths = tuple(path if k else () for path, k in zip(self.paths, known))
        tokens = tuple(tuple(new) if k else () for new, k in zip(news.tokens, known))
        try:
            self.drafter.observe(Round(trees, forward, accepted, paths, tokens))
        except Exception as error:
            self._lose_all(error)

    def _lose_all(self, error: Exception) -> None:
        """The drafter raised for the batch: which row it was cannot be known, so it starts anew with later requests."""
        for row in self.rows:
            if row and row.drafted:
                self._lose(row, error)
        self.drafter.open(len(self.rows), self.n_slots)

    def _lose(self, row: _Row, error: Exception) -> None:
        row.drafted, row.error = False, f"drafter: {error_line(error)}"

    def remaining(self) -> list[int]:
        """Tokens each row may still emit; 0 for idle rows."""
        return [row.limit - len(row.tokens) if row else 0 for row in self.rows]

    def positions(self, trees: Tree) -> Tensor:
        """[B, N] index of the token that each node decides: what keyed noise hangs on."""
        return self.state.lengths_device.unsqueeze(1) + trees.depths + 1

    def _first_evidence(self, one: Tensor, forward: Forward) -> Evidence:
        """What a prefill left behind."""
        none, length = torch.zeros_like(one), self.n_prompt[one]
        hidden, logits = forward.last_hidden[:, -1], forward.logits[:, -1]
        visual, key = self.n_visual[one], self.keys[one]
        mass = None if forward.visual_mass is None else forward.visual_mass[:, -1]
        return Evidence(hidden, logits, self.roots[one], none, none, length, length, visual, key, mass)

    def paths_of(self, trees: Tree) -> Paths | None:
        """What precedes each node's choice, for a sampler that asks for it."""
        if self.history is None:
            return None
        return Paths(self.history[:, : max(self.state.lengths)], self.state.lengths_device, trees)

    def _prompt_path(self, row: int, prompt: Prompt) -> Paths | None:
        """The same for the token after a prompt, whose last token is the root; starts the row's history."""
        if self.history is None:
            return None
        ids = prompt.input_ids.to(self.history.device)
        self.history[row, : len(prompt)] = ids
        return Paths(ids[None, :-1], torch.full_like(ids[:1], len(prompt) - 1), root_only(ids[-1:]))

    def remember(self, trees: Tree, accepted: Accepted) -> None:
        """Add what is about to be committed to the history; later rounds overwrite what lies beyond the kept nodes."""
        if self.history is not None:
            path = accepted.path
            slots = self.state.lengths_device.unsqueeze(1) + torch.arange(path.shape[1], device=path.device)
            self.history.scatter_(1, slots, trees.tokens.gather(1, path))

    def evidence(self, trees: Tree, forward: Forward, accepted: Accepted) -> Evidence:
        """What the verification left behind at each row's last kept node."""
        node = accepted.path.gather(1, accepted.n_kept.unsqueeze(1) - 1)
        last, mass = node.unsqueeze(-1), forward.visual_mass
        return Evidence(
            forward.last_hidden.gather(1, last.expand(-1, -1, forward.last_hidden.shape[-1])).squeeze(1),
            forward.logits.gather(1, last.expand(-1, -1, forward.logits.shape[-1])).squeeze(1),
            accepted.next_tokens,
            accepted.n_kept,
            trees.depths.amax(1),
            self.state.lengths_device + accepted.n_kept,
            self.n_prompt,
            self.n_visual,
            self.keys,
            None if mass is None else mass.gather(1, node).squeeze(1),
        )

    def transfer(self, trees: Tree, accepted: Accepted, scores: Tensor, sensed: Tensor | None) -> _News:
        """The step's one device-to-host transfer."""
        path = accepted.path
        P = path.shape[1]
        if P == 1 and not self.want_gaps and sensed is None:  # plain decoding: nothing to tell but the tokens
            new = [[t] if row else [] for row, t in zip(self.rows, accepted.next_tokens.tolist())]
            return _News([0] * len(new), [[0] if row else [] for row in self.rows], new, [[]] * len(new))
        counts = [] if trees.full else [(trees.parents >= 0).sum(1, keepdim=True)]
        packed = torch.cat([path, accepted.tokens, accepted.n_kept.unsqueeze(1), *counts], 1)
        columns = packed.shape[1]
        if self.want_gaps:
            top = scores.topk(2, dim=-1).values
            packed = torch.cat([packed.double(), (top[..., 0] - top[..., 1]).gather(1, path).double()], 1)
        if sensed is not None:
            packed = torch.cat([packed.double(), sensed.double()], 1)
        nodes, paths, tokens, gaps = [], [], [], []
        for b, line in enumerate(packed.tolist()):
            kept = int(line[2 * P]) if self.rows[b] else 0
            nodes.append(trees.tokens.shape[1] - 1 if trees.full else int(line[columns - 1]))
            paths.append([int(x) for x in line[:kept]])
            tokens.append([int(x) for x in line[P : P + kept]])
            rest = line[columns:]
            gaps.append(rest[:kept] if self.want_gaps else [])
            self.sensed[b] = rest[P if self.want_gaps else 0 :]
        return _News(nodes, paths, tokens, gaps)

    def emit(self, news: _News) -> tuple[tuple[bool, ...], tuple[int, ...], tuple[int, ...]]:
        """Give each row its tokens, truncated at a stop token or a limit.

        Returns:
            Per row, for the trace: whether it is active, draft tokens accepted, tokens emitted.
        """
        emitted, accepted = [], []
        for b, row in enumerate(self.rows):
            if row is None:
                emitted.append(0)
                accepted.append(0)
                continue
            kept = row.take(news.tokens[b], news.gaps[b], self.target.stop_ids)
            nodes, n_accepted = news.nodes[b], len(news.paths[b]) - 1
            action = "draft" if nodes else "skip"
            row.rounds.append((action, nodes, n_accepted, kept))
            emitted.append(kept)
            accepted.append(min(n_accepted, kept))
            if self.on_emission:
                self.on_emission(Emission(row.request, tuple(row.tokens[-kept:]), accepted[-1], action))
            if not row.finish and row.request.cancel is not None and row.request.cancel.is_set():
                row.finish = "cancelled"
        # Rows that are finished keep nothing: their cache is about to be released.
        self.paths = tuple(tuple(path) if row and not row.finish else () for path, row in zip(news.paths, self.rows))
        return tuple(row is not None for row in self.rows), tuple(accepted), tuple(emitted)

    def retire(self) -> None:
        """Hand out finished rows."""
        for b, row in enumerate(self.rows):
            if row and row.finish:
                self._finish(b)

    def _finish(self, b: int) -> None:
        row = self.rows[b]
        assert row is not None
        seconds = time.perf_counter() - row.started
        output = Output(row.request.id, row.tokens, row.finish, row.ttft, seconds, row.rounds, row.gaps, row.error)
        self.outputs[row.index] = output
        self.rows[b] = None
        self.target.release(self.state, b)
        if row.drafted:
            self.drafter.evict(b)
        if self.on_output:
            self.on_output(output)


def _limit(target: Target, request: Request) -> int:
    """Tokens a request may emit: its own limit, or what the context has room for (the last one needs no slot)."""
    return min(request.max_new_tokens, target.max_length - len(request.prompt) + 1)


def error_line(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Clock:
    """Phase borders without syncs: the host clock on a CPU, events on the stream of a GPU, resolved at the end.

    Args:
        device: of the target.
        keep: whether events will be resolved; without, a long run would only pile them up.
    """

    def __init__(self, device: torch.device, keep: bool) -> None:
        self.cuda, self.keep = device.type == "cuda", keep
        self.laps: list[tuple[Any, ...]] = []

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, start: Any, planned: Any, drafted: Any, verified: Any) -> tuple[float, float, float, float]:
        """Seconds of drafting, verification, commit and control (0 until they are resolved)."""
        end = self.mark()
        if not self.cuda:
            return drafted - planned, verified - drafted, end - verified, planned - start
        if self.keep:
            self.laps.append((start, planned, drafted, verified, end))
        return 0.0, 0.0, 0.0, 0.0

    def resolve(self, traces: list[StepTrace]) -> None:
        """Fill in what events say of the latest traces."""
        first = len(traces) - len(self.laps)
        for i, marks in enumerate(self.laps, first):
            marks[-1].synchronize()
            control, draft, verify, commit = (a.elapsed_time(b) / 1000 for a, b in pairwise(marks))
            traces[i] = replace(traces[i], control_s=control, draft_s=draft, verify_s=verify, commit_s=commit)
