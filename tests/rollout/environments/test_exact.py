"""Episodes against a definition: a loop that plays one row by itself, a whole unpadded float64 pass for every token, with
hooks of its own for steering; and one such pass over the finished row for its numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding import compiled
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler, server_of
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.types import Answer
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import STOP_EOS, STOP_LENGTH, STOP_USER, Rollout, Samples
from tests import warm
from tests.models import FAMILIES, tiny_policy
from tests.rollout import definitions
from tests.rollout.engines.vllm.test_steering_server import CHUNKED
from tests.rollout.engines.vllm.test_steering_server import FAMILIES as WIDE
from tests.rollout.environments import ranks
from tests.rollout.environments.scripted import scripted
from tests.rollout.steering import test_turns as turns
from tests.rollout.steering.helpers import policy, vector
from tests.vllm_server import VllmServer, gentle

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.3},
    "truncated": {"top_k": 14, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "penalised": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[5, 6]]},
    "strings": {"stop": ["a", "no"], "top_p": 0.8},
    "everything": {"top_k": 20, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "stop": ["a", "no"], "stop_ids": [9, 10]},
}


def spec(width: int, **fields: Any) -> dict[str, Any]:
    sites = [
        turns.site(turns.SCOPES["read_and_some"][0], 0, 1, strength={"dist": "uniform", "low": 0.5, "high": 1.5}),
        turns.site(turns.SCOPES["ramp"][0], 1, 2, strength={"column": "s"}),
    ]
    return {"sites": [{**site, "vector": vector(1 + k, width)} for k, site in enumerate(sites)], **fields}


RULES = [(0, 1, turns.SCOPES["read_and_some"][1]), (1, 2, turns.SCOPES["ramp"][1])]
"""Layer, vector and rule of each of its sites."""
LIMITS = {"max_turns": 4, "max_tokens": 22, "max_tool_tokens": 4}
NEW = 6
"""Most tokens of a turn."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompts(count: int = 4) -> PromptBatch:
    ids = [[11 + (7 * i + k) % 40 for k in range(1 + 3 * i % 8)] for i in range(count)]
    columns: dict[str, list[object]] = {"s": [(0.0, 2.0, -1.0)[i % 3] for i in range(count)]}
    return PromptBatch(ids, [3 * i for i in range(count)], [" ".join(map(str, one)) for one in ids], [""] * count, columns)


def reply(row: dict[str, Any], said: Sequence[Any]) -> Answer:
    """The other side: what it says depends on all that it was told, and on the row; up to five tokens, of which four fit."""
    total = sum(int(word) for one in said for word in one.text.split()) + int(row["s"])
    if total % 7 == 0:
        return Answer(done=True)
    return Answer(content=" ".join(str(11 + (total + i) % 40) for i in range(total % 6)))


# -- the definition -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Alone:
    """One row by itself. `strengths`: of each site; none without steering."""

    family: Any
    """Or a float64 model."""
    settings: Any
    prompt: list[int]
    strengths: list[float]
    ids: list[int] = field(default_factory=list)
    """Of the response, as is `kinds`."""
    kinds: str = ""
    stop: int = STOP_LENGTH

    def logits(self, ids: list[int], kinds: str, plain: bool = False) -> Tensor:
        """(T, V) of a whole row, whose last token is not read."""
        row = turns.Row(self.prompt + ids, "p" * len(self.prompt) + kinds)
        width = 32 if isinstance(self.family, str) else self.family.config.hidden_size
        moves = {
            layer: strength * turns.moved_by(rule, row, torch.tensor(vector(seed, width)))[:-1]
            for (layer, seed, rule), strength in zip(RULES, self.strengths, strict=False)
        }
        if plain or not moves:
            core = turns.exact(self.family) if isinstance(self.family, str) else self.family
            return core(torch.tensor([row.ids[:-1]]), use_cache=False).logits[0]
        return turns.by_hand(self.family, row.ids[:-1], moves)[0]

    def play(self, uniform: Callable[[int], float], data: dict[str, Any]) -> Alone:
        text = policy(self.family).tokenizer.decode
        said: list[Any] = []
        while True:
            turn: list[int] = []
            limit = min(NEW, LIMITS["max_tokens"] - len(self.ids))
            while True:
                t = len(self.ids)
                logits = self.logits([*self.ids, 0], self.kinds + "a")[-1].tolist()
                law = definitions.log_softmax(definitions.law(logits, self.prompt + self.ids, self.settings))
                masses = list(itertools.accumulate(math.exp(logprob) for logprob in law))
                token = next(i for i, mass in enumerate(masses) if mass > uniform(t))
                turn.append(token)
                self.ids.append(token)
                self.kinds += "a"
                ended = STOP_EOS if token == 2 else STOP_USER if token in self.settings.stop_ids else STOP_LENGTH
                if any(string in text(turn, skip_special_tokens=True) for string in self.settings.stop) and not ended:
                    ended = STOP_USER
                if ended or len(turn) == limit:
                    break
            said.append(type("Said", (), {"text": " ".join(map(str, turn))}))
            answer = reply(data, said)
            fed = [int(word) for word in str(answer.content or "").split()][: LIMITS["max_tool_tokens"]]
            self.stop = ended
            if answer.done:
                self.stop = ended or STOP_USER
                return self
            if len(said) == LIMITS["max_turns"] or len(self.ids) + max(len(fed), 0 if fed else 1) > LIMITS["max_tokens"] - bool(
                fed
            ):
                self.stop = STOP_LENGTH
                return self
            self.ids += fed
            self.kinds += "f" * len(fed)

    @functools.cache  # noqa: B019 - a few rows of a test
    def numbers(self, plain_policy: bool = False) -> dict[str, list[Any]]:
        """behaviour, policy, entropy and kept ids of every token; 0 and none at what was fed."""
        steered = self.logits(self.ids, self.kinds)
        plain = self.logits(self.ids, self.kinds, plain=True) if plain_policy else steered
        found: dict[str, list[Any]] = {"behaviour": [], "policy": [], "entropy": [], "kept": []}
        for t, (token, kind) in enumerate(zip(self.ids, self.kinds, strict=True)):
            at, seen = len(self.prompt) + t - 1, self.prompt + self.ids[:t]
            own = {"behaviour": 0.0, "policy": 0.0, "entropy": 0.0}
            kept: list[int] = []
            if kind == "a":
                own = definitions.numbers(steered[at].tolist(), seen, token, self.settings)
                if plain_policy:
                    of_plain = definitions.numbers(plain[at].tolist(), seen, token, self.settings)
                    own = {**of_plain, "behaviour": own["behaviour"]}
                if definitions.truncates(self.settings):
                    kept = definitions.kept(steered[at].tolist(), seen, self.settings)
                    kept = kept if len(kept) < len(steered[at]) else []
            for name, number in own.items():
                found[name].append(number)
            found["kept"].append(kept)
        return found


def check(rollout: Rollout, rows: list[Alone], plain_policy: bool = False) -> None:
    assert rollout.response_ids == [row.ids for row in rows]
    assert [mask[:n] for mask, n in zip(rollout.action_mask_BR.tolist(), rollout.lengths_B.tolist(), strict=True)] == [
        [kind == "a" for kind in row.kinds] for row in rows
    ]
    recorded = {
        "behaviour": rollout.behaviour_logprobs_BR,
        "policy": rollout.policy_logprobs_BR,
        "entropy": rollout.entropy_BR,
    }
    kept = None if rollout.kept is None else rollout.kept.lists()
    for b, row in enumerate(rows):
        expected = row.numbers(plain_policy)
        for name, tensor in recorded.items():
            wanted = torch.tensor(expected[name])
            assert tensor is not None and not tensor[b, len(row.ids) :].any()
            torch.testing.assert_close(tensor[b, : len(row.ids)], wanted, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if kept is not None:
            assert kept[b][: len(row.ids)] == expected["kept"]
    assert (kept is None) != definitions.truncates(rows[0].settings)


def recorded_rows(family: Any, settings: Sampling, rollout: Rollout, steered: bool) -> list[Alone]:
    """The rows of a record as they say they are."""
    strengths = rollout.strength_BK.tolist() if steered else [[]] * len(rollout)
    return [
        Alone(family, settings, prompt, strengths[b], rollout.response_ids[b], "".join("fa"[on] for on in mask[:n]))
        for b, (prompt, mask, n) in enumerate(
            zip(rollout.prompt_ids, rollout.action_mask_BR.tolist(), rollout.lengths_B.tolist(), strict=True)
        )
    ]


def played(
    family: str, sampling: Sampling, batch: PromptBatch, steering: Steering | None, step: int, engine: str = "stream"
) -> Samples:
    inner = Sampler(policy(family), sampling, steering, EngineSettings(kind=engine))  # type: ignore[arg-type]
    return EpisodeSampler(inner, scripted(reply, **LIMITS)).sample(batch, step=step)


def steering_of(family: str, **fields: Any) -> Steering:
    return Steering(policy(family).model, spec(32, **fields), policy(family).tokenizer, seed=5)


def sampling_of(name: str, **fields: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": NEW, "n": 2, "seed": 4, **SETTINGS[name], **fields})


# -- the tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", turns.FAMILIES)
def test_every_number_is_that_of_one_unpadded_pass(family: str, steered: bool) -> None:
    sampling, steering = sampling_of("everything", batch_size=3), steering_of(family) if steered else None
    rollout, texts = played(family, sampling, prompts(), steering, 2)
    check(rollout, recorded_rows(family, sampling, rollout, steered))
    assert len({len(episode.turns) for episode in texts.episodes or []}) > 1, "several turns, not the same number everywhere"
    again = teacher_forced(policy(family), rollout, steering=steering)
    torch.testing.assert_close(again.logprobs_BR, rollout.policy_logprobs_BR, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.entropy_BR, rollout.entropy_BR, rtol=0, atol=1e-5)


@pytest.mark.proofs
@pytest.mark.parametrize("family", list(itertools.takewhile(lambda family: family != "t5", FAMILIES)))
def test_every_other_family(family: str) -> None:
    """Those that take no padding, count positions by themselves, or keep states; unsteered."""
    sampling = sampling_of("everything", batch_size=5)
    rollout, _ = played(family, sampling, prompts(), None, 2)
    check(rollout, recorded_rows(family, sampling, rollout, False))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("stream", {"batch_size": 1}),
    ("stream", {"batch_size": 5}),
    ("stream", {"batch_size": 24}),
    ("stream", {"batch_size": 24, "batch_tokens": 60}),
    ("generate", {"batch_size": 5}),
]


SOME = [pytest.param(name, False, marks=pytest.mark.proofs) for name in ("truncated", "penalised", "strings")]


@pytest.mark.parametrize(
    ("name", "steered"), [*((name, True) for name in SETTINGS), ("plain", False), ("everything", False), *SOME]
)
def test_the_rows_are_those_that_are_played_one_by_one(name: str, steered: bool) -> None:
    """Whatever is drawn together: ids, what was fed, why rows end, and every number."""
    sampling, batch, step = sampling_of(name, n=2), prompts(8), 2
    steering = steering_of("llama") if steered else None
    who = [(i, row, sample) for i, row in enumerate(batch.rows) for sample in range(2)]
    row_B, sample_B = torch.tensor([row for _, row, _ in who]), torch.tensor([sample for *_, sample in who])
    strengths: list[list[float]] = [[]] * len(who)
    if steering is not None:
        columns = {"s": [batch.columns["s"][i] for i, *_ in who]}
        strengths = steering.strengths(row_B, sample_B, columns, policy_step=step).tolist()
    rows = []
    for b, (i, _, _) in enumerate(who):
        uniform_R = uniforms(4, step, row_B[b : b + 1], sample_B[b : b + 1], torch.arange(LIMITS["max_tokens"]))[0].tolist()
        row = Alone("llama", sampling, list(batch.ids[i]), strengths[b])
        rows.append(row.play(uniform_R.__getitem__, {"s": batch.columns["s"][i]}))
    assert len({len(row.kinds.replace("f", " ").split()) for row in rows}) > 1, "several turns, not the same number everywhere"
    for engine, fields in VARIANTS:
        rollout, _ = played("llama", dataclasses.replace(sampling, **fields), batch, steering, step, engine)
        assert rollout.stop_B.tolist() == [row.stop for row in rows], (engine, fields)
        check(rollout, rows)


@pytest.mark.parametrize("role", ["trainable", "behaviour"])
def test_what_explores_is_recorded_beside_the_policy(role: str) -> None:
    """Behaviour is the steered law, the policy's numbers those of the plain model where the steering only draws."""
    sampling, steering = sampling_of("plain", batch_size=3), steering_of("llama", role=role)
    rollout, _ = played("llama", sampling, prompts(), steering, 2)
    check(rollout, recorded_rows("llama", sampling, rollout, True), plain_policy=role == "behaviour")
    assert torch.equal(rollout.behaviour_logprobs_BR, rollout.policy_logprobs_BR) == (role == "trainable")


def test_compiled_steps_draw_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one batch are at turns and steps of their own; the graph reads masks that are filled before each step."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "_WARNED", set())
    sampling, steering = sampling_of("everything", batch_size=4), steering_of("llama")
    expected, _ = played("llama", sampling, prompts(), steering, 2)
    rollout, _ = played("llama", dataclasses.replace(sampling, compile=True), prompts(), steering, 2)
    assert rollout.response_ids == expected.response_ids and not compiled._WARNED
    check(rollout, recorded_rows("llama", sampling, rollout, True))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_at_the_end_of_the_context_go_no_further(family: str) -> None:
    """One of many, which stays in the batch when it has ended: the model has no position there."""
    sampling, batch = sampling_of("plain", n=1, batch_size=24), prompts(16)
    ids = [[20] * 126, *batch.ids[1:]]
    batch = dataclasses.replace(batch, ids=ids, prompts=[" ".join(map(str, one)) for one in ids])
    inner = Sampler(policy(family), sampling)
    rollout, texts = EpisodeSampler(inner, scripted(reply, max_turns=4)).sample(batch, step=2)
    check(rollout, recorded_rows(family, sampling, rollout, False))
    assert texts.episodes is not None and texts.episodes[0].ended_by in ("tokens", "environment")


@pytest.mark.slow
def test_two_ranks_play_what_one_plays(tmp_path: Path) -> None:
    """Forward passes are collective there: other numbers of episodes and turns must neither hang nor change a token."""
    done = warm.run_ranks("tests/rollout/environments/ranks.py", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    gaps = 0
    for rank in range(2):
        for (family, name, steered), (tensors, kept) in torch.load(tmp_path / f"out.{rank}").items():
            expected = ranks.played(policy(family), ranks.SHARES[name][rank], steered)
            gaps += int((expected.action_mask_BR != expected.extent_BR).any())
            assert kept == (expected.kept and expected.kept.lists())
            for key, value in expected.tensors().items():
                told = f"{family}, rank {rank}, {name}, steered {steered}: {key}"
                torch.testing.assert_close(tensors[key], value, rtol=0, atol=1e-6, msg=lambda m, told=told: f"{told}: {m}")
    assert gaps > 8


def check_served(of: Policy, url: str, log: Path, name: str, steered: bool) -> None:
    sampling = sampling_of(name)
    steering = Steering(of.model, spec(of.core.config.hidden_size), of.tokenizer, seed=5) if steered else None
    engine = VllmEngine(of, EngineSettings(kind="vllm", url=url), log, steering=steering, alone=True)
    inner = ServerSampler(engine, sampling, steering)
    drawn = EpisodeSampler(inner, scripted(reply, **LIMITS)).draw(prompts(8), step=2, progress=0.0)
    assert len({len(episode.turns) for episode in drawn.texts.episodes or []}) > 1
    check(drawn.rollout, recorded_rows(copy.deepcopy(of.core).double(), sampling, drawn.rollout, steered))


@pytest.mark.vllm
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("name", ["plain", "truncated", "everything"])
def test_a_server_draws_the_turns(vllm_server: VllmServer, name: str, steered: bool) -> None:
    """Each turn a request of its own, whose prompt is the row so far: every number is that of one pass over the whole row."""
    check_served(vllm_server.policy, vllm_server.url, vllm_server.log, name, steered)


@pytest.mark.vllm
@pytest.mark.proofs
@pytest.mark.parametrize(
    ("family", "model_impl", "flags"),
    [
        ("llama", "vllm", CHUNKED),
        ("qwen3", "vllm", ()),
        ("gemma3", "vllm", ()),
        ("gpt2", "vllm", CHUNKED),
        ("gpt_neox", "transformers", ()),
    ],
)
def test_servers_of_other_families_do(
    family: str, model_impl: Any, flags: tuple[str, ...], vllm_python: str, tmp_path: Path
) -> None:
    """Contexts are read in pieces there, and rows thrown out for want of memory and read again."""
    of = gentle(tiny_policy(family, **WIDE[family]))
    settings = EngineSettings(
        kind="vllm", python=vllm_python, model_impl=model_impl, arguments=["--no-enable-prefix-caching", *flags], check_rows=0
    )
    with server_of(of, None, settings, tmp_path, 64) as engine:
        engine.ready(0)
        check_served(of, engine.client.url, tmp_path / "engine.log", "everything", True)
