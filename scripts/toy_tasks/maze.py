"""Maze: find the key, then the exit, told at every step what can be seen. Episodes of five to ten turns, texts alone.

    prompt     attic : east south
    turn       east</s>
    told       cellar : south west key
    turn       south</s>             ... to the exit, with the key; ten turns at most

The maze is the same for every row, twelve rooms; where a row starts is not. The policy is told the name of a room, its doors
and what lies there: whether it has the key it must know by itself. The exit with the key earns 1 and ends the episode, nothing
else earns anything. What is no door there leads nowhere, and the turn is gone. The policy has learned to walk: at random, but
for a step now and then that is no step, and one that is right.

Files: `tokenizer/`, `base/`, `environment.py` (what the policy walks in), `prompts.jsonl` (a row for every start: prompt, start
and the maze), `heldout.jsonl` (the same, twenty times), `maze.json` (its doors, the shortest walks).
"""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path

ROOMS = ("attic", "cellar", "kitchen", "hall", "library", "bedroom", "garage", "garden", "tower", "chapel", "pantry", "studio")
WIDE, HIGH = 4, 3
STEPS = {"north": -WIDE, "south": WIDE, "west": -1, "east": 1}
TURNS = 10
SHORTEST = (5, 8)
"""Steps that the best walk takes, from every start: by way of the key."""
OPEN = 0.3
"""Share of walls that are opened beside those that make all rooms one."""
KNOWS, SLIPS = 0.25, 0.1
"""Shares of the steps that it learned from: right ones, and words that are no step."""
OTHER = ("sit", "look", "wait")

Doors = dict[str, dict[str, str]]
"""Room -> step -> the room that it leads to."""


class Maze:
    """A walk through rooms: what is seen, what a step earned, and whether it is over."""

    def reset(self, row: dict[str, str]) -> str:
        self.doors, self.key, self.exit = json.loads(row["doors"]), row["key"], row["exit"]
        self.room, self.has_key, self.left = row["start"], False, False
        return self.seen()

    def step(self, completion: str) -> tuple[str, float, bool]:
        step = completion.strip()
        self.room = self.doors[self.room].get(step, self.room)
        self.has_key = self.has_key or self.room == self.key
        self.left = self.has_key and self.room == self.exit
        return self.seen(), float(self.left), self.left

    def seen(self) -> str:
        here = ["exit"] * (self.room == self.exit) + ["key"] * (self.room == self.key and not self.has_key)
        return " ".join([self.room, ":", *self.doors[self.room], *here])


def make_maze(draw: random.Random) -> tuple[Doors, str, str]:
    """Doors, the key's room and the exit: drawn again until the best walk from every start is neither short nor too long."""
    while True:
        names = draw.sample(ROOMS, len(ROOMS))
        walls = [(a, a + d) for a in range(len(names)) for d in (1, WIDE) if a + d < len(names) and (d > 1 or (a + 1) % WIDE)]
        draw.shuffle(walls)
        group, doors = list(range(len(names))), Doors({name: {} for name in names})
        for a, b in walls:
            if group[a] != group[b] or draw.random() < OPEN:
                group = [group[a] if each == group[b] else each for each in group]
                ways = ("south", "north") if b - a == WIDE else ("east", "west")
                doors[names[a]][ways[0]], doors[names[b]][ways[1]] = names[b], names[a]
        key, out = draw.sample(names, 2)
        to_key, to_exit = distances(doors, key), distances(doors, out)
        best = [to_key[name] + to_exit[key] for name in starts(doors, key, out)]
        if min(best) >= SHORTEST[0] and max(best) <= SHORTEST[1]:
            return {name: {way: doors[name][way] for way in STEPS if way in doors[name]} for name in names}, key, out


def starts(doors: Doors, key: str, out: str) -> list[str]:
    return [name for name in sorted(doors) if name not in (key, out)]


def distances(doors: Doors, goal: str) -> dict[str, int]:
    """Steps from every room to the goal."""
    found, frontier = {goal: 0}, [goal]
    for room in frontier:
        for other in doors[room].values():
            if other not in found:
                found[other] = found[room] + 1
                frontier.append(other)
    return found


def walk(draw: random.Random, row: dict[str, str]) -> list[str]:
    """What is seen, said, seen, said ...: a walk that it learns from."""
    maze = Maze()
    said, doors = [maze.reset(row)], json.loads(row["doors"])
    for _ in range(TURNS):
        goal = distances(doors, row["exit" if maze.has_key else "key"])
        right = min(doors[maze.room], key=lambda way: goal[doors[maze.room][way]])
        luck = draw.random()
        step = right if luck < KNOWS else draw.choice(OTHER) if luck < KNOWS + SLIPS else draw.choice(list(doors[maze.room]))
        seen, _, done = maze.step(step)
        said += [step, seen]
        if done:
            break
    return said[:-1]


def build(folder: Path, seed: int) -> None:
    from steerl.scripts.toy_tasks import making

    draw = random.Random(f"maze {seed}")
    doors, key, out = make_maze(draw)
    shared = {"key": key, "exit": out, "doors": json.dumps(doors)}
    rows = [{"start": start, **shared} for start in starts(doors, key, out)]
    rows = [{"prompt": Maze().reset(row), **row} for row in rows]
    making.write_jsonl(folder / "prompts.jsonl", rows)
    making.write_jsonl(folder / "heldout.jsonl", rows * 20)
    to_key, beyond = distances(doors, key), distances(doors, out)[key]
    shortest = {row["start"]: to_key[row["start"]] + beyond for row in rows}
    facts = {"doors": doors, "key": key, "exit": out, "shortest": shortest, "turns": TURNS}
    (folder / "maze.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    source = f'"""What the policy walks in."""\n\nimport json\n\n\n{inspect.getsource(Maze)}'
    (folder / "environment.py").write_text(source, encoding="utf-8")

    tokens = [making.PAD, making.END, ":", "key", "exit", *STEPS, *OTHER, *ROOMS]
    tokenizer = making.words_tokenizer(tokens)
    making.save(folder / "tokenizer", tokenizer)
    ids, known = [], []
    for _ in range(2000):
        said = walk(draw, draw.choice(rows))
        pieces = [[*tokenizer.encode(text), *([tokenizer.eos_token_id] if i % 2 else [])] for i, text in enumerate(said)]
        ids.append([token for piece in pieces for token in piece])
        known.append(len(pieces[0]))
    model = making.new_causal(tokenizer, seed)
    making.fit(model, ids, known, pad=tokenizer.pad_token_id, steps=150, seed=seed, batch=32)
    making.save(folder / "base", tokenizer, model)
