"""Runs to the hub: the real client against a hub of our own, which says what came; the card, read by the hub's own reader."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.training.run import card, hub
from tests import warm
from tests.models import tiny
from tests.training.run.hub_server import running

BAD = "<script>alert(1) | `x` \n---\nlicense: evil \x1b[2J"
RUN = """
import json, sys
from pathlib import Path
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from tests.models import tiny_policy
from tests.ppo_runs import LORA, prompts_of, share_of_threes

folder, repo, peft = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
policy = with_peft(tiny_policy("gpt2"), LORA if peft else None)
if peft:
    policy.model.active_peft_config.base_model_name_or_path = "someone/base"
ppo = PPOSettings(steps=2, rollouts_per_step=8, minibatches=1, epochs=1, eval_prompts=4)
config = {"model": {"path": "someone/base"}, "ppo": {"steps": 2}, "run": {"push_to_hub": repo}, "prompts": {"path": "owner/data"}}
run = RunSettings(dir=str(folder), push_to_hub=repo)
train(policy, prompts_of(policy), share_of_threes, Sampling(max_new_tokens=5), ppo, run, config=config)
"""


HERE = """
import os
from huggingface_hub import constants
constants.HF_HUB_OFFLINE, constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = False, os.environ["HF_ENDPOINT"], True
"""
"""What the client reads of its environment when it is imported, which a warm process has done."""
PUSH = """
import sys
from steerl.cli import main
main(["push", *sys.argv[1:]])
"""


def environment(address: str, token: str = "hf_right") -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}


def push(env: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return warm.run([sys.executable, "-c", HERE + PUSH, *map(str, words)], env=env)


@pytest.fixture(scope="module")
def finished(made_once):
    """A run of a whole model and one of an adapter, offline."""

    def make(out: Path) -> None:
        for name, peft in (("whole", "false"), ("adapter", "true")):
            done = warm.run([sys.executable, "-c", RUN, str(out / name), "me/walks", peft])
            assert done.returncode == 0, done.stderr
            (out / f"{name}.err").write_text(done.stderr)

    return made_once("hub_runs", make)


def test_offline_a_run_says_what_it_would_send_and_how_it_is_sent(finished):
    told = (finished / "whole.err").read_text()
    assert "run.push_to_hub: offline" in told and "offline: not sent" in told
    size = (finished / "whole/model/model.safetensors").stat().st_size
    assert "me/walks (private, if it is new): 6 files" in told and f"model.safetensors  {size:,} bytes" in told
    assert "next: steerl push " in told.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_run_and_a_push_send_the_model_whole_in_one_commit(finished, tmp_path):
    with running() as ours:
        env = environment(ours.address)
        done = warm.run([sys.executable, "-c", HERE + RUN, str(tmp_path / "run"), "me/walks", "false"], env=env)
        assert done.returncode == 0 and "sent" in done.stderr, done.stderr
        assert ours.repos == {"me/walks": True} and ours.commits == 1
        sent = dict(ours.files["me/walks"])
        model = tmp_path / "run/model"
        assert sent == {path.name: path.read_bytes() for path in model.iterdir() if path.name != "README.md"} | {
            "README.md": sent["README.md"]
        }
        # what came is a model
        (tmp_path / "there").mkdir()
        for name, content in sent.items():
            (tmp_path / "there" / name).write_bytes(content)
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there").config.model_type == "gpt2"
        # in a process of its own, by the environment alone
        command = [sys.executable, "-m", "steerl", "push", tmp_path / "run", "--repo", "you/other", "--private", "false"]
        again = subprocess.run(command, env=env, capture_output=True, text=True)
        assert again.returncode == 0 and f"sent: {ours.address}/you/other/commit/" in again.stdout
        assert ours.repos["you/other"] is False and set(ours.files["you/other"]) == set(sent)
        # a repository that is public already does not get what was to be private; weights of another layout do not stay
        refused = push(env, tmp_path / "run", "--repo", "you/other")
        assert refused.returncode == 2 and "you/other is public, and the model was to be private" in refused.stderr
        ours.files["me/walks"] |= {
            "model-00001-of-00002.safetensors": b"old",
            "model.safetensors.index.json": b"{}",
            "kept.md": b"x",
        }
        assert push(env, tmp_path / "run").returncode == 0
        assert set(ours.files["me/walks"]) == {*sent, "kept.md"}
        ours.commits = 2
        # a dry run sends nothing, and says the same
        dry = push(env, finished / "whole", "--dry_run", "true")
        assert dry.returncode == 0 and "not sent: a dry run" in dry.stdout and ours.commits == 2


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line_and_nothing_is_lost(finished, tmp_path):
    told = {
        "/api/": {401: "the token is not valid"},
        "/repos/create": {403: "the token may not write there", 404: "there is no such owner"},
        "/commit/": {403: "the token may not write there", 400: "the hub answered"},
    }
    with running() as ours:
        env = environment(ours.address)
        for path, answers in told.items():
            for status, words in answers.items():
                ours.fails = {path: status}
                done = push(env, finished / "whole")
                assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
                assert words in done.stderr and "me/walks" in done.stderr, done.stderr
        ours.fails = {}
        # before the first step: a token that is none
        done = warm.run(
            [sys.executable, "-c", HERE + RUN, str(tmp_path / "run"), "me/walks", "false"], env={**env, "HF_TOKEN": "hf_x"}
        )
        assert (
            "run.push_to_hub: me/walks: the token is not valid" in done.stderr and not (tmp_path / "run/metrics.jsonl").exists()
        )
        ours.role = "read"
        done = warm.run([sys.executable, "-c", HERE + RUN, str(tmp_path / "run"), "me/walks", "false"], env=env)
        assert "run.push_to_hub: me/walks: the token may only read" in done.stderr
        ours.role = "write"
        # after the last: the run is whole
        ours.fails = {"/commit/": 403}
        done = warm.run([sys.executable, "-c", HERE + RUN, str(tmp_path / "run"), "me/walks", "false"], env=env)
        assert "steerl push" in done.stderr and json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 2
        ours.fails = {}
        assert push(env, tmp_path / "run").returncode == 0
    done = push({**env, "HF_ENDPOINT": "http://127.0.0.1:9"}, finished / "whole")
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr


def test_a_card_that_its_owner_wrote_on_goes_as_it_is(finished, tmp_path):
    shutil.copytree(finished / "adapter", tmp_path / "run")
    file = tmp_path / "run/model/README.md"
    file.write_text(
        file.read_text().replace("## Load it", "Mine.\n\n## Load it").replace("pipeline_tag", "license: mit\npipeline_tag")
    )
    sent = hub.prepare(tmp_path / "run", "me/x", base="owner/other").files["README.md"]
    own = ModelCard(sent.decode())
    assert "Mine." in own.text and own.data.license == "mit" and own.data.base_model == "owner/other"
    assert 'PeftModel.from_pretrained(base, "me/x")' in own.text and "OWNER/NAME" not in own.text


def test_a_base_in_the_hubs_cache_is_known_by_its_name(finished, tmp_path):
    shutil.copytree(finished / "adapter", tmp_path / "run")
    file = tmp_path / "run/model/adapter_config.json"
    cached = str(tmp_path / "hub/models--owner--base/snapshots/abc")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": cached}))
    assert (
        json.loads(hub.prepare(tmp_path / "run", "me/x").files["adapter_config.json"])["base_model_name_or_path"]
        == "owner/base"
    )
    hub.check_base(RunSettings(dir="x", push_to_hub="me/x"), cached)


def test_an_adapter_goes_with_the_name_of_its_base_alone(finished):
    folder = finished / "adapter"
    config = folder / "model/adapter_config.json"
    before = config.read_bytes()
    local = json.loads(before) | {"base_model_name_or_path": str(finished)}
    config.write_text(json.dumps(local))
    try:
        with pytest.raises(UserError, match="which others do not have; say what it is called on the hub, --base_model"):
            hub.prepare(folder, "me/x")
        made = hub.prepare(folder, "me/x", base="owner/base")
    finally:
        config.write_bytes(before)
    sent = json.loads(made.files["adapter_config.json"])
    assert sent == local | {"base_model_name_or_path": "owner/base"}
    own = ModelCard(made.files["README.md"].decode())
    assert own.data.base_model == "owner/base" and own.data.library_name == "peft" and "lora" in own.data.tags
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in own.text and str(finished) not in own.content
    assert load_file(folder / "model/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: (run / "summary.json").unlink(), "not finished .no summary.json."),
        (lambda run: shutil.rmtree(run / "model"), "has no model yet"),
        (lambda run: (run / "model/model.safetensors").unlink(), "no weights as safetensors"),
        (lambda run: shutil.rmtree(run), "there is no such folder"),
    ],
)
def test_what_cannot_be_sent(finished, tmp_path, change, told):
    shutil.copytree(finished / "whole", tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(UserError, match=told) as caught:
        hub.prepare(tmp_path / "run", "me/x")
    assert len(caught.value.lines) == 1


def test_pickles_and_hidden_files_stay_here(finished, tmp_path):
    shutil.copytree(finished / "whole/model", tmp_path / "model")
    for name in ("training_args.BIN", "old.pt", ".secret", "notes.txt"):
        (tmp_path / "model" / name).write_text("x")
    torch.save({"a": torch.ones(2)}, tmp_path / "model/state")
    (tmp_path / "model/plain").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    made = hub.prepare(tmp_path / "model", "me/x")  # a model's own folder
    assert (
        made.skipped == ["old.pt", "plain", "state", "training_args.BIN"]
        and "notes.txt" in made.files
        and ".secret" not in made.files
    )
    assert "  old.pt  is left out: pickled" in made.lines


@pytest.mark.parametrize("name", ["a/b/c", "me/x y", "-me/x", "me/" + 100 * "x"])
def test_names_that_the_hub_would_not_take(name):
    with pytest.raises(UserError, match="is no name of the hub; give OWNER/NAME"):
        hub.check(RunSettings(dir="x", push_to_hub=name))


def test_an_adapter_that_others_could_not_load_is_told_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="leaves an adapter of /somewhere, which others do not have; set ppo.export_merged"):
        hub.check_base(RunSettings(dir="x", push_to_hub="me/x"), "/somewhere")
    hub.check_base(RunSettings(dir="x"), "/somewhere")


def test_private_without_a_push_has_no_effect():
    with pytest.raises(UserError, match="run.hub_private: false has no effect without run.push_to_hub"):
        RunSettings(dir="x", hub_private=False)


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_of_a_run_is_read_by_the_hubs_own_reader(finished):
    found = ModelCard.load(finished / "whole/model/README.md")
    assert found.data.base_model == "someone/base" and found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "text-generation" and found.data.tags == ["steerl", "ppo"]
    assert found.data.datasets == ["owner/data"]
    summary = json.loads((finished / "whole/summary.json").read_text())
    first, last = (json.loads(line) for line in (finished / "whole/metrics.jsonl").read_text().splitlines())
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.text.splitlines() if line.startswith("|")]
    table = {row[0].strip("`"): row[1:] for row in cells}
    assert table["reward"] == [f"{summary['reward_before']:.4g}", f"{summary['reward_after']:.4g}"]
    assert table["reward/mean"] == [f"{first['reward/mean']:.4g}", f"{last['reward/mean']:.4g}"]


def test_what_others_named_breaks_neither_the_card_nor_a_browser(tmp_path):
    import markdown

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    config = {
        "model": {"path": f"/place/someone/secret/{BAD}"},
        "prompts": {"path": ["/place/someone/private.jsonl", {"path": BAD, "weight": 2}]},
        "reward": [
            {"name": BAD, "kind": "function", "function": "/place/someone/reward.py:f", "weight": 2.0},
            {"name": "far", "kind": "http", "url": "http://10.0.0.7:8000"},
        ],
        "ppo": {"steps": 3, "loss": BAD},
    }
    text = card.card(tmp_path, {"reward_after": 0.5, "reward_before": None, "kl_after": float("nan")}, config)
    found = ModelCard(text)
    assert found.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"} and "\x1b" not in text
    assert (
        "10.0.0.7" not in text
        and "/place" not in text
        and "secret" not in text
        and "`reward.py:f`" in text
        and "`private.jsonl`" in text
    )
    page = markdown.markdown(found.text, extensions=["tables", "fenced_code"])
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("steering", "kept", "told"),
    [
        ({"role": "behaviour", "correction": {"type": "token_mask"}}, False, "It took part in training alone"),
        ({"role": "policy", "on_deploy": "keep"}, True, "`steering.yaml` and its vectors lie beside the weights"),
        ({"role": "policy", "on_deploy": "fold"}, False, "It is folded into the biases"),
    ],
)
def test_the_card_says_what_became_of_the_steering(tmp_path, steering, kept, told):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    if kept:
        (tmp_path / "model/steering.yaml").write_text("{}")
    site = {"name": "cheer", "at": {"layers": [1]}, "vector": [1.0, 0.0], "strength": 1.0}
    text = card.card(tmp_path, {}, {"ppo": {}, "steering": {**steering, "sites": [site]}})
    assert told in text and f"role `{steering['role']}`, at `cheer`" in text and "steering" in ModelCard(text).data.tags


@pytest.mark.parametrize(
    ("family", "config", "line"),
    [
        ("t5", {"sft": {}}, "AutoModelForSeq2SeqLM.from_pretrained"),
        ("llama", {"reward_model": {}}, "AutoModelForCausalLM.from_pretrained"),
    ],
)
def test_the_card_loads_the_kind_of_model_that_lies_there(tmp_path, family, config, line):
    tiny(family).save_pretrained(tmp_path / "model")
    text = card.card(tmp_path, {}, config)
    assert line in text
    own = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(own | {"architectures": ["LlamaForSequenceClassification"]}))
    if family == "llama":
        assert "AutoModelForSequenceClassification" in card.card(tmp_path, {}, config)
        assert ModelCard(card.card(tmp_path, {}, config)).data.pipeline_tag == "text-classification"


def test_a_base_that_was_trained_here_is_that_of_its_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: owner/first\n---\n# x\n")
    assert card.base_of({}, {"model": {"path": str(tmp_path)}}) == "owner/first"
    assert card.base_of({}, {}) is None
