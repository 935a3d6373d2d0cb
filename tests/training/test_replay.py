"""Replay: stored rows in a reproducible order, weighed by the law they were drawn from, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

from steerl.configs.reader import run_command

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.analysis.verify import verify
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.fingerprint import model_fingerprint, tokenizer_fingerprint
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.dumps import manifest, store
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.prompts.prompts import PromptBatch, PromptSettings, load_prompts
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering, load_spec
from steerl.rollout.types import Rollout
from steerl.scripts.dump_rollouts import DumpJob, main
from steerl.training.algorithm.importance import Correction
from steerl.training.ppo import train
from steerl.training.replay import Replay
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy, tiny_tokenizer

PROMPTS, SAMPLES = 12, 2
SETTINGS = PPOSettings(
    rollouts_per_step=8, minibatches=2, epochs=1, micro_batch_size=8, correction=Correction("token_truncate"), eval_prompts=0
)


def make_dump(folder, policy, *, samples=SAMPLES, shard_rows=8, steering=None, step=0, **sampling):
    """A dump sampled by `policy`, made with the rooms' own functions."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Sampling(max_new_tokens=5, n=samples, **sampling)
    sampler = Sampler(policy, settings, steering)
    plan = manifest.Plan.of(PROMPTS, samples, batch_size=4, shard_rows=shard_rows)
    made_from = {"model.path": model_fingerprint(policy.core), "model.tokenizer": tokenizer_fingerprint(policy.tokenizer)}
    label = "" if steering is None else steering.label
    begun = manifest.start(folder, plan, {"sampling": dataclasses.asdict(settings)}, {**made_from, "steering": label})

    def sample(call):
        return sampler.sample(
            dataclasses.replace(
                PromptBatch.of_ids([[5 + row, 9] for row in call]),
                rows=list(call),
                columns={"much": [0.5 * row for row in call], "spots": [[0] * (row % 2) for row in call]},
            ),
            step=step,
        )

    for index in range(len(plan)):
        store.make_shard(folder, plan, index, sample)
    manifest.finish(folder, begun, world_size=1)
    return folder


@pytest.fixture(scope="module")
def policy():
    return tiny_policy("llama", seed=1)


@pytest.fixture(scope="module")
def dump(tmp_path_factory, policy):
    return make_dump(tmp_path_factory.mktemp("dumps") / "dump", policy, top_p=0.8)


def test_every_prompt_comes_once_an_epoch_in_an_order_that_position_alone_decides(dump, policy):
    replay = Replay(dump, policy, SETTINGS)
    whole = replay.take(3, 0, 3 * PROMPTS)
    for epoch in range(3):
        assert sorted(whole[epoch * PROMPTS : (epoch + 1) * PROMPTS]) == list(range(PROMPTS))
    assert whole[:PROMPTS] != whole[PROMPTS : 2 * PROMPTS]
    pieces = [prompt for position in range(0, 36, 4) for prompt in Replay(dump, policy, SETTINGS).take(3, position, 4)]
    assert pieces == whole
    assert replay.take(4, 0, PROMPTS) != whole[:PROMPTS]


def test_rows_are_those_of_the_dump(dump, policy):
    replay = Replay(dump, policy, SETTINGS)
    stored = {}
    for rollout, texts in store.read_dump(dump):
        for i in range(len(rollout)):
            stored[int(rollout.row_B[i]), int(rollout.sample_B[i])] = (rollout.select([i]).trim(), texts.select([i]))
    rollout, texts = replay.draw(replay.batch([7, 0, 11, 7]))
    assert rollout.row_B.tolist() == [7, 7, 0, 0, 11, 11, 7, 7] and rollout.sample_B.tolist() == [0, 1] * 4
    for i in range(len(rollout)):
        wanted, said = stored[int(rollout.row_B[i]), int(rollout.sample_B[i])]
        found = rollout.select([i]).trim()
        for name, value in wanted.tensors().items():
            assert torch.equal(value, found.tensors()[name]), name
        assert texts.select([i]) == said


def vowels(rollout, texts):
    return Scores(torch.tensor([sum(c in "aeiou" for c in text) / 5 for text in texts.completions]), {})


def replayed(folder, dump, policy, steps=2, steering=None, run_seed=0, **changes):
    prompts_file = folder.parent / "prompts.jsonl"
    prompts_file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    prompts = load_prompts(PromptSettings(path=str(prompts_file)), policy, 5)
    settings = dataclasses.replace(SETTINGS, **{"replay": str(dump), "steps": steps, **changes})
    run, spec = RunSettings(dir=str(folder), seed=run_seed), load_spec(steering) if steering else None
    train(policy, prompts, vowels, Sampling(max_new_tokens=5, n=1), settings, run, steering=spec)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loop_learns_from_stored_rows_weighed_by_their_own_law(tmp_path, dump):
    """The logged mismatch of the first step equals one computed row by row, alone and unpadded, in float64."""
    policy = tiny_policy("llama", seed=2)
    replay = Replay(dump, policy, SETTINGS)
    rollout, texts = replay.draw(replay.batch(replay.take(0, 0, 4)))
    kl, logs = 0.0, []
    for i in range(len(rollout)):
        row = rollout.select([i]).trim()
        length = int(row.lengths_B[0])
        with torch.no_grad():
            ours = teacher_forced(policy, row).logprobs_BR[0, :length].double()
        difference = ours - row.behaviour_logprobs_BR[0, :length].double()
        kl -= float(difference.sum()) / len(rollout)
        logs.append(float(difference.sum()))
    weights = torch.tensor(logs, dtype=torch.float64).exp()
    lines = replayed(tmp_path / "run", dump, policy)
    assert lines[0]["correction/kl_sequence"] == pytest.approx(kl, abs=1e-4)
    assert lines[0]["correction/ess"] == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()), rel=1e-4)
    assert lines[0]["reward/mean"] == pytest.approx(float(vowels(rollout, texts).total_B.mean()))
    assert "gap/max" not in lines[0] and lines[0]["ppo/ratio_first"] == pytest.approx(1.0, abs=1e-6)


def test_rows_of_the_same_weights_are_checked_by_the_gap_alarm(tmp_path, dump, policy):
    lines = replayed(tmp_path / "run", dump, tiny_policy("llama", seed=1), steps=1)
    assert lines[0]["gap/max"] < 1e-4


def two(role="policy", second=None, **spec):
    """Two sites, the second as asked."""
    draw = torch.Generator().manual_seed(2)
    sites = [
        {"at": {"layers": [layer]}, "vector": torch.randn(32, generator=draw).tolist(), "strength": 0.7} for layer in (0, 1)
    ]
    return {"role": role, "sites": [sites[0], sites[1] | (second or {})], **spec}


NOISE = {"at": {"layers": [0]}, "op": {"type": "noise"}, "strength": 0.5}
STEERED = {
    "one site, all that varies": {
        **two(fraction=0.5),
        "sites": [two()["sites"][0] | {"strength": {"dist": "uniform", "high": 2}, "schedule": {}}],
    },
    "two constant sites": two(),
    "a second from a column": two(second={"strength": {"column": "much"}}),
    "a schedule that stays": two(second={"schedule": {"type": "constant", "from": 0.5}}),
    "a fraction of two sites": two(fraction=0.5),
    "a second that is drawn": two(second={"strength": {"dist": "normal", "std": 2.0}}),
    "noise": {"sites": [NOISE]},
    "a second with a schedule": two(second={"schedule": {"from": 1.0, "to": 0.2}}),
    "a budget on two sites": two(kl_budget={"nats_per_sequence": 1.0}),
    "positions from a column": two(second={"where": {"prompt": {"column": "spots"}, "steps": "none"}}),
}


def steered_dump(tmp_path, spec, seed=0):
    """(the policy, the folder of a dump of it under the spec, the rows' own steering)."""
    policy = tiny_policy("llama", seed=1)
    steering = Steering(policy.core, spec, policy.tokenizer, seed)
    return policy, make_dump(tmp_path / "dump", policy, steering=steering, seed=seed), steering


@pytest.mark.parametrize("name", STEERED)
def test_steered_rows_are_replayed_as_they_were_drawn(tmp_path, name):
    """From the record alone: at another seed, with the budget's scale where it has come to, in another order and company."""
    policy, folder, _ = steered_dump(tmp_path, STEERED[name], seed=3)
    steering = Steering(policy.core, STEERED[name], policy.tokenizer, 8)
    steering.scale = 0.25
    replay = Replay(folder, policy, SETTINGS, steering)
    rollout, _ = replay.draw(replay.batch([11, 2, 7]), step=4, progress=0.6)
    with torch.no_grad():
        again = teacher_forced(policy, rollout, steering=steering).logprobs_BR
        plain = teacher_forced(policy, rollout).logprobs_BR
    assert float((again - rollout.policy_logprobs_BR).abs().max()) < 1e-5
    assert float((plain - rollout.policy_logprobs_BR).abs().max()) > 1e-2  # the steering moves something


def test_other_weights_are_steered_with_the_noise_that_the_rows_were_drawn_with(tmp_path):
    """Rows of step 5 of another run: whose weights they are of is told without losing the step that their noise was of."""
    spec, policy = {"sites": [NOISE]}, tiny_policy("llama", seed=1)
    folder = make_dump(tmp_path / "dump", policy, steering=Steering(policy.core, spec, None, 3), step=5)
    other = tiny_policy("llama", seed=2)
    steering = Steering(other.core, spec, None, 8)
    replay = Replay(folder, other, SETTINGS, steering)
    replayed, _ = replay.draw(replay.batch(range(4)))
    stored = next(iter(store.read_dump(folder))).rollout.select(range(4 * SAMPLES)).trim()
    assert replayed.policy_step_B.tolist() == [-6] * len(replayed) and stored.policy_step_B.tolist() == [5] * len(stored)
    with torch.no_grad():
        again, same = (teacher_forced(other, rollout, steering=steering).logprobs_BR for rollout in (replayed, stored))
    assert torch.equal(again, same)


def varied_spec(family="llama"):
    """Of both sites the strength is drawn or scheduled; the first also acts where a column says, the second adds noise."""
    at = {"layers": [0], "stack": "encoder"} if family == "bart" else {"layers": [0]}
    where = {"prompt": {"column": "spots"}, "steps": "none" if family == "bart" else "all"}
    drawn = {"dist": "uniform", "low": 0.5, "high": 1.5, "per": "sample"}
    add = {"at": at, "vector": two()["sites"][0]["vector"], "where": where, "strength": drawn}
    noise = {"at": {"layers": [1]}, "op": {"type": "noise"}, "strength": 0.7, "schedule": {"type": "cosine", "from": 0.9}}
    return {"role": "policy", "fraction": 0.5, "sites": [add | {"schedule": {"from": 0.8, "to": 0.1}}, noise]}


@pytest.fixture(scope="module", params=["llama", "bart"])
def varied(request, tmp_path_factory):
    """(the policy, the spec, the folder of a dump that `steerl dump` made of them)."""
    folder, spec = tmp_path_factory.mktemp("varied"), varied_spec(request.param)
    policy = tiny_policy(request.param, seed=1)
    policy.core.save_pretrained(folder / "model")
    policy.tokenizer.save_pretrained(folder / "model")
    lines = [{"prompt": "ab cde fgh"[: 3 + row % 7], "spots": [[], [0], [1, -1]][row % 3]} for row in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = {
        "model.path": folder / "model", "prompts.path": folder / "prompts.jsonl", "run.dir": folder / "dump", "run.save_every": 8,
        "sampling.n": SAMPLES, "sampling.max_new_tokens": 6, "sampling.batch_size": 5, "sampling.temperature": 0.7,
        "sampling.seed": 3, "steering": json.dumps(spec),
    }  # fmt: skip
    run_command(main, DumpJob, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    return load_policy(ModelSettings(path=str(folder / "model"))), spec, folder / "dump"


def test_a_dump_of_two_sites_that_vary_is_scored_again_as_it_was_drawn(tmp_path, varied):
    """In PPO at another seed; by verify; in another order, three rows at a time; and nothing of the record is idle."""
    policy, spec, folder = varied
    lines = replayed(
        tmp_path / "run", folder, policy, 1, steering=spec, run_seed=11, rollouts_per_step=PROMPTS * SAMPLES, learning_rate=0.0
    )
    assert lines[0]["gap/max"] < 1e-5 and lines[0]["rollout/rows"] == PROMPTS * SAMPLES
    steering = Steering(policy.core, spec, policy.tokenizer, seed=8)
    rollout = Rollout.join([rollout for rollout, _ in store.read_dump(folder)])
    report = verify(policy, rollout, steering=steering)
    assert report.passed and report.largest < 1e-5
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(0))

    def gap(record):
        with torch.no_grad():
            again = [teacher_forced(policy, record.select(rows), steering=steering).logprobs_BR for rows in order.split(3)]
        return float((torch.cat(again) - record.policy_logprobs_BR[order]).abs().max())

    assert gap(rollout) < 1e-5
    second = rollout.strength_BK.clone()
    second[:, 1] = 0.7
    for defect in (
        {"strength_BK": second}, {"strength_BK": rollout.strength_BK.flip(1)}, {"steering_seed": 8},
        {"policy_step_B": rollout.policy_step_B + 1}, {"positions_BKN": torch.full_like(rollout.positions_BKN, -1)},
    ):  # fmt: skip
        assert gap(dataclasses.replace(rollout, **defect)) > 1e-3, defect.keys()


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ({"strength_BK": 1}, "holds the strengths of 1 site"),
        ({"positions_BKN": 0}, "holds no positions of site"),
        ({"steering_seed": None}, "holds no seed of the noise of site"),
    ],
)
def test_what_an_older_record_lacks_is_named(tmp_path, lost, told):
    """Of files that knew one strength, no positions and no seed; told with the file before anything is computed."""
    policy = tiny_policy("llama", seed=1)
    steering = Steering(policy.core, varied_spec(), policy.tokenizer)
    folder = make_dump(tmp_path / "dump", policy, steering=steering)
    rollout = next(iter(store.read_dump(folder))).rollout
    cut = {"strength_BK": rollout.strength_BK[:, :1], "positions_BKN": rollout.positions_BKN[..., :0], "steering_seed": None}
    name = next(iter(lost))
    less = {name: cut[name]} | ({"positions_BKN": rollout.positions_BKN[:, :1]} if name == "strength_BK" else {})
    rollout = dataclasses.replace(rollout, **less)
    with pytest.raises(UserError, match=rf"^ppo.replay: .*rollouts-00000.parquet {told}"):
        Replay(folder, policy, SETTINGS, steering)._check_rows(rollout, "rollouts-00000.parquet")
    with pytest.raises(UserError, match=rf"^steering: the record of these rows {told}"):
        teacher_forced(policy, rollout, steering=steering)


def test_rows_without_a_steering_are_not_steered_in_silence(dump, policy):
    rollout = next(iter(store.read_dump(dump))).rollout
    with pytest.raises(UserError, match="cannot be put on rows that were drawn without one"):
        teacher_forced(policy, rollout, steering=Steering(policy.core, two(), policy.tokenizer))


def test_exploration_is_replayed_whatever_drew_it(tmp_path):
    """The policy that learns is the plain model: nothing is steered again."""
    spec = two("behaviour", fraction=0.5)
    policy, folder, _ = steered_dump(tmp_path, spec, seed=3)
    replay = Replay(folder, policy, SETTINGS, Steering(policy.core, spec, policy.tokenizer, 8))
    rollout, _ = replay.draw(replay.batch([0, 1]))
    with torch.no_grad():
        assert torch.allclose(teacher_forced(policy, rollout).logprobs_BR, rollout.policy_logprobs_BR, atol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(dump):
    other = tiny_policy("llama", seed=1, tokenizer=tiny_tokenizer(64, kind="word"))
    with pytest.raises(UserError, match="another tokenizer"):
        Replay(dump, other, SETTINGS)


def test_other_weights_are_told_and_weighed(dump, caplog):
    Replay(dump, tiny_policy("llama", seed=9), SETTINGS)
    assert "other weights" in caplog.text


def test_a_smaller_vocabulary_without_a_tokenizer_is_refused_by_the_id(dump):
    small = dataclasses.replace(tiny_policy("llama", seed=1, vocab_size=16), tokenizer=None)
    with pytest.raises(UserError, match=r"rollouts-0000\d.parquet holds the id \d+, the policy's vocabulary ends at 15"):
        Replay(dump, small, SETTINGS).batch(range(PROMPTS))


def test_an_encoder_decoder_does_not_take_a_causal_models_rows(dump):
    other = dataclasses.replace(tiny_policy("t5"), tokenizer=None)
    with pytest.raises(UserError, match="begins responses with"):
        Replay(dump, other, SETTINGS).batch([0])


def test_greedy_rows_are_refused(tmp_path, policy):
    folder = make_dump(tmp_path / "greedy", policy, greedy=True, samples=1)
    with pytest.raises(UserError, match="greedy rows, which have no distribution"):
        Replay(folder, policy, dataclasses.replace(SETTINGS)).batch([0])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollouts_per_step": 9, "minibatches": 1}, "no multiple of the 2 samples"),
        ({"kl_target": 1.0}, "KL of stored rows is not that of the policy"),
        ({"correction": None}, "ppo.correction: missing"),
        ({"replay": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, dump, changes, told):
    with pytest.raises(UserError, match=told):
        replayed(tmp_path / "run", dump, tiny_policy("llama", seed=1), **changes)


def test_one_sample_a_prompt_cannot_be_compared(tmp_path, policy):
    folder = make_dump(tmp_path / "single", policy, samples=1)
    with pytest.raises(UserError, match="one sample per prompt"):
        Replay(folder, policy, dataclasses.replace(SETTINGS, credit="rloo"))


def test_a_damaged_or_unfinished_dump_is_named(tmp_path, policy):
    folder = make_dump(tmp_path / "dump", policy)
    replay = Replay(folder, policy, SETTINGS)
    shard = folder / "rollouts-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rollouts-00001.parquet: is damaged"):
        replay.batch(range(PROMPTS))
    described = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(described | {"finished": False}))
    with pytest.raises(UserError, match="unfinished"):
        Replay(folder, policy, SETTINGS)
    assert Counter(path.suffix for path in folder.iterdir())[".parquet"] == len(replay.plan)
