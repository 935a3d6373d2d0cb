"""Models that bring their own code: refused until it is trusted, then loaded, trained and left behind with it; revisions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.vllm.support import refusals
from steerl.rollout.model import adapters, auto_classes, compat
from steerl.rollout.model.auto_classes import load_config
from steerl.rollout.model.policy import load_policy
from steerl.rollout.model.settings import Hub, ModelSettings
from steerl.rollout.types import Rollout, Texts
from steerl.training import ppo
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from steerl.training.stages.models import load_base, load_tokenizer
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.ppo_runs import LORA, prompts_of, share_of_threes

CONFIG = """
from transformers import LlamaConfig

class OddConfig(LlamaConfig):
    model_type = "odd"
"""
MODEL = """
import torch
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from .configuration_odd import OddConfig

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0, **rest):
        output = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, logits_to_keep=logits_to_keep, **rest
        )
        output.logits = output.logits * 0.5
        return output

class OddForSequenceClassification(LlamaPreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **rest):
        hidden = self.model(input_ids, attention_mask, **rest).last_hidden_state
        last = attention_mask.sum(-1) - 1
        return SequenceClassifierOutput(logits=self.score(hidden)[torch.arange(len(last)), last])
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


def odd_folder(folder: Path, head: str = "CausalLM", **overrides: Any) -> Path:
    """A model whose classes transformers has not; its logits are half of Llama's."""
    model = tiny("llama", **overrides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = {"AutoConfig": "configuration_odd.OddConfig"}
    names |= {f"AutoModelFor{kind}": f"modeling_odd.OddFor{kind}" for kind in ("CausalLM", "SequenceClassification")}
    change(folder / "config.json", model_type="odd", auto_map=names, architectures=[f"OddFor{head}"])
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OddTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_odd.OddTokenizer"]},
    )
    for name, text in (("configuration", CONFIG), ("modeling", MODEL), ("tokenization", TOKENIZER)):
        (folder / f"{name}_odd.py").write_text(text)
    return folder


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    return odd_folder(tmp_path / "odd")


def law(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 13, 20]])).logits


def test_code_is_not_run_unless_it_is_trusted(odd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (odd / "configuration_odd.py").write_text("print('RUN')\n" + CONFIG)
    for load in (
        lambda: load_policy(ModelSettings(path=str(odd))),
        lambda: load_config(str(odd)),
        lambda: load_base(ModelSettings(path=str(odd)), "policy"),
    ):
        with pytest.raises(UserError, match=r"model.path: .* code that lies beside it, .* model.trust_remote_code") as found:
            load()
        assert len(str(found.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"reward\[0\].path: .* unless reward\[0\].trust_remote_code"):
        build_reward([{"name": "odd", "kind": "model", "path": str(odd)}], policy=None)
    assert "RUN" not in capfd.readouterr().out


def test_a_known_kind_of_model_keeps_its_own_class_where_code_lies_beside_it(tmp_path: Path) -> None:
    folder = odd_folder(tmp_path / "known")
    change(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map={})
    assert auto_classes.head_of(load_config(str(folder))) == "causal"
    plain = load_policy(ModelSettings(path=str(folder)))
    assert type(plain.core).__module__.startswith("transformers.models.llama")
    assert torch.equal(law(plain.model), law(tiny("llama")))


@pytest.mark.parametrize("read", [True, False])
def test_trusted_code_is_the_model(odd: Path, read: bool) -> None:
    policy = load_policy(ModelSettings(path=str(odd), trust_remote_code=True), read=read)
    assert type(policy.core).__name__ == "OddForCausalLM" and type(policy.tokenizer).__name__ == "OddTokenizer"
    assert torch.allclose(law(policy.model), law(tiny("llama")) * 0.5)
    assert policy.hub.trust_remote_code and "server runs none of that" in " ".join(refusals(policy))
    assert type(load_tokenizer(ModelSettings(path=str(odd), trust_remote_code=True))).__name__ == "OddTokenizer"


@pytest.mark.parametrize("peft", [None, {**LORA, "target_modules": ["q_proj"]}], ids=["full", "lora"])
def test_a_run_leaves_what_loads_with_its_code_and_goes_on(odd: Path, tmp_path: Path, peft: Any) -> None:
    """In a folder elsewhere: the code goes with the model. Two steps and two more are four."""

    def run(name: str, steps: int, **settings: Any) -> Any:
        torch.manual_seed(0)
        policy = with_peft(load_policy(ModelSettings(path=str(odd), trust_remote_code=True), read=False), peft)
        ppo.train(
            policy,
            prompts_of(policy),
            share_of_threes,
            Sampling(max_new_tokens=5),
            PPOSettings(steps=steps, rollouts_per_step=8, minibatches=2, epochs=1, eval_prompts=0, value=str(odd)),
            RunSettings(dir=str(tmp_path / name), save_every=2, **settings),
        )
        return policy

    left = run("whole", 4)
    run("cut", 2)
    again = run("cut", 4, resume=True)
    assert torch.equal(law(again.model), law(left.model))
    folder = tmp_path / "whole" / "model"
    if peft is None:
        odd.rename(tmp_path / "gone")
        assert {"configuration_odd.py", "modeling_odd.py", "tokenization_odd.py"} <= {path.name for path in folder.iterdir()}
    loaded = load_policy(ModelSettings(path=str(folder), trust_remote_code=True))
    assert torch.allclose(law(loaded.model), law(left.model), atol=1e-6)
    if peft is None:
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.allclose(law(theirs), law(left.model), atol=1e-6)


def test_a_reward_model_of_its_own_code(tmp_path: Path) -> None:
    """Its score is that of a state and a row of numbers, looked up by hand."""
    folder = odd_folder(tmp_path / "scorer", "SequenceClassification", num_labels=1)
    weights, row = load_file(folder / "model.safetensors"), torch.linspace(-1, 1, 32)
    save_file({**weights, "score.weight": row[None]}, folder / "model.safetensors", {"format": "pt"})
    reward = build_reward(
        [{"name": "odd", "kind": "model", "path": str(folder), "trust_remote_code": True, "tokens": "ids"}],
        policy=tiny_policy("llama"),
    )
    rollout = Rollout.of_ids([[5, 6]], [[9, 13, 20]])
    texts = Texts(prompts=["ab"], prompt_texts=["ab"], completions=["xyz"])
    trunk = tiny("llama").model
    expected = trunk(input_ids=torch.tensor([[5, 6, 9, 13, 20]])).last_hidden_state[0, -1] @ row
    assert torch.allclose(reward(rollout, texts).total_B, expected.detach()[None], atol=1e-5)


# -- revisions: no hub can be reached here, so what would be asked of it is looked at --------------------------------------


def test_a_revision_is_asked_for_everywhere_and_of_folders_refused(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []

    def noting(auto: Any, name: str) -> None:
        def from_pretrained(path: str, **given: Any) -> Any:
            if path == "owner/odd":
                asked.append((name, given.pop("revision", None)))
            return real(str(odd) if path == "owner/odd" else path, **given)

        real = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)

    transformers = sys.modules["transformers"]
    noting(transformers.AutoConfig, "config")
    noting(transformers.AutoTokenizer, "tokenizer")
    noting(auto_classes.HEADS["causal"], "weights")
    settings = ModelSettings(path="owner/odd", revision="v2", trust_remote_code=True)
    policy = load_policy(settings)
    assert set(asked) == {("config", "v2"), ("tokenizer", "v2"), ("weights", "v2")}
    assert policy.hub.revision == "v2"
    adapted = with_peft(policy, {**LORA, "target_modules": ["q_proj"]})
    assert adapted.model.active_peft_config.revision == "v2"
    with pytest.raises(UserError, match=r"model.revision: 'v2' has no effect on .*leave it out"):
        load_policy(ModelSettings(path=str(odd), revision="v2", trust_remote_code=True))


def test_an_adapters_folder_says_of_what_revision_its_base_is(tmp_path: Path) -> None:
    model = adapters.add(tiny("llama"), Hub("v2").noted(LORA))
    adapters.save(model, tmp_path)
    change(tmp_path / "adapter_config.json", base_model_name_or_path="owner/odd")
    assert ModelSettings(path=str(tmp_path)).base() == ("owner/odd", str(tmp_path), Hub("v2"))
    assert ModelSettings(path=str(tmp_path), revision="v3").base()[2] == Hub("v3")


def test_the_commit_is_what_the_config_says(odd: Path) -> None:
    config = load_config(str(odd), hub=Hub(trust_remote_code=True))
    assert compat.commit(config) == ""
    config._commit_hash = "abc"
    assert compat.commit(config) == "abc"
