"""Lookahead decoding: guesses of the future, revised in every target pass, leave n-grams behind, which are verified.

A window of W columns and N - 1 levels holds guesses. Level 0 is a line of text whose column 0 is the root; column i has
on its levels what the target chose to follow it there, level l being chosen N - 1 - l passes ago. A pass reads all of
the window: what the target chooses after the last level is a new one, level 0 goes, and each column leaves an n-gram
behind, its N tokens from level 0 to the new one. A pool keeps n-grams by their first token; those that begin with the
root are verified in the same pass.

The window is a tree, so the loop and its verifier need nothing new: level 0 is a chain from the root, and level l of
column i hangs below level l - 1 of that column. It attends to level 0 up to column i and to its own column up to level
l, and its position is i + l behind the root's, its depth: both as in the paper's window. Pooled n-grams are branches
from the root. Nodes with the same path are made one node: same context, same position, same logits. And where a guess
of the window itself proves right, it is accepted like any other node.

Source: Fu et al. 2024 (arXiv 2402.02057). Deviations: the window starts full of tokens drawn from the prompt, and
n-grams are kept as soon as these have left all levels but the first; the pool is first in, first out. As in the
authors' code the window moves on by one column a pass, however many tokens were accepted, and guesses are the target's
most likely tokens, also where the answer is sampled. Image placeholders are neither drawn nor kept.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mmspec.cache import upload
from mmspec.tree import from_parents, root_only
from mmspec.types import Forward, Plan, Request, Round, Target, Tree

ABSENT = -1
"""A pool's token where there is no n-gram yet."""


@dataclass(frozen=True)
class Config:
    """Settings: the paper's N, W and G.

    Args:
        ngram: tokens of an n-gram, the one it is looked up by included.
        window: columns.
        guesses: n-grams kept for each first token, and verified in a pass.
    """

    ngram: int = 5
    window: int = 7
    guesses: int = 7

    @property
    def depth(self) -> int:
        """Levels of the tree: the window's last column, or an n-gram."""
        return max(self.window_depth, self.ngram - 1)

    @property
    def budget(self) -> int:
        """Nodes of the tree, without the root."""
        return (self.window + self.guesses) * (self.ngram - 1) - 1

    @property
    def window_depth(self) -> int:
        """Levels of the window's part of the tree."""
        return self.window + self.ngram - 3

    @property
    def window_nodes(self) -> int:
        """Nodes of the window, without the root."""
        return self.window * (self.ngram - 1) - 1

    def __post_init__(self) -> None:
        if self.ngram < 2:
            raise ValueError(f"lade: ngram must be at least 2, got {self.ngram}")
        if self.window < 1 or self.guesses < 1:
            raise ValueError(f"lade: window and guesses must be at least 1, got {self.window} and {self.guesses}")


class LadeDrafter:
    """Lookahead decoding of a batch, all of it tensors on the device: no sync, and no work per node on the host.

    Memory: the pool is found by token id, 4 V (G (N - 1) + 1) bytes a row: 18 MB for V = 152k and the defaults.

    Args:
        config: see `Config`.
        target: vocabulary, image placeholder and device are its.

    A row whose plan has less depth or budget than the window needs keeps its window as it is for the round: pooled
    n-grams, which come last, are dropped first.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, config: Config, target: Target) -> None:
        self.config, self.target = config, target
        columns, levels, device = config.window, config.ngram - 1, target.device
        parents, depths = _topology(columns, levels, config.guesses)
        n_nodes = len(parents)
        lines = []
        for node in range(n_nodes):
            line = [node]
            while line[0]:
                line.insert(0, parents[line[0]])
            lines.append(line[1:] + [n_nodes] * (config.depth + 1 - len(line)))
        self.lines = torch.tensor(lines, device=device).T.contiguous()
        """[depth, nodes]: the nodes on the way from the root to each node, and n_nodes behind its end."""
        self.parents = torch.tensor(parents, device=device)
        self.depths = torch.tensor(depths, device=device)
        self.nodes = torch.arange(n_nodes, device=device)
        self.own = torch.tensor([-1, *range(1, n_nodes)], device=device)
        """Each node itself; -1 for the root, which hangs below nothing."""
        self.earlier = torch.ones(columns, columns, dtype=torch.bool, device=device).tril(-1)
        self.last_level = slice(columns * (levels - 1), columns * levels)
        self.passes: list[int | None] = []
        """Passes each row's window has been through; None where there is no row."""
        self.asked: tuple[Tensor, list[bool]] | None = None
        """Of the trees being verified: the nodes [B, W] that stand for the window's last level, and which rows have all
        of their window among them. None where no row has."""

    def open(self, max_batch: int, max_tokens: int) -> None:
        config, vocab, device = self.config, self.target.shape.vocab_size, self.target.device
        levels = config.ngram - 1
        # Row b's n-grams behind token t are at b V + t. One place more takes what is not to be kept.
        self.pool = torch.full(
            (max_batch * vocab + 1, config.guesses, levels), ABSENT, dtype=torch.int32, device=device
        )
        self.kept = torch.zeros(max_batch * vocab + 1, dtype=torch.int32, device=device)
        self.window = torch.zeros((max_batch, levels, config.window), dtype=torch.long, device=device)
        self.first = torch.arange(max_batch, device=device) * vocab
        self.behind = torch.full((max_batch, 1), ABSENT - 1, device=device)
        self.passes = [None] * max_batch
        self.asked = None

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        """Start a row: an empty pool, and a window drawn from the prompt's text with the request's own chance."""
        vocab, image = self.target.shape.vocab_size, self.target.image_token_id
        mine = slice(row * vocab, (row + 1) * vocab)
        self.pool[mine] = ABSENT
        self.kept[mine] = 0
        prompt = request.prompt
        text = prompt.input_ids[~prompt.visual & (prompt.input_ids != image)].tolist() or [(image + 1) % vocab]
        drawn = random.Random(request.key).choices(text, k=self.window[row].numel())
        self.window[row] = torch.tensor(drawn).view(self.window[row].shape).to(self.window.device)
        self.passes[row] = 0

    def evict(self, row: int) -> None:
        self.passes[row] = None

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        """Window and pooled n-grams of each row as one tree.

        Args:
            roots: [B] int64.
            plan: depth at least 1 to draft at all.
        """
        self.asked = None
        if plan.depth < 1 or max(plan.budget) < 1:
            return root_only(roots)
        config, n_nodes = self.config, len(self.nodes)
        self.window[:, 0, 0] = roots
        guesses = self.pool.index_select(0, self.first + roots)
        tokens = torch.cat([self.window.flatten(1), guesses.flatten(1), self.behind], 1)
        lines = tokens[:, self.lines]
        # The first node with the same path stands for a node: window before n-grams, so all of a window is represented.
        twins = (lines.unsqueeze(3) == lines.unsqueeze(2)).all(1).int().argmax(-1)
        tokens = tokens[:, :n_nodes]
        unused = (twins != self.own) | (tokens < 0)
        if plan.depth < config.depth:
            unused |= self.depths > plan.depth
        if min(plan.budget) < config.budget:
            unused |= self.nodes > upload(plan.budget, roots.device).unsqueeze(1)
        parents = twins[:, self.parents].masked_fill(unused, -1)
        n = min(max(plan.budget) + 1, n_nodes)
        if roots.device.type == "cpu":  # where looking costs nothing and every node does: no places for absent n-grams
            n = min(n, int(((parents >= 0).any(0) * self.nodes).max()) + 1)
        deep = plan.depth >= config.window_depth
        moves = [deep and budget >= config.window_nodes for budget in plan.budget]
        if any(moves):  # windows where there is no row may move too: then mostly all of them do, without a mask
            moves = [move or passes is None for move, passes in zip(moves, self.passes)]
            self.asked = twins[:, self.last_level], moves
        return from_parents(tokens[:, :n].clamp_min(0), parents[:, :n], min(plan.depth, config.depth))

    def observe(self, round: Round) -> None:
        """Give the windows that were read a new level, and keep the n-grams they have left."""
        if self.asked is None:
            return
        (nodes, moves), self.asked = self.asked, None
        logits, image = round.forward.logits, self.target.image_token_id
        chosen = logits.gather(1, nodes.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).argmax(-1)
        chosen = torch.where(chosen == image, self.window[:, -1], chosen)
        grams = torch.cat([self.window, chosen.unsqueeze(1)], 1)
        ripe = [passes is None or passes >= self.config.ngram - 2 for passes in self.passes]
        self._keep(grams.transpose(1, 2), [move and r for move, r in zip(moves, ripe)])
        moved = grams[:, 1:]
        if not all(moves):
            moved = torch.where(upload(moves, moved.device)[:, None, None], moved, self.window)
        self.window = moved.contiguous()
        self.passes = [None if n is None else n + move for n, move in zip(self.passes, moves)]

    def _keep(self, grams: Tensor, rows: list[bool]) -> None:
        """Put the n-grams that are new into the pool, in the order of columns; the oldest of a first token make room.

        Args:
            grams: [B, W, N] int64.
            rows: whose n-grams are to be kept.
        """
        G, nowhere = self.config.guesses, len(self.kept) - 1
        keys, rest = grams[..., 0], grams[..., 1:].int()
        places = self.first.unsqueeze(1) + keys
        held = self.pool[places]
        known = (held == rest.unsqueeze(2)).all(-1).any(-1)
        known |= ((grams.unsqueeze(2) == grams.unsqueeze(1)).all(-1) & self.earlier).any(-1)
        known |= keys == self.target.image_token_id
        if not all(rows):
            known |= ~upload(rows, known.device).unsqueeze(1)
        places = places.masked_fill(known, nowhere)
        rivals = (places.unsqueeze(2) == places.unsqueeze(1)) & ~known.unsqueeze(1)
        turns = (rivals & self.earlier).sum(-1)
        slots = (self.kept[places] + turns) % G
        self.kept.index_add_(0, places.flatten(), torch.ones_like(places, dtype=torch.int32).flatten())
        if keys.shape[1] > G:  # of more than G at once the last G stay, and no two are written to one slot
            places = places.masked_fill(turns < rivals.sum(-1) - G, nowhere)
        self.pool[places, slots] = rest


def _topology(columns: int, levels: int, guesses: int) -> tuple[list[int], list[int]]:
    """Parent and depth of each node: the window level by level, the root its first, then the n-grams one by one."""
    parents = [max(i - 1, 0) for i in range(columns)]
    parents += range((levels - 1) * columns)
    for start in range(len(parents), len(parents) + guesses * levels, levels):
        parents += [0, *range(start, start + levels - 1)]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return parents, depths


def make(config: Config, target: Target) -> LadeDrafter:
    """The method's drafter for a target."""
    return LadeDrafter(config, target)
