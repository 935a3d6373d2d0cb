"""Vector files: written, read, refused; contrastive pairs to directions; the effect curve."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from steerl.rollout.analysis.steering_effect import CurvePoint, effect_curve, kl_from_plain, strength_for
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import locate, stacks
from steerl.rollout.steering.spec.spec import Site
from steerl.rollout.steering.vectors.extract import Pair, activations, direction, directions, read_pairs
from steerl.rollout.steering.vectors.files import save_vector
from tests import warm
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.rollout.definitions import alone_logits, real_prompt, real_response
from tests.rollout.steering.helpers import parameters_of, vector


def steered(model, file: Path, **fields) -> list[torch.Tensor]:
    site = {"at": {"layers": [0, 1]}, "vector": {"file": str(file), **fields}}
    return [held["vector"] for held in Steering(model, {"sites": [site]}).sites[0].held]


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_written_and_read_back(ending: str, tmp_path: Path) -> None:
    model = tiny("llama")
    tensors = {0: torch.tensor(vector(1)), 1: torch.tensor(vector(2))}
    file = save_vector(tmp_path / f"v{ending}", tensors, {"method": "by hand"}, model)
    for found, wanted in zip(steered(model, file), tensors.values(), strict=True):
        assert torch.equal(found, wanted)
    if ending == ".safetensors":
        with safe_open(file, "pt") as opened:
            notes = opened.metadata()
            assert set(opened.keys()) == {"0", "1"}
        assert (
            notes["method"] == "by hand" and notes["model"].startswith("llama:32:2:64:") and json.loads(notes["norm"])["1"] > 0
        )


def test_a_file_s_layer_of_zeros_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training may leave one that never moved; as a direction it would still be nonsense."""
    model = tiny("llama")
    file = save_vector(tmp_path / "v.safetensors", {0: torch.tensor(vector(1)), 1: torch.zeros(32)}, {}, model)
    assert not steered(model, file)[1].any()
    assert "sites[0].vector: all zeros at layer 1; it would change nothing" in caplog.text
    with pytest.raises(UserError, match="all zeros at layer 1"):
        Steering(model, {"sites": [{"at": {"layers": [0, 1]}, "op": {"type": "ablate"}, "vector": {"file": str(file)}}]})


def test_gguf_is_a_control_vector(tmp_path: Path) -> None:
    import gguf

    save_vector(tmp_path / "v.gguf", {1: torch.ones(32)}, {}, tiny("llama"))
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 1
    assert [t.name for t in reader.tensors] == ["direction.1"]


def test_pyvene_folders(tmp_path: Path) -> None:
    """As pyvene 0.1.8 saves them: config.json and intkey_*.bin; the rotation behind its parametrization."""
    (tmp_path / "config.json").write_text("{}")
    torch.save(
        {"source_representation": torch.tensor([vector(1)])},
        tmp_path / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin",
    )
    torch.save(
        {"source_representation": torch.tensor([vector(2)])},
        tmp_path / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin",
    )
    found = steered(tiny("llama"), tmp_path)
    torch.testing.assert_close(torch.stack(found), torch.tensor([vector(1), vector(2)]))

    class Rotate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linalg.qr(torch.randn(32, 3))[0])

    low = torch.nn.Module()
    low.rotate_layer = torch.nn.utils.parametrizations.orthogonal(Rotate())
    folder = tmp_path / "low"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(low.state_dict(), folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    from steerl.rollout.steering.vectors.files import read_tensors

    tensors, _ = read_tensors(folder, "x")
    torch.testing.assert_close(tensors["0.rotation"], low.rotate_layer.weight.detach(), atol=1e-6, rtol=0.0)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model, file = tiny("llama"), tmp_path / "v.safetensors"
    for tensors, words in (
        (
            {"0": torch.ones(16), "1": torch.ones(16)},
            "is 16 wide, and the model's activation at layer 0 is 32 wide; it was made for another model",
        ),
        ({"0": torch.ones(32)}, "has no vector for layer 1; it holds layers [0]"),
        ({"0": torch.ones(32), "1": torch.full((32,), float("nan"))}, "holds NaN or infinity for layer 1"),
        ({"0": torch.ones(4, 32), "1": torch.ones(32)}, "holds a tensor of shape (4, 32) for layer 0"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError) as caught:
            steered(model, file)
        assert words in str(caught.value) and "sites[0].vector" in str(caught.value) and str(file) in str(caught.value)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a safetensors file"):
        steered(model, tmp_path / "bad.safetensors")
    (tmp_path / "bad.gguf").write_bytes(b"nothing at all, truly")
    with pytest.raises(UserError, match="is not a GGUF file"):
        steered(model, tmp_path / "bad.gguf")
    with pytest.raises(UserError, match="holds one vector per layer"):
        save_vector(tmp_path / "x.gguf", {"name": torch.ones(3)}, {})


def test_parameters_of_the_wrong_shape(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    good = {k: v.contiguous() for k, v in parameters_of("loreft").items()}
    site = {"at": {"layers": [0]}, "op": {"type": "loreft"}, "vector": {"file": str(file)}}
    save_file(good, file)
    Steering(tiny("llama"), {"sites": [site]})
    save_file({**good, "rotation": torch.ones(16, 3)}, file)
    with pytest.raises(UserError, match=r"tensor 'rotation' has shape \(16, 3\); layer 0 needs 32 x 3"):
        Steering(tiny("llama"), {"sites": [site]})
    save_file({k: v for k, v in good.items() if k != "bias"}, file)
    with pytest.raises(UserError, match="has no tensor 'bias' for layer 0; op loreft needs weight, bias, rotation"):
        Steering(tiny("llama"), {"sites": [site]})


# -- directions ---------------------------------------------------------------------------------------------------------------

PAIRS = [Pair("good " + end, "bad " + end, "say ") for end in ("x", "yy", "z z", "cat", "dog", "we")]


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 20.0]}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "phi3"])
@pytest.mark.parametrize("position", ["last", "mean"])
def test_activations_are_those_of_each_text_alone(family: str, position: str) -> None:
    """Where longer texts have other factors (longrope beyond 10 tokens), too."""
    rope = {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 10}, "original_max_position_embeddings": 10}
    model, tokenizer = tiny(family, **(rope if family == "phi3" else {})), tiny_tokenizer()
    points = locate(model, At(layers="all"))
    texts = [(p.prompt, p.positive) for p in PAIRS]
    found = activations(model, tokenizer, texts, points, position, batch=4)
    name = "decoder_hidden_states" if family == "t5" else "hidden_states"
    for row, (prompt, text) in enumerate(texts):
        start, rest = tokenizer(prompt)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            if family == "t5":
                out = model(
                    input_ids=torch.tensor([start]), decoder_input_ids=torch.tensor([[0, *rest]]), output_hidden_states=True
                )
                begin = 1
            else:
                out, begin = model(torch.tensor([start + rest]), output_hidden_states=True), len(start)
        block0 = out[name][1][0]
        wanted = block0[-1] if position == "last" else block0[begin:].mean(0)
        torch.testing.assert_close(found[row, 0], wanted, atol=1e-5, rtol=1e-5)


def test_mean_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(20, 6, generator=generator) + 1.0, torch.randn(20, 6, generator=generator)
    torch.testing.assert_close(direction(positive, negative, "mean_diff"), positive.mean(0) - negative.mean(0))


@pytest.mark.parametrize("method", ["mean_diff", "pca", "probe"])
def test_every_method_finds_a_planted_direction(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    planted = torch.randn(12, generator=generator)
    planted = planted / planted.norm()
    shared = torch.randn(200, 12, generator=generator)  # what both texts of a pair have in common
    side = torch.rand(200, 1, generator=generator) + 2.0
    noise = 0.3 * torch.randn(2, 200, 12, generator=generator)
    found = direction(shared + side * planted + noise[0], shared + noise[1], method)
    assert float(found @ planted / found.norm()) > 0.97
    assert 1.5 < float(found.norm()) < 3.5


def test_mean_diff_in_a_spec(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p.prompt, "positive": p.positive, "negative": p.negative}) for p in PAIRS))
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    steering = Steering(model, {"sites": [{"at": {"layers": [1]}, "vector": {"mean_diff": str(file)}}]}, tokenizer)
    expected = directions(model, tokenizer, PAIRS, locate(model, At(layers=(1,))), "mean_diff", "mean")
    assert torch.equal(steering.sites[0].held[0]["vector"], expected[0])
    with pytest.raises(UserError, match="needs a tokenizer"):
        Steering(model, {"sites": [{"at": {"layers": [1]}, "vector": {"mean_diff": str(file)}}]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"positive": "a"}', "needs positive and negative"),
        ("{", "is not JSON"),
        ("", "holds no pairs"),
        ('{"positive": "a", "negative": 3}', "both text"),
    ],
)
def test_bad_pairs(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        read_pairs(tmp_path / "p.jsonl")


# -- effect ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_kl_is_the_sum_over_the_vocabulary(family: str) -> None:
    policy = tiny_policy(family)
    steering = Steering(policy.model, {"role": "data", "sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 1.5}]})
    settings = Sampling(n=1500, max_new_tokens=3, batch_size=1500)
    rollout, _ = Sampler(policy, settings, steering).sample(PromptBatch.of_ids([[5, 6, 7]]))
    exact = kl_from_plain(policy, steering, rollout).sum(1).mean()
    drawn = (rollout.behaviour_logprobs_BR - rollout.policy_logprobs_BR).sum(1)
    assert abs(float(exact - drawn.mean())) < 4.0 * float(drawn.std()) / 1500**0.5
    plain = teacher_forced(policy, rollout)
    torch.testing.assert_close(rollout.policy_logprobs_BR, plain.logprobs_BR, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("family", ["llama", "xlm-roberta", "recurrent_gemma"])
def test_the_distance_of_laws_is_that_of_each_row_alone(family: str) -> None:
    """Definition: two passes over the unpadded row, one with the vector added to the block's output by hand. For a model that
    counts positions from behind its pad, and one that takes no padding, too."""
    if family == "xlm-roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = AutoConfig.for_model(
            family, vocab_size=64, is_decoder=True, max_position_embeddings=40, pad_token_id=1, **sizes
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            torch.nn.init.normal_(parameter, std=0.2)
        policy = Policy.of(model, tiny_tokenizer())
    else:
        policy = tiny_policy(family)
    where = {"prompt": "all", "steps": "all"}
    site = {"at": {"layers": [0]}, "vector": {"values": vector()}, "strength": 1.5, "where": where}
    steering = Steering(policy.model, {"role": "data", "sites": [site]})
    rollout, _ = Sampler(policy, Sampling(max_new_tokens=5, temperature=0.8), steering).sample(
        PromptBatch.of_ids([[5, 6, 7], [9, 8, 10, 11, 12, 13, 14], [20]])
    )
    found = kl_from_plain(policy, steering, rollout)
    plain = copy.deepcopy(policy.model)
    block = stacks(plain)["decoder"].blocks[0]
    added = 1.5 * torch.tensor(vector())
    for row in range(len(rollout)):
        prompt, response = real_prompt(rollout, row), real_response(rollout, row)
        pi = torch.tensor(alone_logits(plain, prompt, response), dtype=torch.float64) / 0.8
        hook = block.register_forward_hook(
            lambda _, __, out: (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added
        )
        mu = torch.tensor(alone_logits(plain, prompt, response), dtype=torch.float64) / 0.8
        hook.remove()
        kl = (mu.softmax(-1) * (mu.log_softmax(-1) - pi.log_softmax(-1))).sum(-1)
        assert kl.max() > 0.05
        torch.testing.assert_close(found[row, : len(response)].double(), kl, atol=1e-5, rtol=1e-5)


def test_the_curve_and_the_strength_for_a_budget() -> None:
    policy = tiny_policy("llama")
    site = Site(name="x", at=At(layers=(0,)), vector={"values": vector()})
    curve = effect_curve(
        policy,
        site,
        PromptBatch.of_ids([[5, 6], [7, 8, 9]]),
        Sampling(n=8, max_new_tokens=4),
        [1.0, 2.0],
        lambda rollout, _: rollout.lengths_B.float(),
    )
    assert [p.strength for p in curve] == [0.0, 1.0, 2.0]
    assert curve[0].kl_per_sequence == 0.0 < curve[1].kl_per_sequence < curve[2].kl_per_sequence
    quadratic = [CurvePoint(s, 0.0, 0.0, 0.5 * s * s) for s in (0.0, 1.0, 3.0)]
    assert strength_for(quadratic, 2.0) == pytest.approx(2.0)
    assert strength_for(quadratic, 9.0) is None


@pytest.mark.slow
def test_the_door(tmp_path: Path) -> None:
    """scripts/extract_steering.py: the file, the effect, and bad flags told in one line each with status 2."""
    tiny("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p.prompt, "positive": p.positive, "negative": p.negative}) for p in PAIRS)
    )
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(4)))
    (tmp_path / "measure.py").write_text(
        "def count(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    reward = json.dumps([{"name": "long", "kind": "function", "function": f"{tmp_path}/measure.py:count", "weight": 1.0}])
    command = [sys.executable, "scripts/extract_steering.py", "--config", "configs/steering.yaml", "--model.path", str(tmp_path / "m"),
               "--extract.pairs", str(tmp_path / "pairs.jsonl"), "--extract.out", str(tmp_path / "v.safetensors")]  # fmt: skip
    done = warm.run(
        [*command, "--prompts.path", str(tmp_path / "prompts.jsonl"), "--reward", reward, "--effect.strengths", "[1.0]"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "KL per response" in done.stdout
    effect = json.loads((tmp_path / "v.safetensors.effect.json").read_text())
    assert [p["strength"] for p in effect["curve"]] == [0.0, 1.0] and effect["curve"][1]["kl_per_sequence"] > 0
    found = steered(tiny("llama"), tmp_path / "v.safetensors")
    model = tiny("llama")
    expected = directions(model, tiny_tokenizer(), PAIRS[:5], locate(model, At(layers="all")), "mean_diff", "mean")
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    bad = warm.run([*command[:6], "--extract.out", "x.bin"])
    assert bad.returncode == 2
    lines = [line for line in bad.stderr.splitlines() if line.startswith("extract.")]
    assert [line.split(":")[0] for line in lines] == ["extract.pairs", "extract.out"] and "Traceback" not in bad.stderr
