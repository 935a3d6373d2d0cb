"""Steering in a vLLM server: the plugin's hooks on a flat batch of a toy model, what is counted, what is refused."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.vllm.plugin.rows import Rows
from steerl.rollout.engines.vllm.plugin.steer import Steers
from steerl.rollout.engines.vllm.steering import ServerSteering
from steerl.rollout.engines.vllm.wire import Answer, Ask, Law
from steerl.rollout.ragged import left_pad, table
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.rollout.steering import helpers
from tests.rollout.steering import test_turns as turns

WIDTH, LAYERS = 32, 2
LAW = Law(Sampling(max_new_tokens=8), 64, (2,))


def vector(seed: int, width: int = WIDTH) -> list[float]:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).tolist()


def site(layer: int, seed: int, scope: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": f"s{seed}", "at": {"layers": [layer]}, "vector": vector(seed), "where": scope, **fields}


# -- without a server: the plugin on a flat batch ------------------------------------------------------------------------


class Block(nn.Module):
    """A block that changes nothing and gives its activation as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, hidden: Tensor) -> object:
        return hidden


class InTuple(Block):
    def forward(self, hidden: Tensor) -> object:
        return hidden, None


class InTwo(Block):
    """As vLLM's Llama: what is to be added, and the stream so far."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> object:
        whole = hidden if residual is None else hidden + residual
        share = torch.linspace(-1, 1, whole.shape[-1])
        return whole * share, whole * (1 - share)


class Stale(Block):
    """As vLLM's Cohere: the whole, and what it was made of."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> object:
        residual = hidden / 3
        return hidden, residual


class Flat(nn.Module):
    """Blocks over a flat batch whose activations are the tokens' embeddings."""

    def __init__(self, block: type[Block] = InTwo):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=WIDTH, is_encoder_decoder=False)
        self.layers = nn.ModuleList([block() for _ in range(LAYERS)])
        self.block = block

    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            if self.block is InTuple:  # with a batch of one row around it
                hidden, _ = layer(hidden[None])
                hidden = hidden[0]
            elif self.block is Block:
                hidden = layer(hidden)
            else:
                hidden, residual = layer(hidden, residual)
        return hidden + residual if self.block is InTwo else hidden


class Runner:
    """What the plugin reads of vLLM's model runner."""

    def __init__(self, model: nn.Module, prefix_caching: bool = False, eager: bool = True):
        self.model, self.device = model, torch.device("cpu")
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
            model_config=SimpleNamespace(enforce_eager=eager),
        )
        self.requests: dict[str, Any] = {}

    def get_model(self) -> nn.Module:
        return self.model

    def ask(self, ask: Ask, prompt: list[int]) -> str:
        params = SimpleNamespace(extra_args=ask.arguments(LAW))
        self.requests[ask.id] = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt)
        return ask.id

    def step(
        self, parts: list[tuple[str, int, int]], texts: dict[str, Any], pad: int = 0, of: Callable[..., Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Run (request, first, count) of each as one flat batch, with padding behind: what came out for each. `of` gives the
        activations of a text's part."""
        counts = [count for _, _, count in parts]
        starts = np.cumsum([0, *counts])
        self.input_batch = SimpleNamespace(
            num_reqs=len(parts),
            req_ids=[name for name, _, _ in parts],
            num_computed_tokens_cpu=np.array([first for _, first, _ in parts]),
        )
        self.query_start_loc = SimpleNamespace(np=starts)
        self.discard_request_mask = SimpleNamespace(np=np.zeros(len(parts), dtype=bool))
        given = [(of or embedding)(texts[name][first : first + count]) for name, first, count in parts]
        out = self.model(torch.cat([*given, torch.zeros(pad, WIDTH)]))
        return {name: out[a:b] for (name, _, _), a, b in zip(parts, starts, starts[1:], strict=False)}


def embedding(ids: list[int]) -> Tensor:
    return torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 + i)) for i in ids])


class Direct:
    """A client whose server is here."""

    def __init__(self, steers: Steers):
        self.steers = steers

    def rpc(self, method: str, *args: str, timeout: float = 0.0) -> list[Any]:
        assert method == "steerl_steer"
        return [json.loads(json.dumps(self.steers.receive(*args)))]


def sent(steering: ServerSteering, steers: Steers) -> None:
    with tempfile.TemporaryDirectory() as folder:
        steering.send(Direct(steers), Path(folder))


def server_steering(*sites: dict[str, Any], **fields: Any) -> ServerSteering:
    found = ServerSteering(Steering(helpers.policy("llama").model, {"sites": list(sites), **fields}))
    found.take(0)
    return found


def served(*steerings: ServerSteering, block: type[Block] = InTwo) -> tuple[Runner, Steers]:
    runner = Runner(Flat(block))
    steers = Steers(Rows(runner))
    steers.rows.version = 0  # it has weights
    for steering in steerings:
        sent(steering, steers)
    return runner, steers


# scope of a spec, and the same as a function of (position, step, length of the prompt, id)
SCOPES: list[tuple[dict[str, Any], Any]] = [
    ({"steps": "all"}, lambda r, s, p, i: s >= 0),
    ({"steps": {"window": [1, 3]}}, lambda r, s, p, i: 1 <= s < 3),
    ({"prompt": "all", "steps": [0, 2]}, lambda r, s, p, i: r < p or s == 2),
    ({"prompt": [0, -2], "steps": {"every": 2}}, lambda r, s, p, i: r in (0, p - 2) or (s >= 0 and s % 2 == 0)),
    ({"prompt": "all", "exclude": {"token_ids": [7], "positions": [1, -1]}}, lambda r, s, p, i: i != 7 and r not in (1, p - 1)),
]


@pytest.mark.parametrize("block", [Block, InTuple, InTwo, Stale])
def test_every_row_is_edited_by_its_own_steering_whatever_the_batch(block):
    """Prompts in pieces, a row that is thrown out and read again, plain rows between: the same edits, each counted once."""
    steerings = [server_steering(site(k % LAYERS, k, scope)) for k, (scope, _) in enumerate(SCOPES)]
    runner, steers = served(*steerings, block=block)
    texts = {f"row{k}": [5 + k, 7, 8, 9, 7, 11, 12, 13][: 5 + k % 3] for k in range(6)}
    lengths = {name: 3 + k % 2 for k, name in enumerate(texts)}
    rows = {}
    for k, (name, text) in enumerate(texts.items()):
        steering = {"steering": steerings[k].name, "strengths": (0.5 + k,)} if k < len(SCOPES) else {}
        runner.ask(Ask(name, 0, k, 0, **steering), text[: lengths[name]])
        rows[name] = steers.rows.of(name)
        rows[name].answer.ids = text[lengths[name] :]  # drawn so far
    whole = {name: (name, 0, len(text)) for name, text in texts.items()}
    orders = [
        [[whole[name] for name in texts]],
        [[("row2", 0, 2), whole["row4"]], [whole["row0"], ("row2", 2, 3), ("row1", 0, 4)], [("row1", 0, 6), ("row2", 5, 2)]],
    ]
    seen: dict[str, dict[int, Tensor]] = {name: {} for name in texts}
    for steps in orders:
        for parts in steps:
            out = runner.step(parts, texts, pad=2)
            for name, first, count in parts:
                seen[name] |= {first + i: out[name][i] for i in range(count)}
        for k, (name, text) in enumerate(texts.items()):
            base, length = embedding(text), lengths[name]
            for r, got in seen[name].items():
                on = k < len(SCOPES) and SCOPES[k][1](r, r - (length - 1), length, text[r])
                wanted = base[r] + (0.5 + k) * torch.tensor(vector(k)) if on else base[r]
                torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    for k, (name, text) in enumerate(texts.items()):
        on = [SCOPES[k][1](r, r - (lengths[name] - 1), lengths[name], i) for r, i in enumerate(text)] if k < len(SCOPES) else []
        assert rows[name].answer.edits == ([sum(on)] if k < len(SCOPES) else [])


@pytest.mark.parametrize("scope", turns.SCOPES)
def test_later_turns_are_edited_and_counted_by_the_rule(scope):
    """One turn of each row as a request of its own, whose prompt is all of the row before it: rows at first and later turns in
    one batch, read in pieces, one of them twice."""
    where, rule = turns.SCOPES[scope]
    steering = server_steering(turns.site(where, 1, 3))
    runner, steers = served(steering)
    rows = turns.rows_at_random(11, 8)
    applied = turns.recorded(steering.steering, rows)
    asked, texts, counts, chosen = {}, {}, [], []
    for b, row in enumerate(rows):
        runs = [(m.start(), m.end()) for m in re.finditer("a+", row.kinds)]
        turn = len(runs) - 1 if b % 2 else b % len(runs)
        start, end = runs[turn]
        part = turns.Row(row.ids[:end], row.kinds[:end], row.strength, row.places)
        chosen.append((part, start, runs[:turn]))
        runner.ask(Ask(f"row{b}", 0, b, 0, **steering.of_row(applied, b), turns=tuple(runs[:turn])), row.ids[:start])
        asked[f"row{b}"] = steers.rows.of(f"row{b}")
        asked[f"row{b}"].answer.ids, texts[f"row{b}"] = row.ids[start:end], row.ids[: end - 1]
    assert {len(before) for _, _, before in chosen} >= {0, 2, 3}
    for share in (0.5, 0.7):  # what the second call starts with has been read, and is not counted again
        cuts = {name: 1 + int(share * (len(text) - 1)) for name, text in texts.items()}
        pieces = [[(name, 0, cut) for name, cut in cuts.items()]]
        pieces.append([(name, cuts[name] - 1, len(text) - cuts[name] + 1) for name, text in texts.items()])
        for parts in pieces:
            out = runner.step(parts, texts)
            for b, (part, _, _) in enumerate(chosen):
                moved = embedding(part.ids) + turns.moved_by(rule, part, torch.tensor(vector(3))).float()
                for name, first, count in parts:
                    if name == f"row{b}":
                        torch.testing.assert_close(out[name], moved[first : first + count], rtol=0, atol=5e-6)
    for b, (part, _, _) in enumerate(chosen):
        counts.append(sum(bool(rule(token, part)) for token in part.tokens[:-1]) if part.strength else 0)
        assert asked[f"row{b}"].answer.edits == [counts[b]]
    contexts = [part.ids[:start] for part, start, _ in chosen]
    drawn = [[any(a <= i < e for a, e in before) for i in range(start)] for _, start, before in chosen]
    rollout = Rollout.of_ids(contexts, [part.ids[start:] for part, start, _ in chosen], **applied._asdict())
    answers = [Answer(edits=[count]) for count in counts]
    steering.check_edits(rollout, answers, table(drawn, torch.bool, "left"))
    answers[5] = Answer(edits=[counts[5] + 1])
    with pytest.raises(UserError, match=r"row 5 .* edited \d+ activations"):
        steering.check_edits(rollout, answers, table(drawn, torch.bool, "left"))


def test_what_a_row_is_fed_after_its_end_is_not_counted():
    """Where a law has no id that ends rows, vLLM goes on with one that has ended until its limit."""
    steering = server_steering(site(0, 1, {"prompt": "all"}))
    runner, steers = served(steering)
    runner.ask(Ask("a", 0, 0, 0, steering=steering.name, strengths=(1.0,)), [5, 6])
    runner.step([("a", 0, 2)], {"a": [5, 6]})
    row = steers.rows.of("a")
    row.answer.ids, row.ended = [7], True
    runner.step([("a", 2, 1)], {"a": [5, 6, 7]})
    assert row.answer.edits == [2]


def test_sites_of_one_layer_act_in_order_and_all_layers_are_counted():
    steering = server_steering(
        {"name": "one", "at": {"layers": "all"}, "vector": vector(1), "where": {"prompt": "all"}},
        {"name": "two", "at": {"layers": [-1]}, "op": {"type": "ablate"}, "vector": vector(1), "where": {"prompt": "all"}},
        {"name": "three", "at": {"layers": [0]}, "vector": vector(2), "where": {"prompt": {"column": "c"}, "steps": "none"}},
    )
    runner, steers = served(steering)
    runner.ask(Ask("a", 0, 0, 0, steering=steering.name, strengths=(2.0, 1.0, 1.0), positions=((), (), (1, 2))), [5, 6, 7, 8])
    out = runner.step([("a", 0, 4)], {"a": [5, 6, 7, 8]})["a"]
    one, two = torch.tensor(vector(1)), torch.tensor(vector(2))
    wanted = embedding([5, 6, 7, 8]) + 4 * one + torch.tensor([0, 1.0, 1, 0])[:, None] * two
    unit = one / one.norm()
    torch.testing.assert_close(out, wanted - (wanted @ unit)[:, None] * unit, rtol=0, atol=5e-6)
    assert steers.rows.of("a").answer.edits == [8, 4, 2]


KINDS = [kind for kind in helpers.OPERATIONS if kind != "function"]


@pytest.mark.parametrize("kind", [*KINDS, "trained adapter", "trained loreft"])
def test_every_operation_edits_as_in_process(kind, tmp_path):
    """The block's output of a steered pass of a real model, from the same output unsteered."""
    policy, texts, responses = helpers.policy("llama"), helpers.prompts(), [[20, 5, 22], [9, 24, 25], [14, 27, 33]]
    trained, kind = kind.startswith("trained"), kind.split()[-1]
    scope = list(helpers.SCOPES.values())[helpers.OPERATIONS.index(kind) % len(helpers.SCOPES)]
    strength = {"dist": "uniform", "low": -1.0, "high": 2.0}
    steering = server_steering(
        helpers.site(kind, tmp_path, where=scope, strength=strength), role="trainable" if trained else "policy"
    )
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in steering.steering.parameters_module.named_parameters():
                moved = 0.3 * torch.randn(parameter.shape, generator=generator)
                # A rotation is stored as reflections below its diagonal, and signs on it, which no gradient reaches.
                parameter.add_(moved.tril(-1) if name.endswith("rotation.original") else moved)
        steering.take(1)
    prompt_BP, mask_BP = left_pad(texts, 0)
    row_B, sample_B = torch.tensor([3, 1, 4]), torch.tensor([0, 1, 0])
    applied = steering.steering.applied(mask_BP, row_B, sample_B, policy_step=2)
    ids_BS = torch.cat([prompt_BP, torch.tensor(responses)], 1)
    mask_BS = torch.cat([mask_BP, torch.ones(3, 3, dtype=torch.bool)], 1)
    seen: list[Tensor] = []
    handle = policy.core.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        policy.core(ids_BS, attention_mask=mask_BS)
        with steering.steering.active(prompt_mask_BP=mask_BP, row_B=row_B, sample_B=sample_B, applied=applied):
            policy.core(ids_BS, attention_mask=mask_BS)
    handle.remove()
    plain, steered = ([whole[b][mask_BS[b]] for b in range(3)] for whole in seen)

    runner, steers = served(steering)
    for b in range(3):
        runner.ask(Ask(str(b), 9, int(row_B[b]), int(sample_B[b]), **steering.of_row(applied, b)), texts[b])
        steers.rows.of(str(b)).answer.ids = responses[b]
    out = runner.step([(str(b), 0, len(plain[b])) for b in (2, 0, 1)], {str(b): plain[b] for b in range(3)}, of=lambda x: x)
    moved = sum(len(steered[b]) - int(torch.isclose(steered[b], plain[b]).all(1).sum()) for b in range(3))
    assert moved > 0
    for b in range(3):
        torch.testing.assert_close(out[str(b)], steered[b], rtol=1e-5, atol=1e-5)


def test_a_trained_steering_goes_again_and_old_rows_keep_theirs():
    steering = server_steering(site(0, 1, {"prompt": "all"}), role="trainable")
    runner, steers = served(steering)
    first = steering.name
    with torch.no_grad():
        next(steering.steering.parameters_module.parameters()).mul_(3.0)
    steering.take(1)
    sent(steering, steers)
    assert steering.name != first
    texts = {"old": [5, 6], "new": [5, 6]}
    runner.ask(Ask("old", 0, 0, 0, steering=first, strengths=(1.0,)), [5, 6])
    runner.ask(Ask("new", 0, 0, 0, steering=steering.name, strengths=(1.0,)), [5, 6])
    out = runner.step([("old", 0, 2), ("new", 0, 2)], texts)
    torch.testing.assert_close(out["old"], embedding([5, 6]) + torch.tensor(vector(1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(out["new"], embedding([5, 6]) + 3 * torch.tensor(vector(1)), rtol=0, atol=1e-6)


# -- what stops a run -----------------------------------------------------------------------------------------------------


def steered_rollout(steering: ServerSteering) -> Rollout:
    """Two rows under the steering, of three and four response tokens."""
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    batch = Rollout.of_ids(prompts, [[3, 4, 5], [6, 7, 8, 9]], behaviour_logprobs_BR=[[0.0] * 3, [0.0] * 4],
                           policy_logprobs_BR=[[0.0] * 3, [0.0] * 4], ended_B=[True, True], row_B=[40, 41])  # fmt: skip
    applied = steering.steering.applied(batch.prompt_mask_BP, batch.row_B, batch.sample_B)
    return Rollout(**vars(batch) | applied._asdict() | {"steering": steering.steering.label})


def test_the_count_of_edits_is_what_the_spec_selects():
    """Of a row of P prompt tokens and R drawn ones P + R - 1 are fed, and R of them are steps."""
    everywhere = {"name": "a", "at": {"layers": "all"}, "vector": vector(1), "where": {"prompt": "all"}}
    steering = server_steering(everywhere, site(0, 2, {"steps": {"window": [1, 9]}}))
    rollout = steered_rollout(steering)
    good = [Answer(edits=[2 * 5, 2]), Answer(edits=[2 * 8, 3])]
    steering.check_edits(rollout, good)
    with pytest.raises(UserError, match=r"row 41 .*site 's2' .* edited 2 activations in the vLLM server, not 3"):
        steering.check_edits(rollout, [good[0], Answer(edits=[16, 2])])
    with pytest.raises(UserError, match=r"row 40 .*drawn without steering"):
        steering.check_edits(rollout, [Answer(), good[1]])


def test_a_row_whose_steering_the_server_was_not_sent_stops_the_run():
    steering = server_steering(site(0, 1, {"prompt": "all"}))
    runner, steers = served()
    rollout = steered_rollout(steering)
    asked = steering.of_row(rollout.applied, 0)
    runner.ask(Ask("a", 0, 40, 0, **asked), [5, 6, 7])
    other = server_steering(site(0, 3, {"prompt": "all"}))
    sent(other, steers)
    runner.step([("a", 0, 3)], {"a": [5, 6, 7]})
    with pytest.raises(UserError, match=f"row 40 .*never sent the steering {steering.name}"):
        steering.check_edits(rollout.select(torch.tensor([0])), [steers.rows.of("a").answer])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"at": {"layers": [0], "component": "attn_output"}}, r"sites\[0\]\.at\.component: attn_output"),
        ({"at": {"layers": [0], "head": [1]}, "vector": vector(1, 8)}, r"sites\[0\]\.at\.head: \[1\]"),
        ({"at": {"module": "model.layers.0.mlp"}}, r"sites\[0\]\.at\.module: model.layers.0.mlp"),
        ({"op": {"type": "collect"}, "vector": None}, r"sites\[0\]\.op: collect"),
        ({"gate": {"vector": vector(5), "layer": 0, "open_above": 0.1}, "at": {"layers": [1]}}, r"sites\[0\]\.gate: "),
    ],
)
def test_what_the_server_cannot_do_is_told_by_name(change, line):
    refused = server_steering(site(0, 1, {"prompt": "all"}) | change).refusals()
    assert len(refused) == 1
    with pytest.raises(UserError, match=line):
        raise UserError(*refused)


@pytest.mark.parametrize(
    ("runner", "line"),
    [
        (Runner(Flat(), prefix_caching=True), "--no-enable-prefix-caching"),
        (Runner(Flat(), eager=False), "--enforce-eager"),
    ],
)
def test_a_server_that_cannot_steer_says_so(runner, line):
    with pytest.raises(UserError, match=line):
        sent(server_steering(site(0, 1, {"prompt": "all"})), Steers(Rows(runner)))


def test_another_model_is_refused():
    model = Flat()
    model.config.hidden_size = 48
    with pytest.raises(UserError, match="2 blocks of width 48, and the trainer's 2 of 32"):
        sent(server_steering(site(0, 1, {"prompt": "all"})), Steers(Rows(Runner(model))))
