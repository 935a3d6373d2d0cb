"""Families of models, tied and untied heads, vLLM's own modules and transformers' inside it: a server's rows are the
in-process engine's, before and after new weights. A server for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from tests.models import tiny_policy
from tests.rollout.engines.vllm.agree import LAWS, assert_same, prompts, shake
from tests.vllm_server import WIDE, gentle

pytestmark = pytest.mark.vllm
_GEMMA = {**WIDE, "query_pre_attn_scalar": 32, "sliding_window": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama tied": ("llama", {**WIDE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**WIDE, "tie_word_embeddings": False}),
    "qwen3 tied": ("qwen3", {**WIDE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"hidden_size": 128}),
    "mistral, a window": ("mistral", {**WIDE, "sliding_window": 6}),
    "gemma3, windows, tied": ("gemma3", {**_GEMMA, "tie_word_embeddings": True}),
    "gemma2, windows": ("gemma2", _GEMMA),
    "gpt_neox": ("gpt_neox", {"hidden_size": 128}),
    "gpt2 tied": ("gpt2", {"n_embd": 128}),
    "olmo2": ("olmo2", {"hidden_size": 128}),
    # its default scale of attention, 1, makes float32 itself 1.6e-5 off float64, in either engine
    "granite": ("granite", {"hidden_size": 128, "attention_multiplier": 0.18}),
}
REFUSED = {("gpt2 tied", "transformers"): r"model\.h\.0\.attn\.c_attn\.bias: it was sent, and its modules do not take it"}
"""vLLM leaves these weights out, without a word of its own."""
IN_CI = {("qwen3 tied", "transformers")}
CASES = [
    pytest.param(family, impl, marks=[] if (family, impl) in IN_CI else pytest.mark.proofs, id=f"{family}-{impl}")
    for family in FAMILIES
    for impl in ("vllm", "transformers")
]


@pytest.mark.parametrize("family, impl", CASES)
def test_every_law_on_every_family(vllm_python: str, tmp_path: Path, family: str, impl: Any):
    kind, overrides = FAMILIES[family]
    policy = gentle(tiny_policy(kind, **overrides))
    engine = VllmEngine(policy, EngineSettings(kind="vllm", python=vllm_python, model_impl=impl), tmp_path / "engine.log")
    try:
        if (family, impl) in REFUSED:
            with pytest.raises(UserError, match=REFUSED[family, impl]):
                engine.sync(0)
            return
        for step in range(3):
            batch = prompts(policy, 10)
            for law in LAWS.values() if step != 1 else [LAWS["plain"]]:
                sampling = Sampling(max_new_tokens=16, seed=7, **law)
                assert_same(
                    ServerSampler(engine, sampling).sample(batch, step=step), Sampler(policy, sampling).sample(batch, step=step)
                )
            shake(policy, step)
            engine.sync(step + 1)
    finally:
        engine.close()
