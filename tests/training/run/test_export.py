"""RUN/model of each family, written layer by layer, is what save_pretrained writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import Policy
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.run import export
from steerl.training.settings import PPOSettings
from tests.models import FAMILIES, families, tiny_policy


def same_files(found: Path, expected: Path) -> None:
    own, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], value) and own[name].dtype == value.dtype for name, value in theirs.items())
    described = {file.name for file in expected.iterdir()} - {"model.safetensors"}
    assert all((found / name).read_text() == (expected / name).read_text() for name in described) and described


@pytest.mark.parametrize("family", families(FAMILIES, "mixtral"))
def test_the_files_are_those_of_save_pretrained(family: str, tmp_path: Path) -> None:
    policy = tiny_policy(family)
    policy.core.save_pretrained(tmp_path / "expected")
    export.save_model(tmp_path, ActorCritic(policy, None, None, None), PPOSettings())
    same_files(tmp_path / "model", tmp_path / "expected")


def test_an_adapter_in_a_tied_embedding_is_merged_as_before(tmp_path: Path) -> None:
    base = tiny_policy("qwen2", tie_word_embeddings=True)
    model = adapters.add(
        base.model, {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"], "init_lora_weights": False}
    )
    export.save_model(
        tmp_path, ActorCritic(Policy.of(model, base.tokenizer), None, None, None), PPOSettings(export_merged=True)
    )
    adapters.merge(model).save_pretrained(tmp_path / "expected")
    same_files(tmp_path / "model", tmp_path / "expected")


def test_a_disk_that_is_full_leaves_no_model_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.files, "write", full)
    with pytest.raises(UserError, match="model: cannot be written: No space left on device"):
        export.save_model(tmp_path, ActorCritic(tiny_policy("gpt2"), None, None, None), PPOSettings())
    assert list(tmp_path.iterdir()) == []
