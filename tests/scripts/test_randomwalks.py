"""The randomwalks world: shortest lengths, the optimum and the random walker's reward against plain enumeration."""

from __future__ import annotations

import json
import random

import pytest
import torch

from steerl.scripts.toy_tasks import randomwalks


@pytest.fixture(scope="module")
def world(tiny_world):
    return tiny_world("randomwalks")


def walks(graph, path):
    """Every legal walk from `path` that ends at its first arrival, or at the limit, with a random walker's chance of it."""
    if path[-1] == "a" or len(path) == 10:
        yield path, 1.0
        return
    for other in graph[path[-1]]:
        for whole, chance in walks(graph, path + other):
            yield whole, chance / len(graph[path[-1]])


@pytest.mark.parametrize("seed", range(3))
def test_shortest_optimum_and_random_walker_equal_enumeration(seed):
    graph = randomwalks.make_graph(random.Random(seed))
    lengths, earned, best = randomwalks.shortest_lengths(graph), 0.0, 0.0
    for start in "bcdefghijklmnopqrstu":
        every = list(walks(graph, start))
        shortest = min(len(path) for path, _ in every if path[-1] == "a")
        assert lengths[start] == shortest
        assert abs(sum(chance for _, chance in every) - 1) < 1e-12
        rewards = [1 - (len(p) - shortest) / (10 - shortest) if p[-1] == "a" else 0.0 for p, _ in every]
        edges = " ".join(f"{a}:{b}" for a, b in graph.items())
        found = randomwalks.optimality(
            [start] * len(every), [p[1:] for p, _ in every], [edges] * len(every), [shortest] * len(every)
        )
        assert found == pytest.approx(rewards)
        earned += sum(reward * chance for reward, (_, chance) in zip(rewards, every, strict=True)) / 20
        best += max(rewards) / 20
    assert randomwalks.random_walker(graph) == pytest.approx(earned) and best == pytest.approx(1.0)


def test_broken_walks_earn_nothing_and_what_follows_the_goal_does_not_count():
    graph = {"a": "b", "b": "c", "c": "ab", "d": "d"}
    assert randomwalks.score("bca", graph, 3) == 1.0
    assert randomwalks.score("bcazz!", graph, 3) == 1.0
    assert randomwalks.score("bcbca", graph, 3) == pytest.approx(1 - 2 / 7)
    for walk in ("ba", "bc", "b", "bca"[::-1][1:], "dddddddddda", "b ca", "bcbcbcbcbca"):
        assert randomwalks.score(walk, graph, 3) == 0.0


def test_the_policy_walks_about_as_a_random_walker(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = json.loads((world / "graph.json").read_text())
    assert facts["optimum"] == 1.0 and 0.16 <= facts["random"] <= 0.18
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()] * 40
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    assert tokenizer("abc")["input_ids"] == [2, 3, 4] and tokenizer.decode([2, 3, 4]) == "abc"
    torch.manual_seed(0)
    ids = torch.tensor(tokenizer([row["prompt"] for row in rows])["input_ids"])
    out = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=10, attention_mask=torch.ones_like(ids))
    completions = tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)
    columns = {name: [row[name] for row in rows] for name in ("edges", "shortest")}
    rewards = torch.tensor(randomwalks.optimality([row["prompt"] for row in rows], completions, **columns))
    assert abs(rewards.mean().item() - facts["random"]) < 0.05


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    randomwalks.build(tmp_path, 0)
    for path in sorted(world.rglob("*")):
        if path.is_file() and path.name != "world.json":
            assert path.read_bytes() == (tmp_path / path.relative_to(world)).read_bytes(), path.name
