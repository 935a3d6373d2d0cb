"""What PPO refuses, and that each line says where, what was found and what to do."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.policy import ModelSettings
from steerl.rollout.steering import load_spec
from steerl.rollout.steering.parameters import Layer
from steerl.training.algorithm.importance import Correction
from steerl.training.checks import check_job
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from steerl.training.stages import stage
from steerl.training.stages.models import load_trainable
from tests.models import tiny_policy
from tests.ppo_runs import LORA, job

POLICY = SimpleNamespace(model=torch.nn.Linear(1, 1))


def lines(**settings) -> tuple[str, ...]:
    with pytest.raises(UserError) as found:
        PPOSettings(**settings)
    return found.value.lines


@pytest.mark.parametrize(
    "settings, start",
    [
        ({"steps": 0}, "ppo.steps: 0"),
        ({"micro_batch_size": 0}, "ppo.micro_batch_size: 0"),
        ({"learning_rate": -1.0}, "ppo.learning_rate: -1.0"),
        ({"learning_rate": float("nan")}, "ppo.learning_rate: nan"),
        ({"clip": 0.0}, "ppo.clip: 0.0"),
        ({"value_clip": -1.0}, "ppo.value_clip: -1.0"),
        ({"gamma": 1.5}, "ppo.gamma: 1.5"),
        ({"lam": -0.1}, "ppo.lam: -0.1"),
        ({"dual_clip": 0.5}, "ppo.dual_clip: 0.5"),
        ({"rollouts_per_step": 10, "minibatches": 4}, "ppo.minibatches: 10 rollouts_per_step cannot be split into 4"),
        ({"kl_target": 5.0, "kl_coef": 0.0}, "ppo.kl_coef: 0.0 cannot be adapted"),
        ({"kl_target": 5.0, "reference": "none"}, "ppo.kl_target: there is no reference"),
        ({"credit": "rloo", "value": "shared"}, "ppo.value: 'shared' has no effect"),
        ({"loss": "cispo", "dual_clip": 3.0}, "ppo.dual_clip: 3.0 has no effect with ppo.loss cispo"),
        ({"loss": "dppo", "dual_clip": 3.0}, "ppo.dual_clip: 3.0 has no effect with ppo.loss dppo"),
        ({"loss": "dppo", "clip": 0.1}, "ppo.clip: 0.1 has no effect with ppo.loss dppo"),
        ({"loss": "dppo", "clip_high": 0.1}, "ppo.clip_high: 0.1 has no effect with ppo.loss dppo"),
        ({"loss": "dppo", "dppo_threshold": 0.0}, "ppo.dppo_threshold: 0.0, but it must be a number above 0"),
        ({"dppo_threshold": 0.1}, "ppo.dppo_threshold: 0.1 has no effect with ppo.loss ppo"),
        ({"loss": "gspo", "dppo_divergence": "kl"}, "ppo.dppo_divergence: 'kl' has no effect with ppo.loss gspo"),
        ({"correction": Correction("token_mask", high=1.0, low=2.0)}, "ppo.correction: low 2.0 and high 1.0"),
    ],
)
def test_a_setting_out_of_range_is_one_line(settings, start):
    found = lines(**settings)
    assert len(found) == 1 and found[0].startswith(start), found


def test_all_problems_come_together():
    assert len(lines(steps=0, gamma=2.0, minibatches=0)) == 3


def test_a_learning_rate_of_zero_is_legal():
    PPOSettings(learning_rate=0.0, value_learning_rate=0.0)


def refused(sampling=None, **settings) -> str:
    with pytest.raises(UserError) as found:
        check_job(POLICY, [1], Sampling(**sampling or {}), PPOSettings(**settings))
    return "\n".join(found.value.lines)


def test_rollouts_that_cannot_be_split_into_groups():
    assert "ppo.rollouts_per_step: 64 cannot be split into groups of sampling.n = 5" in refused({"n": 5})


def test_one_sample_has_nothing_to_compare_with():
    assert "sampling.n: 1, but ppo.credit group" in refused(credit="group")


def test_no_prompts():
    with pytest.raises(UserError, match="prompts: there are none"):
        check_job(POLICY, [], Sampling(), PPOSettings())


def test_adapter_reference_without_an_adapter():
    assert "ppo.reference: adapter, but the policy has none" in refused(reference="adapter")


@pytest.mark.parametrize(
    "law, told",
    [
        (
            {"top_p": 0.9, "replay_mask": False},
            "top_k, top_p and min_p with replay_mask false draw .* leave replay_mask out, or",
        ),
        ({"top_k": 5, "replay_mask": False}, "top_k, top_p and min_p with replay_mask false draw .* leave replay_mask out, or"),
        (
            {"min_p": 0.1, "replay_mask": False},
            "top_k, top_p and min_p with replay_mask false draw .* leave replay_mask out, or",
        ),
        ({"repetition_penalty": 1.2}, "penalties and bans draw from another distribution than the policy's"),
        ({"no_repeat_ngram_size": 2}, "penalties and bans draw"),
        ({"bad_words_ids": [[3]], "top_p": 0.9}, "penalties and bans draw .* sample without them, or set ppo.correction.type"),
    ],
)
def test_another_law_needs_a_correction(law, told):
    assert re.search(told, refused(law))
    check_job(POLICY, [1], Sampling(**law), PPOSettings(correction=Correction("token_truncate")))
    check_job(POLICY, [1], Sampling(**law), PPOSettings(correction=Correction("none")))


@pytest.mark.parametrize("law", [{"top_p": 0.9}, {"top_k": 5, "temperature": 0.7}, {"min_p": 0.1, "replay_mask": True}])
def test_truncation_that_is_replayed_needs_none(law, caplog):
    check_job(POLICY, [1], Sampling(**law), PPOSettings(kl_as="loss"))
    check_job(POLICY, [1], Sampling(**law), PPOSettings(kl_target=1.0, correction=Correction("none")))
    assert not caplog.text


def test_greedy_is_always_refused():
    assert "sampling.greedy" in refused({"greedy": True}, correction=Correction("token_truncate"))


def test_replay_needs_a_correction():
    assert "ppo.correction: missing; stored rollouts" in refused(replay="somewhere")
    check_job(POLICY, [1], Sampling(), PPOSettings(replay="somewhere", correction=Correction("none")))


def test_steered_exploration_needs_a_correction_and_no_truncation():
    steering = SimpleNamespace(role="behaviour", correction=None, sites=())
    for sampling, settings, text in (
        (Sampling(), PPOSettings(), "steering.correction: missing"),
        (Sampling(top_p=0.5), PPOSettings(correction=Correction("token_truncate")), "sampling: top_k, top_p or min_p together"),
    ):
        with pytest.raises(UserError, match=text.replace(".", r"\.")):
            check_job(POLICY, [1], sampling, settings, steering)
    none = SimpleNamespace(role="behaviour", correction=Correction("none"), sites=())
    check_job(POLICY, [1], Sampling(), PPOSettings(), none)


@pytest.mark.parametrize(
    "n, told", [(2, "4 strengths for sampling.n = 2 .* set sampling.n to 4"), (6, "4 strengths for sampling.n = 6 .* to 8")]
)
def test_strengths_of_samples_fit_the_group(n, told):
    """A list that is longer than the group, or does not divide it, in a run and in a dump alike."""
    site = {"at": {"layers": [0]}, "vector": [1.0]}
    spec = load_spec({"sites": [site, {**site, "strength": {"samples": [0.0, 0.1, 0.2, 0.3]}}]})
    with pytest.raises(ConfigError, match=rf"steering.sites\[1\].strength.samples: {told}"):
        check_job(POLICY, [1], Sampling(n=n), PPOSettings(rollouts_per_step=24), spec)
    check_job(POLICY, [1], Sampling(n=8), PPOSettings(rollouts_per_step=24), spec)
    check_job(POLICY, [1], Sampling(), PPOSettings(replay="dump", correction=Correction("token_mask")), spec)


def test_a_kl_of_another_law_is_weighed_or_not_held(caplog):
    """kl_target steers by a measured KL: refused where it is not the policy's, quiet where there is but one law."""
    none = Correction("none")
    explores = SimpleNamespace(role="behaviour", correction=none, sites=())
    told = "ppo.kl_target: with a correction of type none the KL that is measured is the sampler's"
    whole = {"top_p": 0.9, "replay_mask": False}
    assert told in refused(whole, kl_target=1.0, correction=none)
    with pytest.raises(UserError, match="the KL that is measured is the sampler's"):
        check_job(POLICY, [1], Sampling(), PPOSettings(kl_target=1.0), explores)
    check_job(POLICY, [1], Sampling(**whole), PPOSettings(kl_target=1.0, correction=Correction("token_mask")))
    check_job(POLICY, [1], Sampling(), PPOSettings(kl_target=1.0, kl_as="loss", correction=none))
    assert not caplog.text
    check_job(POLICY, [1], Sampling(**whole), PPOSettings(kl_as="loss", correction=none))
    assert "has not the KL's gradient" in caplog.text


def test_counts_and_seeds_that_no_machine_can_hold_are_refused_at_once():
    """10^15 rollouts looked for their divisors one by one, and a seed of -1 is none of numpy's."""
    for build, words in (
        (lambda: PPOSettings(rollouts_per_step=10**15, minibatches=7), "ppo.rollouts_per_step: 1000000000000000, but it must be at most 16,777,216"),
        (lambda: Sampling(n=10**15), "sampling.n: 1000000000000000, but it must be 1 to 16,777,216"),
        (lambda: Sampling(seed=-1), "sampling.seed: -1, but it must be 0 or more"),
        (lambda: RunSettings(seed=-1), "run.seed: -1, but it must be 0 to 4294967295"),
        (lambda: RunSettings(seed=2**63), "run.seed: 9223372036854775808, but it must be 0 to 4294967295"),
        (lambda: RunSettings(keep=0), "run.keep: 0, but it must be 1 or more"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            build()
        assert len(caught.value.lines) == 1 and caught.value.lines[0].startswith(words), caught.value.lines


def half(family: str = "gpt2"):
    policy = tiny_policy(family)
    policy.model.half()
    return policy


def test_float16_weights_that_learn_are_refused_and_adapters_on_them_are_not():
    """In the job, and in the stages before it; bfloat16 and what does not learn are as they were."""
    lora = with_peft(half(), LORA)
    check_job(lora, [1], Sampling(), PPOSettings())
    trained = SimpleNamespace(role="trainable", correction=None, sites=())
    check_job(half(), [1], Sampling(), PPOSettings(value="shared"), trained)
    bfloat = tiny_policy("gpt2")
    bfloat.model.bfloat16()
    check_job(bfloat, [1], Sampling(), PPOSettings())
    for policy, steering in ((half(), None), (half("t5"), None), (half(), trained)):  # the last copies a value model
        with pytest.raises(UserError, match=r"model.dtype: float16, in which weights that learn \(.*\) diverge") as found:
            check_job(policy, [1], Sampling(), PPOSettings(), steering)
        assert len(found.value.lines) == 1


def test_the_supervised_stages_refuse_float16_alike(tmp_path):
    """A reward model's new head learns whole beside its LoRA, so that is no way out there."""
    tiny_policy("gpt2").model.save_pretrained(tmp_path)
    load_trainable(ModelSettings(path=str(tmp_path), dtype="float16", peft=LORA), "policy", "causal")
    scores = ("reward", "sequence_classification")
    for peft, (role, head), more in (
        (None, ("policy", "causal"), {}),
        (None, scores, {"fresh": True, "num_labels": 1}),
        (LORA, scores, {"fresh": True, "num_labels": 1}),
    ):
        with pytest.raises(UserError, match=r"model.dtype: float16, in which weights that learn \(.*\) diverge"):
            load_trainable(ModelSettings(path=str(tmp_path), dtype="float16", peft=peft), role, head, **more)


def test_mixed_precision_in_float16_is_refused_by_ppo_and_the_stages(monkeypatch):
    """accelerate reads its config file's word, DeepSpeed's own `fp16` included, into one place."""
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    with pytest.raises(UserError, match=r"mixed_precision: fp16 in the accelerate .* set it to bf16") as found:
        job("gpt2")
    assert len(found.value.lines) == 1
    with pytest.raises(UserError, match="mixed_precision: fp16"):
        stage.train(SimpleNamespace(accelerator=AcceleratorState()), None)


@pytest.mark.parametrize("op, refused", [("loreft", True), ("noreft", False), ("add", False)])
def test_weight_decay_takes_no_rotation_apart(op, refused):
    """Torch's orthogonal maps keep signs among their weights, cut to whole numbers: 0.9999 of one is 0."""
    site = {"name": "turn", "at": {"layers": [0]}, "op": {"type": op}, **({"vector": [1.0]} if op == "add" else {})}
    spec = load_spec({"role": "trainable", "sites": [site]})
    check_job(POLICY, [1], Sampling(), PPOSettings(), spec)
    if not refused:
        check_job(POLICY, [1], Sampling(), PPOSettings(weight_decay=0.01), spec)
        return
    with pytest.raises(ConfigError, match="ppo.weight_decay: 0.01, but site 'turn' trains a rotation"):
        check_job(POLICY, [1], Sampling(), PPOSettings(weight_decay=0.01), spec)
    layer = Layer({"rotation": torch.linalg.qr(torch.randn(8, 2))[0]})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.01)
    layer.tensors()["rotation"].sum().backward()
    optimizer.step()
    assert layer.tensors()["rotation"].norm() == 0  # what is refused; where torch mends it, the refusal can go


@pytest.mark.parametrize("engine, ppo, steering, told", [
    ({"kind": "vllm"}, {"replay": "d", "correction": Correction()}, None, "engine.kind: vllm, but ppo.replay reads rows"),
    ({"kind": "vllm", "ahead": 1}, {}, "behaviour", "engine.ahead: 1 with steering.role behaviour"),
    ({"kind": "vllm", "ahead": 1}, {}, "preventative", "engine.ahead: 1 with steering.role preventative"),
])  # fmt: skip
def test_what_a_server_cannot_do_for_a_run(engine, ppo, steering, told):
    site = {"at": {"layers": [0]}, "vector": [1.0]}
    spec = load_spec({"role": steering, "sites": [site], "correction": {"type": "token_truncate"}}) if steering else None
    with pytest.raises(ConfigError, match=told):
        check_job(POLICY, [1], Sampling(), PPOSettings(**ppo), spec, EngineSettings(**engine))


@pytest.mark.parametrize("given, told", [
    ({"url": "http://127.0.0.1:1"}, "engine.url: has no effect with engine.kind stream"),
    ({"kind": "generate", "ahead": 1}, "engine.ahead: has no effect with engine.kind generate"),
    ({"kind": "vllm", "url": "http://127.0.0.1:1", "python": "p"}, "engine.python: has no effect on the server of engine.url"),
    ({"kind": "vllm", "ahead": 2}, "engine.ahead: 2, but it must be 0 or 1"),
    ({"kind": "vllm", "check_rows": -1}, "engine.check_rows: -1, but it must be 0"),
])  # fmt: skip
def test_engine_settings_that_do_nothing_or_make_no_sense(given, told):
    with pytest.raises(ConfigError, match=told):
        EngineSettings(**given)
