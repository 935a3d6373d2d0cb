"""Rows of a batch are what they are alone: exactness rows 1 to 7 and 9, over families, processors, batches and modes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from tests.models import FAMILIES, families, tiny, tiny_policy, tiny_tokenizer
from tests.rollout.definitions import real_prompt, real_response, worst_gap

NAMED = ("gpt2", "llama", "qwen2", "qwen3", "opt", "bloom", "gpt_neox", "gemma", "mistral", "t5", "bart")
OTHERS = tuple(family for family in FAMILIES if family not in (*NAMED, "prophetnet"))
# each with positions, a cache or a mask that no other has
ODD = ("openai-gpt", "gpt_neo", "xglm", "ctrl", "mpt", "mamba", "rwkv", "jamba", "lfm2", "switch", "led", "mbart", "m2m_100")
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 10, 11, 12], [20], [2, 0, 33, 2], [40, 41, 40, 41, 40]]
EVERYTHING = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[7], [40, 41]],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.5},
    "reward": {"repetition_penalty": 0.6},
    "ngrams": {"no_repeat_ngram_size": 2},
    "once": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[3], [5, 6], [40, 41, 40]]},
    "greedy": {"greedy": True},
    "greedy penalty": {"greedy": True, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "everything": EVERYTHING,
}


def batch_of(prompts: list[list[int]] = PROMPTS, rows: list[int] | None = None) -> PromptBatch:
    return PromptBatch.of_ids(prompts, rows or [7 * i + 3 for i in range(len(prompts))])


def sample(
    policy: Policy, prompts: list[list[int]] = PROMPTS, rows: list[int] | None = None, step: int = 0, **settings: Any
) -> Any:
    return Sampler(policy, Sampling(**{"max_new_tokens": 10, **settings})).sample(batch_of(prompts, rows), step=step)[0]


def responses(rollout: Any) -> dict[tuple[int, int], list[int]]:
    return {(int(rollout.row_B[b]), int(rollout.sample_B[b])): real_response(rollout, b) for b in range(len(rollout))}


# -- padded equals alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize("name", ("plain", "everything"))
def test_rows_of_a_batch_have_the_logprobs_of_the_row_alone(family: str, name: str) -> None:
    policy, settings = tiny_policy(family), Sampling(max_new_tokens=10, n=2, **SETTINGS[name])
    rollout, _ = Sampler(policy, settings).sample(batch_of())
    assert [int(r) for r in rollout.row_B] == [row for row in batch_of().rows for _ in range(2)]
    assert rollout.sample_B.tolist() == [0, 1] * len(PROMPTS)
    for row in range(len(rollout)):
        assert real_prompt(rollout, row) == PROMPTS[row // 2]
    assert worst_gap(policy.model, rollout, settings) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", families(OTHERS, *ODD))
def test_other_families_too(family: str) -> None:
    policy, settings = tiny_policy(family), Sampling(max_new_tokens=10, n=2, **EVERYTHING)
    rollout, _ = Sampler(policy, settings).sample(batch_of())
    assert worst_gap(policy.model, rollout, settings) < 1e-5


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ("gpt2", "bart"))
def test_every_processor(family: str, name: str) -> None:
    policy, settings = tiny_policy(family), Sampling(max_new_tokens=10, seed=5, **SETTINGS[name])
    rollout, _ = Sampler(policy, settings).sample(batch_of())
    assert worst_gap(policy.model, rollout, settings) < 1e-5
    same = torch.allclose(rollout.behaviour_logprobs_BR, rollout.policy_logprobs_BR, atol=1e-6)
    assert same == (name in ("plain", "temperature", "top_k", "top_p", "min_p", "greedy", "greedy penalty"))
    truncates = name in ("top_k", "top_p", "min_p", "everything")
    assert (rollout.kept is not None) == truncates
    if truncates:
        whole = Sampling(max_new_tokens=10, seed=5, replay_mask=False, **SETTINGS[name])
        plain, _ = Sampler(policy, whole).sample(batch_of())
        assert torch.equal(plain.response_BR, rollout.response_BR) and plain.kept is None
        assert worst_gap(policy.model, plain, whole) < 1e-5
    assert rollout.temperature == (1.0 if settings.greedy else settings.temperature)


def test_behaviour_is_minus_infinity_nowhere_and_sums_to_one_over_the_kept() -> None:
    rollout = sample(tiny_policy("llama"), n=4, **EVERYTHING)
    mask = rollout.mask_BR
    assert rollout.behaviour_logprobs_BR[mask].isfinite().all() and (rollout.behaviour_logprobs_BR[mask] <= 0).all()
    assert not rollout.behaviour_logprobs_BR[~mask].any() and not rollout.policy_logprobs_BR[~mask].any()


@pytest.mark.parametrize("family", ("mistral", "gemma2", "gpt_neo"))
def test_windows_shorter_than_the_text(family: str) -> None:
    policy, settings = tiny_policy(family), Sampling(max_new_tokens=24, temperature=0.9)
    rollout, _ = Sampler(policy, settings).sample(batch_of())
    assert int(rollout.lengths_B.max()) + len(PROMPTS[1]) > 2 * 8
    assert worst_gap(policy.model, rollout, settings) < 1e-5


# -- the two engines -------------------------------------------------------------------------------------------------


def generated(monkeypatch: pytest.MonkeyPatch, policy: Policy, settings: Sampling, batch: PromptBatch) -> tuple[Any, list[Any]]:
    """The engine generate's rollout, and what each call of generate gave back."""
    outputs, generate = [], policy.core.generate
    with monkeypatch.context() as patch:
        patch.setattr(policy.core, "generate", lambda **given: outputs.append(generate(**given)) or outputs[-1])
        rollout, _ = Sampler(policy, settings, engine=EngineSettings("generate")).sample(batch)
    return rollout, outputs


@pytest.mark.parametrize("family", ("gpt2", "llama", "bloom", "mistral", "t5", "bart", "mbart", "mamba"))
@pytest.mark.parametrize("name", ("plain", "greedy penalty", "everything"))
def test_streaming_equals_plain_generate_and_transition_scores(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, settings = tiny_policy(family), Sampling(max_new_tokens=10, n=2, seed=9, **SETTINGS[name])
    rollout, _ = Sampler(policy, settings).sample(batch_of())
    reference, (output,) = generated(monkeypatch, policy, settings, batch_of())
    rollout, reference = rollout.trim(), reference.trim()
    for field in ("prompt_BP", "response_BR", "lengths_B", "ended_B", "stop_B", "row_B", "sample_B"):
        assert torch.equal(getattr(rollout, field), getattr(reference, field)), field
    # Log-probs of up to 10 nats, each with a few roundings of 1e-6: kernels differ by how many rows a product has.
    for field in ("behaviour_logprobs_BR", "policy_logprobs_BR"):
        assert (getattr(rollout, field) - getattr(reference, field)).abs().max() <= 1e-5, field
    if not settings.greedy:
        transition = policy.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        mask = rollout.mask_BR
        own = torch.zeros_like(rollout.behaviour_logprobs_BR)
        longest_first = (-rollout.prompt_mask_BP.sum(1)).argsort(stable=True)  # as they are decoded
        own[longest_first, : transition.shape[1]] = transition[:, -output.sequences.shape[1] :][:, : own.shape[1]]
        assert (own - rollout.behaviour_logprobs_BR)[mask].abs().max() <= 1e-5


@pytest.mark.parametrize("family", ("gpt2", "qwen3", "gemma2", "bart", "t5", "jamba", "switch"))
def test_the_engine_generate_gives_the_streams_rollout_and_a_lone_rows_numbers(family: str) -> None:
    policy = tiny_policy(family)
    settings = Sampling(max_new_tokens=8, n=3, seed=4, temperature=0.8, top_p=0.85, stop_ids=[*range(30, 36)], batch_size=4)
    (stream, said), (plain, same) = (
        Sampler(policy, settings, engine=EngineSettings(kind)).sample(batch_of(), step=2) for kind in ("stream", "generate")
    )
    assert same == said and len(set(stream.lengths_B.tolist())) > 2
    for field, value in stream.tensors().items():
        if value.dtype == torch.float32:
            assert torch.allclose(value, getattr(plain, field), rtol=0, atol=1e-5), field
        else:
            assert torch.equal(value, getattr(plain, field)), field
    assert worst_gap(policy.model, plain, settings) < 1e-5


def test_the_engine_generate_steers_and_says_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, settings, engine = tiny_policy("llama"), Sampling(max_new_tokens=8, n=2), EngineSettings("generate")
    for role in ("policy", "behaviour"):
        steering = ShiftedLogits(policy.model, role)
        stream, plain = (Sampler(policy, settings, steering, kind).sample(batch_of())[0] for kind in (None, engine))
        assert torch.equal(stream.response_BR, plain.response_BR) and torch.equal(stream.strength_B, plain.strength_B)
        for field in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
            assert (getattr(stream, field) - getattr(plain, field)).abs().max() <= 1e-5, field
    with pytest.raises(UserError, match="engine.kind: generate compiles no steps"):
        Sampler(policy, Sampling(compile=True), engine=engine)
    with pytest.raises(UserError, match="engine.kind: generate shows no token before all are drawn"):
        Sampler(policy, settings, engine=engine).sample(batch_of(), on_token=print)
    monkeypatch.setattr("steerl.rollout.engines.sampler.needs_sync", lambda _: True)
    with pytest.raises(UserError, match="engine.kind: generate does not decode with weights that are spread over ranks"):
        Sampler(policy, settings, engine=engine).sample(batch_of())


# -- one row, one set of numbers: whatever the batch -------------------------------------------------------------------


@pytest.mark.parametrize("family", ("gpt2", "llama", "bart", "mamba"))
def test_batch_size_order_and_neighbours_change_no_token(family: str) -> None:
    policy = tiny_policy(family)
    prompts, rows = [PROMPTS[i % 5] + [11 + i] for i in range(16)], list(range(100, 116))
    whole = responses(sample(policy, prompts, rows, n=2, temperature=1.2, batch_size=16))
    assert len(whole) == 32 and len({tuple(r) for r in whole.values()}) > 25
    for size in (1, 3, 5):
        assert responses(sample(policy, prompts, rows, n=2, temperature=1.2, batch_size=size)) == whole
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(policy, [prompts[i] for i in order], [rows[i] for i in order], n=2, temperature=1.2, batch_size=7)
    assert responses(shuffled) == whole
    assert [int(r) for r in shuffled.row_B[::2]] == [rows[i] for i in order]
    alone = sample(policy, [prompts[4]], [rows[4]], n=1, temperature=1.2)
    assert responses(alone)[(104, 0)] == whole[(104, 0)]


def test_a_token_budget_bounds_every_batch_and_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama")
    prompts = [[5 + i] * length for i, length in enumerate((2, 30, 3, 9, 2, 17, 4, 2, 3, 2))]
    whole = responses(sample(policy, prompts, batch_size=64, max_new_tokens=6))
    shapes, generate = [], policy.core.generate

    def noted(**given: Any) -> Any:
        shapes.append(tuple(given["inputs" if "inputs" in given else "input_ids"].shape))
        return generate(**given)

    monkeypatch.setattr(policy.core, "generate", noted)
    assert responses(sample(policy, prompts, batch_size=4, batch_tokens=40, max_new_tokens=6)) == whole
    assert [rows for rows, _ in shapes] == [1, 1, 2, 4, 2]  # 36; 23; 15; then four by batch_size
    assert all(rows * (width + 6) <= 40 for rows, width in shapes)
    shapes.clear()
    sample(policy, prompts, batch_size=64, batch_tokens=1, max_new_tokens=6)
    assert [rows for rows, _ in shapes] == [1] * 10  # a row that is too wide by itself is decoded all the same


def test_seed_step_row_and_sample_each_change_the_tokens() -> None:
    policy = tiny_policy("gpt2")
    base = responses(sample(policy, [PROMPTS[0]], [3], n=2, max_new_tokens=24))
    assert base[(3, 0)] != base[(3, 1)]
    assert responses(sample(policy, [PROMPTS[0]], [3], n=2, max_new_tokens=24)) == base
    assert responses(sample(policy, [PROMPTS[0]], [3], n=2, max_new_tokens=24, seed=1)) != base
    assert responses(sample(policy, [PROMPTS[0]], [3], n=2, max_new_tokens=24, step=1)) != base
    assert list(responses(sample(policy, [PROMPTS[0]], [4], n=2, max_new_tokens=24)).values()) != list(base.values())


@pytest.mark.parametrize("family", ("llama", "mistral", "bart", "mamba", "jamba"))
def test_dropping_ended_rows_and_sharing_a_prefill_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many stop ids end rows early; the same without either trick gives the same record."""
    policy = tiny_policy(family)
    settings = {
        "n": 4,
        "max_new_tokens": 24,
        "stop_ids": list(range(30, 40)),
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
    }
    quick = sample(policy, **settings)
    assert len(set(quick.lengths_B.tolist())) > 4
    plain = policy.with_model(policy.model, dataclasses.replace(policy.capabilities, row_selection=False))
    slow = sample(plain, **settings)
    assert torch.equal(quick.response_BR, slow.response_BR) and torch.equal(quick.lengths_B, slow.lengths_B)
    assert torch.equal(quick.stop_B, slow.stop_B)
    assert (quick.policy_logprobs_BR - slow.policy_logprobs_BR).abs().max() < 1e-5
    assert (quick.behaviour_logprobs_BR - slow.behaviour_logprobs_BR).abs().max() < 1e-5


def test_without_a_cache_the_record_is_the_same() -> None:
    policy = tiny_policy("llama")
    cached = sample(policy, n=2)
    plain = policy.with_model(policy.model, dataclasses.replace(policy.capabilities, caching=False))
    slow = sample(plain, n=2)
    assert torch.equal(cached.response_BR, slow.response_BR)
    assert (cached.policy_logprobs_BR - slow.policy_logprobs_BR).abs().max() < 1e-5


# -- what must not leak ----------------------------------------------------------------------------------------------

HOSTILE = {
    "repetition_penalty": 3.0, "top_k": 2, "top_p": 0.3, "temperature": 5.0, "min_p": 0.5, "typical_p": 0.2,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12],
    "begin_suppress_tokens": list(range(20, 60)), "forced_eos_token_id": 2, "min_length": 8, "min_new_tokens": 8,
    "num_beams": 3,
    "bad_words_ids": [[13], [14, 15]], "no_repeat_ngram_size": 2, "guidance_scale": 2.0, "max_length": 4,
    "max_new_tokens": 3,
    "cache_implementation": "static", "num_return_sequences": 3, "do_sample": False, "length_penalty": 2.0,
    "renormalize_logits": True, "remove_invalid_values": True, "sequence_bias": [[[17], 9.0]], "use_cache": False,
    "encoder_repetition_penalty": 2.0, "encoder_no_repeat_ngram_size": 1, "exponential_decay_length_penalty": (2, 2.0),
    "max_time": 1e-6, "stop_strings": ["a"], "token_healing": True, "prefill_chunk_size": 2, "output_scores": True,
    "return_dict_in_generate": True, "early_stopping": True, "watermarking_config": {"bias": 9.0}, "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3, "forced_bos_token_id": 9, "dola_layers": "low",
}  # fmt: skip


@pytest.mark.parametrize("family", ("gpt2", "llama", "t5"))
def test_nothing_of_the_checkpoints_generation_config_leaks(family: str) -> None:
    clean = sample(tiny_policy(family), n=2)
    model = tiny(family)
    for name, value in HOSTILE.items():
        if not (name == "forced_bos_token_id" and model.config.is_encoder_decoder):  # that one is part of the start
            setattr(model.generation_config, name, value)
    hostile = sample(Policy.of(model, tiny_tokenizer()), n=2)
    assert torch.equal(clean.response_BR, hostile.response_BR)
    assert (clean.behaviour_logprobs_BR - hostile.behaviour_logprobs_BR).abs().max() < 1e-6
    settings = Sampling(max_new_tokens=10, n=2)
    rollout, _ = Sampler(Policy.of(model, tiny_tokenizer()), settings, engine=EngineSettings("generate")).sample(batch_of())
    assert torch.equal(rollout.trim().response_BR, hostile.trim().response_BR)
    assert model.generation_config.top_k == 2  # and it is as it was


def test_dropout_in_train_mode_is_off_while_sampling_and_on_again_afterwards() -> None:
    model = tiny("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    expected = sample(Policy.of(model, tiny_tokenizer()))
    model.train()
    model.transformer.h[0].mlp.eval()
    settings = Sampling(max_new_tokens=10)
    rollout, _ = Sampler(Policy.of(model, tiny_tokenizer()), settings).sample(batch_of())
    assert torch.equal(rollout.response_BR, expected.response_BR)
    assert worst_gap(model, rollout, settings) < 1e-5
    assert model.training and model.transformer.h[1].mlp.training and not model.transformer.h[0].mlp.training


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_logits_are_raised_before_the_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to(dtype)
    policy, settings = Policy.of(model, tiny_tokenizer()), Sampling(max_new_tokens=10, temperature=0.7)
    rollout, _ = Sampler(policy, settings).sample(batch_of([[5, 6, 7]], [0]))
    # One row, no padding: only the cache separates the two passes, and rounding of the logits themselves.
    assert worst_gap(model, rollout, settings) < 0.1
    reference, (output,) = generated(monkeypatch, policy, settings, batch_of([[5, 6, 7]], [0]))
    logits = torch.stack(output.logits, 1).double() / 0.7
    expected = logits.log_softmax(-1).gather(-1, reference.response_BR[..., None])[..., 0]
    assert (rollout.policy_logprobs_BR.double() - expected).abs().max() < 2e-6


def test_models_whose_head_masks_tokens_with_minus_infinity() -> None:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.arange(40, 64), -math.inf))
    policy, settings = Policy.of(model, tiny_tokenizer()), Sampling(max_new_tokens=10, n=2)
    rollout, _ = Sampler(policy, settings).sample(batch_of([[5, 6, 7], [8]], [0, 1]))
    assert int(rollout.response_BR.max()) < 40
    assert rollout.entropy_BR.isfinite().all() and worst_gap(model, rollout, settings) < 1e-5


# -- steering's seam -------------------------------------------------------------------------------------------------


class ShiftedLogits:
    """A stand-in for steering: adds strength to one token's logit, row by row, and can follow dropped rows."""

    label, sites = "shift#1", ("shift",)

    def __init__(self, model: Any, role: str, follows: bool = True):
        self.model, self.role, self.follows = model, role, follows
        self.strength_B = torch.zeros(0)

    def applied(self, prompt_mask_BP: Any, row_B: Any, sample_B: Any, columns: Any, *, policy_step: int, **_: Any) -> Any:
        nothing = Applied.nothing(row_B, policy_step, sites=1)
        return nothing._replace(strength_BK=(sample_B % 2 * 3).float()[:, None])

    @contextlib.contextmanager
    def active(self, *, prompt_mask_BP: Any, applied: Applied, **_: Any) -> Any:
        assert len(prompt_mask_BP) == len(applied.strength_BK)
        self.strength_B = applied.strength_BK[:, 0]
        add = torch.nn.functional.one_hot(torch.tensor(9), 64).float()
        hook = self.model.lm_head.register_forward_hook(lambda _, __, logits: logits + self.strength_B[:, None, None] * add)
        try:
            yield self if self.follows else None
        finally:
            hook.remove()

    def select(self, index: Any) -> None:
        self.strength_B = self.strength_B[index]


@pytest.mark.parametrize("follows", (True, False))
@pytest.mark.parametrize("role", ("policy", "trainable", "behaviour", "data"))
def test_steered_rows_record_both_laws(role: str, follows: bool) -> None:
    policy = tiny_policy("llama")
    steering = ShiftedLogits(policy.model, role, follows)
    if not follows:
        del ShiftedLogits.select
    try:
        settings = Sampling(max_new_tokens=16, n=4, stop_ids=list(range(30, 40)))
        rollout, _ = Sampler(policy, settings, steering).sample(batch_of())
    finally:
        ShiftedLogits.select = _select
    assert rollout.steering == "shift#1" and rollout.strength_B.tolist() == [0.0, 3.0, 0.0, 3.0] * len(PROMPTS)
    assert (rollout.response_BR == 9).sum() > 5  # it did steer
    for b in range(len(rollout)):
        response = real_response(rollout, b)
        for strength, recorded in (
            (float(rollout.strength_B[b]), rollout.behaviour_logprobs_BR),
            (0.0, rollout.policy_logprobs_BR),
        ):
            if strength == 0.0 and role in ("policy", "trainable") and recorded is rollout.policy_logprobs_BR:
                strength = float(rollout.strength_B[b])
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([real_prompt(rollout, b) + response])).logits[0].double()
            logits[:, 9] += strength
            expected = logits.log_softmax(-1)[-len(response) - 1 : -1].gather(-1, torch.tensor(response)[:, None])[:, 0]
            assert (recorded[b, : len(response)] - expected).abs().max() < 1e-5


_select = ShiftedLogits.select


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_prompts_are_named() -> None:
    policy = tiny_policy("gpt2")
    with pytest.raises(UserError, match="row 1 has an empty prompt"):
        batch_of([[5], []], [0, 1])
    with pytest.raises(UserError, match=r"row 8 holds the id 64, but ids go from 0 to 63"):
        sample(policy, [[5], [64]], [7, 8])
    with pytest.raises(UserError, match=r"row 3 has 120 tokens.*context of 128.*prompts.max_tokens to 118"):
        sample(policy, [[5] * 120], [3])
    assert len(sample(policy, [[5] * 118], [3])) == 1  # the whole context is used


def test_an_encoder_decoders_two_contexts() -> None:
    policy = tiny_policy("bart")
    with pytest.raises(UserError, match="row 3 has 129 tokens"):
        sample(policy, [[5] * 129], [3])
    with pytest.raises(UserError, match="max_new_tokens: 128 does not fit the decoder's context of 128"):
        sample(policy, max_new_tokens=128)
    assert len(sample(policy, [[5] * 128], [3])) == 1


@pytest.mark.parametrize("engine", ("stream", "generate"))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_logits_without_a_law_name_row_and_step(value: float, engine: Any) -> None:
    model = tiny("llama")
    calls = []

    def spoil(_: Any, __: Any, logits: Any) -> Any:
        calls.append(1)
        return logits.index_fill(-1, torch.tensor([3]), value) if len(calls) > 3 else logits

    policy = Policy.of(model, tiny_tokenizer())
    assert policy.capabilities.padding
    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"row 7 \(sample 0\) at token 3 hold no distribution"):
        sampler = Sampler(policy, Sampling(max_new_tokens=10), engine=EngineSettings(engine))
        sampler.sample(batch_of([[5, 6]], [7]))


def test_banning_every_token_is_told() -> None:
    with pytest.raises(UserError, match="every token banned"):
        sample(tiny_policy("gpt2"), bad_words_ids=[[i] for i in range(64)])


def test_no_prompts_give_an_empty_rollout() -> None:
    rollout, texts = Sampler(tiny_policy("gpt2"), Sampling()).sample(PromptBatch.of_ids([]))
    assert len(rollout) == 0 and len(texts) == 0
