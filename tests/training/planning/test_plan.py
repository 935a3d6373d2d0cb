"""The plan: every formula against a definition of its own (real models, real caches, real optimizers), the plan against a step."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from steerl.configs.reader import read, run_command

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import ModelSettings
from steerl.scripts import plan as plan_door
from steerl.scripts.train_ppo import PPOJob
from steerl.training.model import value_model
from steerl.training.planning.hardware import GIGA, GPUS, TERA, Machines, measure_device
from steerl.training.planning.memory import ENGINES, PlannedStep, memory
from steerl.training.planning.passes import Blueprint, cache_bytes, count, plain_pass, training_pass
from steerl.training.planning.plan import LORA, advise, flags, rows
from steerl.training.planning.time import Shares, seconds, sent
from steerl.training.settings import PPOSettings
from tests.models import tiny

ROOT = Path(__file__).parents[3]
# What its makers publish; rope_theta and the like change no size.
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
HOPPER = Machines(8, 1, 80 * GIGA, 989 * TERA, 3350 * GIGA, 450 * GIGA, 50 * GIGA)


def blueprint(model, peft=None) -> Blueprint:
    kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
    return Blueprint(model.config, kind, torch.float32).with_peft(peft)


def work_of(drawn: Blueprint, precision="bf16", prompt=32, response=32, batch=8, **settings) -> PlannedStep:
    ppo = PPOSettings(**{"rollouts_per_step": 64, "minibatches": 4, "micro_batch_size": 4, **settings})
    value = drawn if ppo.credit == "gae" and ppo.value == "separate" else None
    return PlannedStep(drawn, value, ppo, Sampling(max_new_tokens=response, batch_size=batch), prompt, precision)


# -- counts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "mixtral"])
@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 4}])
def test_counts_are_the_real_models(family, peft):
    if family == "mixtral" and peft:
        pytest.skip("peft has no default targets for it")
    model = tiny(family)
    found = count(blueprint(model, peft))
    trunk = copy.deepcopy(model)
    if peft:
        model, trunk = adapters.add(model, peft), adapters.add(trunk, peft).get_base_model()
    value_model.strip(trunk)
    assert found.all == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.bytes == sum(p.nbytes for p in model.parameters())
    assert found.value_bytes == sum(p.nbytes for p in trunk.parameters())
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert found.trains_head == (peft is None)
    assert (found.vocabulary, found.width) == tuple(model.get_output_embeddings().weight.shape)


# -- caches and activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_cache_bytes_are_those_of_a_real_cache(family):
    model = tiny(family)
    prompt, response, batch = 9, 12, 3
    if family == "t5":
        out = model(
            input_ids=torch.ones(batch, prompt, dtype=torch.long),
            decoder_input_ids=torch.ones(batch, response, dtype=torch.long),
        )
        caches = [out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache]
    else:  # the last token is drawn and never read
        caches = [DynamicCache(config=model.config)]
        model(input_ids=torch.ones(batch, prompt + response - 1, dtype=torch.long), past_key_values=caches[0])
    real = sum(
        part.untyped_storage().nbytes() for cache in caches for layer in cache.layers for part in (layer.keys, layer.values)
    )
    if family == "t5":
        real += out.encoder_last_hidden_state.nbytes
    assert cache_bytes(blueprint(model), batch, prompt, response) == real


def saved_by_autograd(model, ids, mask) -> tuple[float, torch.Tensor]:
    """Bytes that the graph of a forward pass up to the head holds, weights and inputs aside; the head's input."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids, mask)}
    held: dict[int, torch.Tensor] = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in known and tensor.numel():
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return float(sum(tensor.untyped_storage().nbytes() for tensor in held.values())), out


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 4}])
@pytest.mark.parametrize(("family", "fields"), [("llama", {"num_hidden_layers": 6}), ("gpt2", {"n_layer": 5})])
def test_activations_are_what_autograd_saves(family, fields, peft):
    """Through more layers and rows than the plan looks at."""
    model = tiny(family, **fields)
    drawn = blueprint(model, peft)
    taught = adapters.add(model, peft) if peft else model
    value_model.strip(taught.get_base_model() if peft else taught)
    batch, prompt, response = 5, 20, 13
    ids = torch.ones(batch, prompt + response - 1, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    real, _ = saved_by_autograd(taught, ids, mask)
    planned = training_pass(drawn, batch, prompt, response)
    hidden = batch * (prompt + response - 1) * 32 * 4
    assert abs(planned.saved - real) <= 2 * hidden, (planned.saved / real, real / hidden)
    assert planned.saved <= planned.peak <= 1.5 * planned.saved


def test_recomputation_keeps_the_layers_inputs_and_one_layer():
    drawn = blueprint(tiny("llama", num_hidden_layers=12, hidden_size=64, intermediate_size=192))
    whole, again = (training_pass(drawn, 4, 16, 17, checkpointing=checkpointing) for checkpointing in (False, True))
    inputs = 12 * 4 * 32 * 64 * 4
    assert inputs <= again.saved <= inputs * 1.5
    assert again.peak < whole.peak / 3
    forward = plain_pass(drawn, 4, 16, 17).operations
    assert again.operations == pytest.approx(whole.operations + forward)


def test_operations_are_two_per_weight_and_token_and_the_attention():
    model = tiny("llama", num_hidden_layers=4)
    drawn = blueprint(model)
    embedded = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - embedded
    batch, length, heads, width = 3, 24, 4, 8
    attention = 4 * batch * heads * (2 * length * length * 2 * width) / 2  # half of the square, scores and mixing
    forward = plain_pass(drawn, batch, 12, 13).operations
    assert forward == pytest.approx(2 * batch * length * matrices + attention, rel=0.01)
    assert training_pass(drawn, batch, 12, 13).operations == pytest.approx(3 * forward, rel=0.05)


# -- what stands for every weight ------------------------------------------------------------------------------------------


def test_optimizer_and_gradients_are_those_of_a_real_step():
    model = tiny("llama")
    drawn = blueprint(model)
    trunk = copy.deepcopy(model)
    value_model.strip(trunk)
    head = torch.nn.Linear(32, 1)
    trained = [*model.parameters(), *trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    gradients = sum(parameter.grad.nbytes for parameter in trained)
    found = memory(work_of(drawn, "no"), "ddp", 1).parts
    assert found["optimizer"] == pytest.approx(states, rel=1e-3)
    assert found["gradients"] == pytest.approx(gradients, rel=1e-3)
    assert found["weights"] == found["reference"] == sum(p.nbytes for p in model.parameters())
    assert found["value"] == sum(p.nbytes for p in trunk.parameters())


@pytest.mark.parametrize("ranks", [1, 4, 16])
def test_bytes_per_weight_are_those_of_zero(ranks):
    """16 bytes a weight in mixed precision, of which each stage spreads more."""
    drawn = blueprint(tiny("gpt2"))
    psi = count(drawn).all
    work = work_of(drawn, credit="rloo", reference="none")
    per_weight = {
        "zero1": (2, 2, 12 / ranks),
        "zero2": (2, 2 / ranks, 12 / ranks),
        "zero3": (2 / ranks, 2 / ranks, 12 / ranks),
        "fsdp2": (4 / ranks, 4 / ranks, 8 / ranks),
        "ddp": (4, 4, 8),
    }
    for engine, expected in per_weight.items():
        found = memory(work, engine, ranks).parts
        assert [found[name] / psi for name in ("weights", "gradients", "optimizer")] == pytest.approx(expected), engine


def test_settings_move_the_parts_they_are_about():
    drawn = blueprint(tiny("llama", num_hidden_layers=8))
    base = memory(work_of(drawn), "ddp", 2)
    shared = memory(work_of(drawn, value="shared"), "ddp", 2)
    assert shared.parts["value"] == 0
    assert shared.parts["activations"] < 0.7 * base.parts["activations"]
    assert memory(work_of(drawn, reference="none"), "ddp", 2).parts["reference"] == 0
    adapted = memory(work_of(drawn.with_peft(LORA)), "ddp", 2)
    assert adapted.parts["reference"] == 0, "the base is there: with its adapter off it is the reference"
    assert adapted.parts["optimizer"] < base.parts["optimizer"] / 2
    half, quarter = (memory(work_of(drawn, micro_batch_size=size), "ddp", 2).parts["activations"] for size in (4, 2))
    casts = 2 * 2 * sum(p.numel() for p in tiny("llama", num_hidden_layers=8).parameters() if p.dim() == 2)
    assert half - quarter == pytest.approx((half - casts) / 2, rel=0.2)
    eighth = memory(work_of(drawn, optimizer="adamw8bit"), "ddp", 2)
    assert eighth.parts["optimizer"] == pytest.approx(base.parts["optimizer"] / 4, rel=1e-3)
    away, inputs = (memory(work_of(drawn, offload_activations=True, checkpointing=c), "ddp", 2) for c in (False, True))
    assert inputs.parts["activations"] <= away.parts["activations"] < base.parts["activations"] / 2
    assert memory(work_of(drawn, batch=16), "ddp", 1).parts["cache"] == 2 * memory(work_of(drawn), "ddp", 1).parts["cache"]
    phase, layers = (memory(work_of(drawn, gather=how), "zero3", 8).phases["sample"] for how in ("phase", "layers"))
    assert phase >= layers


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_rank_loads_its_share_and_one_tensor(precision):
    """Policy, value's trunk and reference, as real models have them; DeepSpeed's and the frozen reference in bfloat16."""
    model, trunk = tiny("llama"), tiny("llama")
    value_model.strip(trunk)
    policy, value = (sum(p.numel() for p in each.parameters()) for each in (model, trunk))
    largest = max(p.numel() for p in model.parameters())
    half = 2 if precision == "bf16" else 4
    of = {engine: memory(work_of(blueprint(model), precision), engine, 4).phases["load"] for engine in ENGINES}
    assert of["zero3"] == half * ((2 * policy + value) / 4 + largest)
    assert of["fsdp2"] == (4 * (policy + value) + half * policy) / 4 + 4 * largest
    assert of["zero1"] == of["zero2"] == half * (2 * policy + value + largest)
    assert of["ddp"] == 4 * (2 * policy + value + largest)


def test_sizes_of_buffers_are_those_of_the_accelerate_file(folder, tmp_path):
    """DeepSpeed's defaults where it says nothing; its own file where it names one."""
    sizes = {"stage": 3, "reduce_bucket_size": 1e6, "stage3_max_live_parameters": 2e6, "stage3_prefetch_bucket_size": 3e6}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": sizes}))
    (tmp_path / "named.yaml").write_text(
        json.dumps({"deepspeed_config": {"deepspeed_config_file": str(tmp_path / "zero.json")}})
    )
    model = ModelSettings(path=str(folder))

    def engine(file: Path | str) -> float:
        return memory(plan_door.work_of(plan_door.PlanJob(model=model, accelerate=str(file)), None), "zero3", 8).parts["engine"]

    largest = 128256 * 4096
    assert engine(tmp_path / "named.yaml") == 2 * (1e6 + 2e6 + 3e6 + largest)
    assert engine("") == engine(ROOT / "configs/accelerate/zero3.yaml") == 2 * (5e8 + 1e9 + 5e7 + largest)
    with pytest.raises(UserError, match=r"accelerate: '.*none.yaml' cannot be read"):
        engine(tmp_path / "none.yaml")


def test_a_base_in_few_bits_weighs_as_bitsandbytes_keeps_it(folder):
    """nf4, quantized twice: 32 bytes and one of scale for 64 weights, four more for 256 such scales; int8: a byte."""
    adapter, matrices = {"peft_type": "LORA", "r": 8}, 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    plain, nf4, int8 = (
        count(Blueprint.of(ModelSettings(path=str(folder), peft=adapter, quantization=kind))).bytes
        for kind in ("none", "nf4", "int8")
    )
    assert plain - nf4 == matrices * (2 - (33 + 4 / 256) / 64) and plain - int8 == matrices


# -- seconds -----------------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_a_rings_share():
    drawn = blueprint(tiny("gpt2"))
    work = work_of(drawn, credit="rloo", epochs=2, minibatches=4, micro_batch_size=2)
    psi, ranks = count(drawn).all, 4
    passes = 2 * 4 * (64 / 4 / ranks / 2)
    assert sent(work, "ddp", 1) == 0
    assert sent(work, "ddp", ranks) == pytest.approx(2 * 3 / 4 * 8 * 4 * psi)
    assert sent(work, "zero1", ranks) == pytest.approx(3 / 4 * 8 * (2 + 2) * psi)
    assert sent(work, "zero2", ranks) == pytest.approx(3 / 4 * (passes + 8) * 2 * psi)
    scoring = 64 / ranks / 2
    # the reference is spread like the policy: it comes together as often as the policy is scored
    assert sent(work, "zero3", ranks) == pytest.approx(3 / 4 * (passes * 3 + 2 * scoring + 1) * 2 * psi)


def test_seconds_are_bound_by_bandwidth_peak_and_launches():
    """Llama-3-8B: decoding a few rows reads its weights, learning multiplies by them; a tiny model waits for its kernels."""
    large = work_of(Blueprint(AutoConfig.for_model(**LLAMA_3_8B), "causal", torch.float32), credit="rloo", epochs=2)
    shares = Shares(decode=1.0, train=1.0, network=1.0, launch_us=0.1)
    found = seconds(large, "zero2", HOPPER, shares)
    read = 2 * (8.03e9 - 128256 * 4096)
    assert found.sample == pytest.approx(32 * read / 3350e9, rel=0.03)
    tokens = 2 * 64 / 8 * (32 + 31)  # two epochs, 63 positions a row
    assert found.learn == pytest.approx(6 * 7.5e9 * tokens / 989e12, rel=0.07)
    slower = seconds(large, "zero2", HOPPER, Shares(decode=0.5, train=0.5, network=1.0, launch_us=0.1))
    assert slower.sample == pytest.approx(2 * found.sample, rel=0.03) and slower.learn == pytest.approx(2 * found.learn)
    small = seconds(work_of(blueprint(tiny("llama"))), "ddp", HOPPER, Shares())
    assert small.sample == pytest.approx(32 * 36 * 2 * 5e-6, rel=0.1)


# -- advice ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> tuple[PlannedStep, PlannedStep]:
    """(full in float32 as it is trained, with an adapter in bfloat16)."""
    config = AutoConfig.for_model(**LLAMA_3_8B)
    full = Blueprint(config, "causal", torch.float32)
    adapted = Blueprint(config, "causal", torch.bfloat16).with_peft(LORA)
    return tuple(work_of(drawn, prompt=512, response=512, batch=64) for drawn in (full, adapted))


def test_advice_fits_is_fastest_and_its_flags_are_read(llama):
    full, adapted = llama
    large = Machines(8, 1, 192 * GIGA, 989 * TERA, 3350 * GIGA, 450 * GIGA, 50 * GIGA)
    usable = 0.9 * large.memory
    advice = advise(full, adapted, large, Shares(), usable, most_nodes=4)
    assert advice.row is not None and advice.row.memory.total <= usable and not advice.others
    fitting = [row for row in rows([full], large, Shares(), usable) if row.fits]
    assert fitting and advice.row.seconds.total <= 1.05 * min(row.seconds.total for row in fitting)
    assert list(advice.nodes) == [2, 4]
    assert advice.nodes[4].seconds.sample <= advice.row.seconds.sample
    for row in (advice.row, *advice.nodes.values()):
        assert (ROOT / "configs" / "accelerate" / f"{row.engine}.yaml").is_file()
    words = shlex.split(" ".join(flags(advice.row, large)))
    job = read(PPOJob, words[words.index("YOURS.yaml") + 1 :])
    assert job.ppo.micro_batch_size == advice.row.work.ppo.micro_batch_size
    assert job.sampling.batch_size == advice.row.work.sampling.batch_size


def test_the_standard_job_fits_on_eight_gpus_of_80_gb():
    """scale.md's: full weights, separate value, a copy, 512 rollouts of 512 + 512 tokens, bf16."""
    full = Blueprint(AutoConfig.for_model(**LLAMA_3_8B), "causal", torch.float32)
    usable = 0.9 * HOPPER.memory
    for size in (1, 2):
        job = work_of(full, prompt=512, response=512, batch=64, rollouts_per_step=512, micro_batch_size=size)
        advice = advise(job, job, HOPPER, Shares(), usable, most_nodes=1)
        assert advice.row is not None
        assert {advice.row.engine, *advice.engines} == {"zero3", "fsdp2"}
        for row in (advice.row, *advice.engines.values()):
            assert row.memory.total <= usable and row.work.ppo.micro_batch_size == size
            assert row.memory.phases["load"] < 20e9


def test_where_nothing_fits_it_says_what_would(llama):
    full, adapted = llama
    usable = 24 * GIGA
    advice = advise(full, adapted, HOPPER, Shares(), usable, most_nodes=2)
    assert advice.row is None and advice.least.memory.total > usable
    assert any(name.startswith("LoRA") for name in advice.others)
    assert all(row.memory.total <= usable for row in advice.others.values())
    tight = memory(adapted, "ddp", 8).total
    leaner = advise(adapted, adapted, HOPPER, Shares(), 0.97 * tight, most_nodes=1).row
    assert leaner is not None and (leaner.engine != "ddp" or leaner.work != adapted)


# -- the command ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path


def run(argv: list[str]) -> int:
    try:
        run_command(plan_door.main, plan_door.PlanJob, argv)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_plan_of_the_docs_is_what_the_command_says(tmp_path, monkeypatch, capfd):
    block = next(b for b in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").split("```") if "$ steerl plan" in b)
    command, shown = re.split(r"(?<!\\)\n", block.strip(), maxsplit=1)
    (tmp_path / "llama-3-8b").mkdir()
    (tmp_path / "llama-3-8b" / "config.json").write_text(json.dumps(LLAMA_3_8B))
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(command.replace("\\\n", " "))[3:]) == 0
    said = capfd.readouterr().out
    assert said.split() == shown.split()
    names = [line.split()[:2] for line in said.splitlines() if line.split()[:1] and line.split()[0] in ENGINES]
    assert names == [[engine, how] for how in ("full", "LoRA") for engine in ENGINES]


def test_the_door_in_json(folder, capfd):
    asked = [
        "--model.path",
        str(folder),
        "--gpus",
        "8",
        "--memory",
        "80",
        "--prompt_tokens",
        "512",
        "--sampling.max_new_tokens",
        "512",
    ]
    assert run([*asked, "--json", "true", "--ppo.value", "shared", "--model.peft", "{peft_type: LORA, r: 16}"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["advice"]["fits"] and found["advice"]["adapter"]["r"] == 16
    assert len(found["rows"]) == 2 * len(ENGINES)
    for row in found["rows"]:
        assert row["total"] == max(row["phases"].values()) and row["fits"] == (row["total"] <= found["machines"]["usable"])


def test_episodes_are_as_wide_as_all_that_follows_the_prompt(folder):
    """Without environment.max_tokens what turns and answers may take, within the context."""

    def width(**environment):
        given = EnvironmentSettings(**environment)
        sampling, model = Sampling(max_new_tokens=64), ModelSettings(path=str(folder))
        return plan_door.work_of(
            plan_door.PlanJob(model=model, sampling=sampling, environment=given, prompt_tokens=100), None
        ).response

    assert width() == 64 and width(tools=["my_tools.py:search"], max_tokens=700) == 700
    assert width(factory="my.py:make", max_turns=3) == 3 * (64 + 512)
    assert width(tools=["my.py:a"], max_turns=900) == AutoConfig.from_pretrained(folder).max_position_embeddings - 100


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--gpu", "h1000"], ["gpu: unknown GPU 'h1000'", "did you mean h100?"]),
        (["--memory", "0"], ["memory: 0, but it must be above 0"]),
        (["--gpus", "0"], ["gpus: 0"]),
        (["--headroom", "1"], ["headroom: 1"]),
        (["--model.path", "EMPTY"], ["model.path", "config.json"]),
        (["--model.path", ""], ["model.path: missing"]),
    ],
)
def test_what_cannot_be_planned_is_one_line(given, parts, folder, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / "empty") if word == "EMPTY" else word for word in given]
    assert run(["--model.path", str(folder), *given]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and all(part in said[0] for part in parts), said


def test_measured_figures_are_plausible():
    operations, bandwidth = measure_device(torch.device("cpu"), torch.float32)
    assert 1e8 < operations < 1e14 and 1e7 < bandwidth < 1e13
    assert all(gpu.half > gpu.single for gpu in GPUS.values())


def test_a_model_that_decides_by_numbers_is_a_problem():
    with pytest.raises(UserError, match="decides by numbers"):
        training_pass(blueprint(tiny("led")), 2, 8, 8)


# -- against a step -----------------------------------------------------------------------------------------------------------


def beside_a_step(asked: dict, mapped: bool = False) -> dict:
    """What a fresh process finds. `mapped`: every tensor in its own pages, so that the heap has no holes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if mapped:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "tests/training/planning/plan_step.py", json.dumps(asked)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    print(
        f"{asked}{' mapped' if mapped else ''}: planned {found['planned'] / 1e9:.2f} GB, measured {found['measured'] / 1e9:.2f} GB, "
        f"ratio {found['planned'] / found['measured']:.3f}, highest in {found['highest']}"
    )
    return found


ADAPTER = {"peft_type": "LORA", "r": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        # mostly gradients and optimizer states
        pytest.param({"prompt": 8, "response": 8, "ppo": {"value": "shared"}}, marks=pytest.mark.proofs),
        # mostly activations; all its layers are in the proofs
        {"layers": 3, "rows": 8, "peft": ADAPTER, "prompt": 48, "response": 48, "ppo": {"value": "shared"}},
    ],
)
def test_the_plan_is_within_15_percent_of_a_real_steps_peak(asked):
    found = beside_a_step(asked)
    assert found["weights"] > (60e6 if "layers" in asked else 200e6)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found


@pytest.mark.proofs
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"rows": 8},
        {"rows": 8, "peft": ADAPTER, "prompt": 48, "response": 48, "ppo": {"value": "shared"}},
        {"rows": 8, "peft": ADAPTER, "prompt": 32, "response": 32},
        {"rows": 8, "prompt": 64, "response": 64, "ppo": {"value": "shared", "reference": "none", "checkpointing": True}},
        {"rows": 8, "prompt": 32, "response": 32, "ppo": {"micro_batch_size": 2, "credit": "rloo"}},
    ],
)
def test_the_plan_is_within_15_percent_at_other_settings(asked, mapped):
    found = beside_a_step(asked, mapped)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found


def test_the_steps_model_has_200_million_weights():
    from tests.training.planning.plan_step import SHAPE

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    assert sum(p.numel() for p in model.parameters()) > 200e6
