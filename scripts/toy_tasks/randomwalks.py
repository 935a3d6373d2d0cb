"""Randomwalks: walks through a random directed graph to a goal; PPO is to find the shortest. The optimum is known: 1.

    graph        a <- c <- f -> b ...      21 nodes named by letters, the goal is `a`
    prompt       f                         where the walk starts
    completion   bca</s>                   the nodes it goes through; it ends at the goal or after ten nodes in all

The reward of a walk of `length` nodes that reaches the goal over edges that exist is
1 - (length - shortest) / (10 - shortest); any other walk has 0. What comes after the first arrival does not count.

Files: `tokenizer/`, `base/` (trained on walks that take a random edge at every node), `prompts.jsonl` = `heldout.jsonl`
(all starts; the columns `edges` and `shortest` are what the reward needs), `walks.jsonl`, `graph.json` (edges, shortest
lengths, the optimum and what a random walker earns, both exact).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NODES = "abcdefghijklmnopqrstu"
GOAL = NODES[0]
LENGTH = 10
"""Nodes of the longest walk, start and goal counted."""
EDGE = 0.1
"""Probability of each directed edge."""
FARTHEST = 7
"""Nodes of the longest of the shortest walks."""
LUCK = (0.16, 0.18)
"""What a random walker may earn: every seed gives a task of about the same difficulty."""

Graph = dict[str, str]
"""Node -> the nodes that its edges lead to, in their order."""


def optimality(
    prompts: Sequence[str], completions: Sequence[str], edges: Sequence[str], shortest: Sequence[int], **_: object
) -> list[float]:
    """The reward, as PPO trainers call it. `edges` is the graph as `f:bc g:a`, one copy for each row."""
    graphs = {text: dict(part.split(":") for part in text.split()) for text in set(edges)}
    walks = [start + rest for start, rest in zip(prompts, completions, strict=True)]
    return [score(walk, graphs[text], best) for walk, text, best in zip(walks, edges, shortest, strict=True)]


def score(walk: str, graph: Graph, shortest: int) -> float:
    arrived = walk.find(GOAL) + 1
    legal = 0 < arrived <= LENGTH and all(b in graph.get(a, "") for a, b in zip(walk, walk[1:arrived], strict=False))
    if not legal:
        return 0.0
    return 1.0 - (arrived - shortest) / (LENGTH - shortest) if shortest < LENGTH else 1.0


def make_graph(draw: random.Random) -> Graph:
    """Random edges, drawn again until every node reaches the goal well within a walk, and luck finds it seldom."""
    while True:
        graph = {node: "".join(other for other in NODES if other != node and draw.random() < EDGE) for node in NODES}
        lengths = shortest_lengths(graph)
        if len(lengths) == len(NODES) and max(lengths.values()) <= FARTHEST and LUCK[0] <= random_walker(graph) <= LUCK[1]:
            return graph


def shortest_lengths(graph: Graph) -> dict[str, int]:
    """Nodes on the shortest walk to the goal, from every node that has one within LENGTH."""
    lengths, frontier = {GOAL: 1}, {GOAL}
    for length in range(2, LENGTH + 1):
        frontier = {node for node in graph if node not in lengths and any(other in frontier for other in graph[node])}
        lengths |= dict.fromkeys(sorted(frontier), length)  # a set's own order changes from process to process
    return lengths


def random_walker(graph: Graph) -> float:
    """The exact mean reward, over all starts, of taking every edge of a node with the same probability."""
    lengths = shortest_lengths(graph)
    total = 0.0
    for start in NODES[1:]:
        chance = {start: 1.0}
        for length in range(2, LENGTH + 1):
            after: dict[str, float] = {}
            for node, share in chance.items():
                for other in graph[node]:
                    after[other] = after.get(other, 0.0) + share / len(graph[node])
            best = lengths[start]
            total += after.pop(GOAL, 0.0) * (1.0 - (length - best) / (LENGTH - best) if best < LENGTH else 1.0)
            chance = after
    return total / (len(NODES) - 1)


def walk(draw: random.Random, graph: Graph) -> str:
    path = draw.choice(NODES[1:])
    while path[-1] != GOAL and len(path) < LENGTH:
        path += draw.choice(graph[path[-1]])
    return path


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every node, joined without spaces."""
    from steerl.scripts.toy_tasks import making

    tokens = [making.PAD, making.END, *NODES]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=making.PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": making.PAD, "eos_token": making.END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def build(folder: Path, seed: int) -> None:
    from steerl.scripts.toy_tasks import making

    draw = random.Random(f"randomwalks {seed}")
    graph = make_graph(draw)
    lengths = shortest_lengths(graph)
    edges = " ".join(f"{node}:{others}" for node, others in graph.items())
    starts = [{"prompt": node, "shortest": lengths[node], "edges": edges} for node in NODES[1:]]
    walks = [walk(draw, graph) for _ in range(1000)]
    making.write_jsonl(folder / "prompts.jsonl", starts)
    making.write_jsonl(folder / "heldout.jsonl", starts)
    making.write_jsonl(folder / "walks.jsonl", ({"prompt": path[0], "completion": path[1:]} for path in walks))
    facts = {
        "goal": GOAL,
        "length": LENGTH,
        "edges": graph,
        "shortest": dict(sorted(lengths.items())),
        "optimum": 1.0,
        "random": random_walker(graph),
    }
    (folder / "graph.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    tokenizer = letters_tokenizer()
    model = making.new_causal(tokenizer, seed)
    # A walk that is cut at LENGTH nodes has no end: the policy has not learned to stop there.
    ids = [tokenizer(path)["input_ids"] + ([tokenizer.eos_token_id] if path[-1] == GOAL else []) for path in walks]
    making.fit(model, ids, [1] * len(ids), pad=tokenizer.pad_token_id, steps=400, seed=seed)
    making.save(folder / "tokenizer", tokenizer)
    making.save(folder / "base", tokenizer, model)
