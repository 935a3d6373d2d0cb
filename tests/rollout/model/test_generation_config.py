"""The generation config is closed."""

from __future__ import annotations

from transformers import GenerationConfig

from steerl.rollout.model.generation_config import ClosedGenerationConfig
from tests.models import tiny_policy


def test_the_closed_config_takes_nothing_from_a_checkpoint() -> None:
    policy = tiny_policy("gpt2")
    theirs = GenerationConfig(top_k=3, repetition_penalty=4.0, suppress_tokens=[1], custom_thing=7)
    ours = ClosedGenerationConfig.of(policy.pad_id, policy.start_ids, max_new_tokens=5)
    before = ours.to_dict()
    assert ours.update(**theirs.to_dict(), defaults_only=True, allow_custom_entries=True) == {}
    assert ours.to_dict() == before and not hasattr(ours, "custom_thing")
    policy.model.generation_config = theirs
    prepared, _ = policy.model._prepare_generation_config(ours)
    assert prepared.to_dict() == before
    assert not policy.model._get_logits_processor(prepared, input_ids_seq_length=3, device="cpu", model_kwargs={})
