"""Steering over several turns. The definition: one unpadded row through a float64 copy of the model, whose block 0 (or 1) is
moved by a hook of our own at the tokens that a written-out rule names."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from steerl.rollout.analysis import steering_table
from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.ragged import left_pad, table
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.rollout.steering.helpers import policy, vector

FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "gpt_neox", "mistral")
SIX = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Token:
    """One token of an episode as the rules see it."""

    id: int
    kind: str
    """p: of the first prompt; a: the policy's; f: fed."""
    index: int
    prompt: int
    """Tokens of the first prompt."""
    step: int | None
    """The action that is predicted here."""
    next: int
    """The action that comes next."""


@dataclass(frozen=True)
class Row:
    """An episode by hand, with a strength and places of its own."""

    ids: list[int]
    kinds: str
    strength: float = 1.0
    places: tuple[int, ...] = (0,)

    @property
    def prompt(self) -> int:
        return self.kinds.count("p")

    @property
    def tokens(self) -> list[Token]:
        made = []
        for index, (token, kind) in enumerate(zip(self.ids, self.kinds, strict=True)):
            before = self.kinds[: index + 1].count("a")
            predicts = index + 1 < len(self.ids) and self.kinds[index + 1] == "a"
            made.append(Token(token, kind, index, self.prompt, before if predicts else None, before))
        return made


def rows_at_random(seed: int, count: int = 6) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for b in range(count):
        kinds = "p" * draw.randint(2, 7)
        for turn in range(1 if b == 0 else draw.randint(1, 4)):
            kinds += ("f" * draw.randint(1, 5) if turn else "") + "a" * draw.randint(1, 4)
        kinds += "f" * draw.choice((0, 0, 2)) if b else ""
        ids = [draw.randint(3, 60) for _ in kinds]
        prompt = kinds.count("p")
        rows.append(Row(ids, kinds, (0.0, 1.0, -1.5, 2.0)[(b + 1) % 4], tuple(draw.sample(range(prompt), draw.randint(1, 2)))))
    return rows


# scope of a spec, and the same as a function of a token and its row
Rule = Callable[[Token, Row], float]
SCOPES: dict[str, tuple[dict[str, Any], Rule]] = {
    "all": ({"steps": "all"}, lambda t, _: t.step is not None),
    "listed": ({"steps": [0, 2, 5]}, lambda t, _: t.step in (0, 2, 5)),
    "window": ({"steps": {"window": [2, 6]}}, lambda t, _: t.step in (2, 3, 4, 5)),
    "every": ({"steps": {"every": 3}}, lambda t, _: t.step in (0, 3, 6, 9, 12, 15)),
    "generated": ({"steps": "generated_positions"}, lambda t, _: t.step is not None and t.step > 0),
    "read": ({"prompt": "all", "steps": "none"}, lambda t, _: t.kind != "a"),
    "everywhere": ({"prompt": "all", "steps": "all"}, lambda t, _: 1),
    "read_and_some": ({"prompt": "all", "steps": [1, 4]}, lambda t, _: t.kind != "a" or t.step in (1, 4)),
    "last": ({"prompt": "last", "steps": "none"}, lambda t, _: t.index == t.prompt - 1),
    "numbers": ({"prompt": [0, -2], "steps": [1]}, lambda t, _: t.index in (0, t.prompt - 2) or t.step == 1),
    "prompt_window": ({"prompt": {"window": [1, -1]}, "steps": "none"}, lambda t, _: 1 <= t.index < t.prompt - 1),
    "column": ({"prompt": {"column": "at"}, "steps": "none"}, lambda t, row: t.index in row.places),
    "exclude": (
        {"prompt": "all", "steps": "all", "exclude": {"token_ids": list(range(20, 40)), "positions": [1, -1]}},
        lambda t, _: not 20 <= t.id < 40 and t.index not in (1, t.prompt - 1),
    ),
    "ramp": (
        {"steps": "all", "ramp": {"over": 5, "from": 1.0, "to": 0.25}},
        lambda t, _: 0 if t.step is None else 1.0 - 0.15 * min(t.step, 5),
    ),
    "ramp_on_what_is_read": (
        {"prompt": "all", "steps": [2], "ramp": {"over": 5, "from": 0.5, "to": 1.5}},
        lambda t, _: 0.5 + 0.2 * min(t.next, 5) if t.kind != "a" or t.step == 2 else 0,
    ),
}


@functools.cache
def exact(family: str) -> nn.Module:
    core = copy.deepcopy(policy(family).core)
    return core if family in ("xglm", "mixtral", "qwen3_moe") else core.double()  # which do not run in float64


def block(core: Any, layer: int) -> nn.Module:
    stack = getattr(core, "model", None) or getattr(core, "transformer", None) or core.gpt_neox
    stack = getattr(stack, "decoder", stack)
    return getattr(stack, "layers", None)[layer] if hasattr(stack, "layers") else stack.h[layer]


def by_hand(family: str | nn.Module, ids: list[int], moves: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, block 0's output before its move) of a whole row, its blocks' outputs moved by `moves[layer]` (T, D). `family`:
    or a float64 model."""
    core, seen = exact(family) if isinstance(family, str) else family, []

    def hook(layer: int) -> Any:
        def moved(_: nn.Module, __: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            if layer == 0:
                seen.append(hidden[0])
            new = hidden + moves[layer] if layer in moves else hidden
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return moved

    handles = [block(core, layer).register_forward_hook(hook(layer)) for layer in (0, 1)]
    try:
        return core(torch.tensor([ids]), use_cache=False).logits[0], seen[0]
    finally:
        for handle in handles:
            handle.remove()


def moved_by(rule: Rule, row: Row, added: Tensor) -> Tensor:
    factors = torch.tensor([float(rule(token, row)) for token in row.tokens], dtype=torch.float64)
    return row.strength * factors[:, None] * added.double()


def steered(family: str, *sites: dict[str, Any]) -> Steering:
    return Steering(policy(family).model, {"sites": list(sites)}, policy(family).tokenizer)


def site(where: dict[str, Any], layer: int = 0, seed: int = 0, **fields: Any) -> dict[str, Any]:
    given = {"vector": vector(seed), "strength": {"column": "s"}, **fields}
    return {"name": f"s{layer}{seed}", "at": {"layers": [layer]}, "where": where, **given}


def recorded(steering: Steering, rows: list[Row]) -> Applied:
    """How the rows are steered: found on the first prompts, as the first turn finds it."""
    _, mask_BP = left_pad([row.ids[: row.prompt] for row in rows])
    columns = {"s": [row.strength for row in rows], "at": [list(row.places) for row in rows]}
    return steering.applied(mask_BP, torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64), columns)


def rollout_of(steering: Steering, rows: list[Row], applied: Applied) -> Rollout:
    return Rollout.of_ids(
        [row.ids[: row.prompt] for row in rows],
        [row.ids[row.prompt :] for row in rows],
        action_mask_BR=[[kind == "a" for kind in row.kinds[row.prompt :]] for row in rows],
        steering=steering.label,
        **applied._asdict(),
    )


def forced(family: str, steering: Steering, rows: list[Row], applied: Applied) -> list[dict[int, float]]:
    """Of each row the log-prob of every action, by its place in the row."""
    logprobs_BR = teacher_forced(policy(family), rollout_of(steering, rows, applied), steering=steering).logprobs_BR
    actions = [[i for i, kind in enumerate(row.kinds) if kind == "a"] for row in rows]
    return [{i: float(logprobs_BR[b, i - rows[b].prompt]) for i in places} for b, places in enumerate(actions)]


def continued(
    family: str, steering: Steering, rows: list[Row], applied: Applied, seed: int, in_pieces: bool = True
) -> list[dict[int, float]]:
    """The same of one turn of each row, whichever, as it is drawn: its context in one or two calls, then token by token; a row
    whose turn has ended stays a while, and then leaves."""
    draw, core = random.Random(seed), policy(family).core
    starts = [draw.choice([i for i, k in enumerate(row.kinds) if k == "a" and row.kinds[i - 1] != "a"]) for row in rows]
    ends = [next((i for i in range(start, len(row.ids)) if row.kinds[i] != "a"), len(row.ids)) for row, start in zip(rows, starts, strict=True)]  # fmt: skip
    ids_BP, mask_BP = left_pad([row.ids[:start] for row, start in zip(rows, starts, strict=True)])
    drawn = [[kind == "a" for kind in row.kinds[:start]] for row, start in zip(rows, starts, strict=True)]
    row_B, cache = torch.arange(len(rows)), DynamicCache()
    found: list[dict[int, float]] = [{} for _ in rows]
    with steering.active(
        prompt_mask_BP=mask_BP,
        row_B=row_B,
        sample_B=torch.zeros_like(row_B),
        applied=applied,
        drawn_BP=table(drawn, torch.bool, "left"),
    ) as active:
        half = ids_BP.shape[1] // 2 if in_pieces and draw.random() < 0.5 else 0
        for start, end in ((0, half), (half, ids_BP.shape[1])):
            if start < end:
                place_BP = (mask_BP.long().cumsum(1) - 1).clamp_min(0)[:, start:end]
                logits = core(
                    ids_BP[:, start:end], attention_mask=mask_BP[:, :end].long(), position_ids=place_BP, past_key_values=cache
                ).logits
        kept = list(range(len(rows)))
        for t in range(max(end - start for start, end in zip(starts, ends, strict=True))):
            law_BV = logits[:, -1].log_softmax(-1)
            for at, b in enumerate(kept):
                if starts[b] + t < ends[b]:
                    found[b][starts[b] + t] = float(law_BV[at, rows[b].ids[starts[b] + t]])
            alive = [at for at, b in enumerate(kept) if starts[b] + t + 1 < ends[b]]
            if not alive:
                break
            if len(alive) <= len(kept) // 2:
                active.select(alive)
                cache.batch_select_indices(torch.tensor(alive))
                kept, mask_BP = [kept[at] for at in alive], mask_BP[alive]
            token_B1 = torch.tensor([[rows[b].ids[min(starts[b] + t, ends[b] - 1)]] for b in kept])
            mask_BP = torch.cat([mask_BP, torch.ones(len(kept), 1, dtype=torch.bool)], dim=1)
            logits = core(
                token_B1,
                attention_mask=mask_BP.long(),
                position_ids=mask_BP.long().sum(1, keepdim=True) - 1,
                past_key_values=cache,
            ).logits
    return found


def check(found: list[dict[int, float]], rows: list[Row], logits: list[Tensor], whole: bool) -> None:
    for row, got, expected in zip(rows, found, logits, strict=True):
        law = expected.log_softmax(-1)
        assert got and (not whole or len(got) == row.kinds.count("a"))
        for i, value in got.items():
            assert abs(value - float(law[i - 1, row.ids[i]])) < 1e-5, (row, i, value, float(law[i - 1, row.ids[i]]))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_edited_tokens_are_those_of_the_rule(scope: str) -> None:
    where, rule = SCOPES[scope]
    steering = steered("llama", site(where))
    for seed in range(3):
        rows = rows_at_random(seed)
        applied, added = recorded(steering, rows), torch.tensor(vector(0))
        logits = [by_hand("llama", row.ids, {0: moved_by(rule, row, added)})[0] for row in rows]
        plain = [by_hand("llama", row.ids, {})[0] for row in rows]
        assert max(float((a - b).abs().max()) for a, b in zip(logits, plain, strict=True)) > 0.1
        check(forced("llama", steering, rows, applied), rows, logits, whole=True)
        check(continued("llama", steering, rows, applied, seed), rows, logits, whole=False)
        shown = steering_table.applied(policy("llama"), steering, rollout_of(steering, rows, applied))["s00"]
        for row, strength_S in zip(rows, shown, strict=True):
            width, most = max(r.prompt for r in rows), max(len(r.ids) - r.prompt for r in rows)
            first = width - row.prompt
            wanted = [row.strength * float(rule(token, row)) for token in row.tokens]
            ends = len(row.ids) - row.prompt < most  # what ends a shorter row is run with the others, for nothing
            real = len(row.ids) - 1 - (1 if ends and row.kinds[-1] == "a" else 0)
            torch.testing.assert_close(strength_S[first : first + real], torch.tensor(wanted[:real]), atol=1e-6, rtol=0.0)


def test_the_table_and_the_counts_know_the_steps() -> None:
    rows = [Row([5, 6, 7, 8, 9, 10, 11, 12, 13], "pppaaffaa"), Row([5, 6, 7, 8], "ppaa")]
    steering = steered("llama", site({"prompt": "last", "steps": [0, 2, 3]}, strength=2.0))
    rollout = rollout_of(steering, rows, recorded(steering, rows))
    lines = [line.split() for line in steering_table.table(policy("llama"), steering, rollout).splitlines()[1:]]
    assert [line[2] if len(line) == 4 else "" for line in lines] == ["", "", "0", "1", "", "", "2", "3", "4"]
    assert [line[-1] == "2.000" for line in lines] == [False, False, True, False, False, False, True, True, False]
    assert steering_table.edits_per_row(steering, rollout).tolist() == [
        3,
        2,
    ]  # the shorter one's last token is run with the others


def test_vectors_learn_from_every_turn() -> None:
    """The gradient of a trained vector, over rows of several turns, against autograd through hooks of our own."""
    where, rule = SCOPES["read_and_some"]
    steering = Steering(policy("llama").model, {"role": "trainable", "sites": [site(where, strength=0.7)]}, seed=1)
    rows = rows_at_random(4)
    with torch.enable_grad():
        rollout = rollout_of(steering, rows, recorded(steering, rows))
        (parameter,) = steering.parameters_module.parameters()
        teacher_forced(policy("llama"), rollout, steering=steering).logprobs_BR.sum().backward()
        own, total = torch.tensor(vector(0), dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64)
        for row in rows:
            factors = torch.tensor([[0.7 * float(rule(token, row))] for token in row.tokens], dtype=torch.float64)
            law = by_hand("llama", row.ids, {0: factors * own})[0].log_softmax(-1)
            total = total + sum(law[i - 1, row.ids[i]] for i, kind in enumerate(row.kinds) if kind == "a")
        total.backward()
    assert parameter.grad is not None and own.grad is not None and float(own.grad.abs().max()) > 1.0
    torch.testing.assert_close(parameter.grad.flatten().double(), own.grad, rtol=1e-4, atol=1e-4)


def test_drawn_columns_are_those_of_the_prompt() -> None:
    steering, ids = steered("llama", site({"steps": "all"}, strength=1.0)), torch.tensor([[5, 6, 7]])
    for mask_BP in (None, torch.ones(1, 4)):
        with (
            pytest.raises(UserError, match=r"drawn_BP has shape \(1, 3\); give it beside"),
            steering.active(prompt_mask_BP=mask_BP, drawn_BP=ids > 6),
        ):
            policy("llama").core(ids)


@SIX
def test_every_family_steers_several_sites(family: str) -> None:
    scopes = ("read_and_some", "ramp", "numbers")
    steering = steered(family, *(site(SCOPES[scope][0], k % 2, k) for k, scope in enumerate(scopes)))
    rows = rows_at_random(7)
    applied = recorded(steering, rows)
    logits = []
    for row in rows:
        moves = [moved_by(SCOPES[scope][1], row, torch.tensor(vector(k))) for k, scope in enumerate(scopes)]
        logits.append(by_hand(family, row.ids, {0: moves[0] + moves[2], 1: moves[1]})[0])
    check(forced(family, steering, rows, applied), rows, logits, whole=True)
    check(continued(family, steering, rows, applied, 1), rows, logits, whole=False)


@pytest.mark.parametrize("on", ["prompt_mean", "prompt_last", "token"])
def test_gates_read_the_first_prompt_or_the_token(on: str) -> None:
    condition = torch.tensor(vector(9), dtype=torch.float64)
    gate = {"type": "sigmoid", "scale": 5, "vector": vector(9), "layer": 0, "on": on}
    steering = steered("llama", site({"prompt": "all", "steps": "all"}, 1, gate=gate))
    for seed in range(3):
        rows, logits = rows_at_random(seed), []
        for row in rows:
            _, hidden = by_hand("llama", row.ids, {})
            read = {"prompt_mean": hidden[: row.prompt].mean(0, keepdim=True), "prompt_last": hidden[row.prompt - 1][None]}
            open_T1 = torch.sigmoid(5 * torch.cosine_similarity(read.get(on, hidden), condition))[:, None]
            moves = open_T1 * moved_by(lambda *_: 1, row, torch.tensor(vector(0)))
            logits.append(by_hand("llama", row.ids, {1: moves})[0])
        applied = recorded(steering, rows)
        check(forced("llama", steering, rows, applied), rows, logits, whole=True)
        check(continued("llama", steering, rows, applied, seed, in_pieces=on == "token"), rows, logits, whole=False)


def test_noise_is_keyed_by_the_place_in_the_row() -> None:
    """What is added at a token is what is added at that place of a row of one turn, all of which is prompt."""
    steering = steered("llama", site({"prompt": "all", "steps": [1, 3]}, op={"type": "noise"}, vector=None))
    rows = rows_at_random(5)
    applied, logits = recorded(steering, rows), []
    noise: list[Tensor] = []
    for b, row in enumerate(rows):
        layer, seen = policy("llama").core.model.layers[0], []
        handle = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0].double()))
        ids, row_B = torch.tensor([row.ids]), torch.tensor([b])
        one = Applied(
            torch.ones(1, 1), applied.positions_BKN[b : b + 1], applied.policy_step_B[b : b + 1], applied.steering_seed
        )
        policy("llama").core(ids)
        with steering.active(prompt_mask_BP=torch.ones_like(ids), row_B=row_B, sample_B=torch.zeros_like(row_B), applied=one):
            policy("llama").core(ids)
        handle.remove()
        noise.append(seen[1] - seen[0])
        logits.append(
            by_hand("llama", row.ids, {0: moved_by(lambda t, _: t.kind != "a" or t.step in (1, 3), row, noise[b])})[0]
        )
    check(forced("llama", steering, rows, applied), rows, logits, whole=True)
    check(continued("llama", steering, rows, applied, 2), rows, logits, whole=False)
