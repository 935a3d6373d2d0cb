"""intervene and intervene_generate against what pyvene gave (golden/calls.npz), and against one-row definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from steerl.rollout.common.errors import UserError
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.steering.interventions.intervene import Intervened, Intervention, intervene, intervene_generate
from tests.models import tiny

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "calls.npz").items()}
BASE = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
ONE = {"input_ids": torch.tensor([[1, 2, 3, 4], [13, 14, 15, 1]])}
TWO = {"input_ids": torch.tensor([[12, 3, 9, 2], [4, 4, 5, 6]])}
FIRST, SECOND = {"layers": [0]}, {"layers": [1], "component": "mlp_output"}
WHERE = {"sources->base": ([[[1], [2]], [[0], [3]]], [[[3], [0]], [[2], [1]]])}
WHERE_ONE = {"sources->base": ([[[1], [2]]], [[[3], [0]]])}


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    made = GPT2LMHeadModel(config).eval()
    made.load_state_dict({k.removeprefix("weight:"): v for k, v in GOLDEN.items() if k.startswith("weight:")})
    return made


def close(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, GOLDEN[name], atol=1e-5, rtol=1e-5)


def test_two_sources_and_the_original(model) -> None:
    result = intervene(model, [Intervention(FIRST), Intervention(SECOND)], BASE, [ONE, TWO], WHERE, output_original_output=True)
    close(result.intervened_outputs.logits, "two_sources")
    close(result.original_outputs.logits, "original")
    assert result.collected_activations is None
    assert float((result.intervened_outputs.logits - result.original_outputs.logits).abs().max()) > 0.1


def test_stored_representation(model) -> None:
    for given in (GOLDEN["stored"], [GOLDEN["stored"]], {"a": GOLDEN["stored"]}, {0: GOLDEN["stored"]}):
        result = intervene(model, Intervention(FIRST, "add", name="a"), BASE, None, {"base": 2}, source_representations=given)
        close(result.intervened_outputs.logits, "stored_representation")
    kept = intervene(model, Intervention(FIRST, "add", source=GOLDEN["stored"]), BASE, None, {"base": [2]})
    close(kept.intervened_outputs.logits, "stored_representation")


def test_subspaces(model) -> None:
    parts = Intervention(FIRST, partition=[[0, 3], [3, 8]])
    for subspaces in (1, [1], [[[1], [1]]]):
        close(intervene(model, parts, BASE, ONE, WHERE_ONE, subspaces=subspaces).intervened_outputs.logits, "subspaces")
    low = Intervention(FIRST, "low_rank_rotated", {"weight": GOLDEN["subspace_weight"]}, partition=[[0, 2], [2, 4]])
    close(intervene(model, low, BASE, ONE, WHERE_ONE, subspaces=[[[0], [1]]]).intervened_outputs.logits, "subspaces_by_row")


def test_serial(model) -> None:
    chain = {"source_0->source_1": ([[[1], [1]]], [[[2], [0]]]), "source_1->base": ([[[3], [2]]], [[[3], [3]]])}
    result = intervene(model, [Intervention(FIRST), Intervention(SECOND)], BASE, [ONE, TWO], chain, mode="serial")
    close(result.intervened_outputs.logits, "serial")


def test_collect(model) -> None:
    result = intervene(model, Intervention(FIRST, "collect"), BASE, unit_locations={"base": [[[1, 3], [0, 2]]]})
    close(result.collected_activations[0].reshape(GOLDEN["collected"].shape), "collected")
    turned = intervene(model, Intervention(FIRST, "collect"), BASE, unit_locations={"base": [[[3, 1], [2, 0]]]})
    assert torch.equal(turned.collected_activations[0], result.collected_activations[0].flip(1)), "not in the order asked for"
    (original, collected), plain = intervene(
        model, Intervention(FIRST, "collect"), BASE, unit_locations={"base": 1}, return_dict=False, output_original_output=True
    )
    assert len(collected) == 1 and torch.equal(original.logits, plain.logits), "collecting changes nothing"


def test_labels_and_use_cache(model) -> None:
    result = intervene(
        model, [Intervention(FIRST), Intervention(SECOND)], BASE, [ONE, TWO], WHERE, labels=BASE["input_ids"], use_cache=False
    )
    close(result.intervened_outputs.loss, "loss")
    assert result.intervened_outputs.past_key_values is None
    result.intervened_outputs.loss.backward()
    assert model.transformer.wte.weight.grad is not None
    model.zero_grad(set_to_none=True)


def test_no_intervention(model) -> None:
    original, output = intervene(model, [], BASE, return_dict=False)
    assert original is None and torch.equal(output.logits, model(**BASE).logits)
    assert isinstance(intervene(model, [], BASE), Intervened)


def test_generate_with_the_prompt_intervened(model) -> None:
    result = intervene_generate(
        model, Intervention({"layers": [1]}), BASE, ONE, {"sources->base": ([[[1], [2]]], [[[3], [3]]])}, intervene_on_prompt=True,
        max_new_tokens=6, do_sample=False, output_original_output=True, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert torch.equal(result.intervened_outputs.sequences, GOLDEN["generated"])
    close(torch.stack(result.intervened_outputs.logits, 1), "generated_logits")
    assert torch.equal(result.original_outputs.sequences, model.generate(**BASE, max_new_tokens=6, do_sample=False))
    assert float((result.original_outputs.logits[0] - result.intervened_outputs.logits[0]).abs().max()) > 0.1


# -- beyond pyvene: padding, multiplied rows, steps ----------------------------------------------------------------------------


def padded() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }


def test_positions_count_real_tokens() -> None:
    model = tiny("llama")
    alone = {"input_ids": torch.tensor([[5, 6, 7]])}
    source = {"input_ids": torch.tensor([[20, 21, 22, 23]])}
    with torch.no_grad():
        for where in (1, -1):
            base = padded()
            position_ids = (base["attention_mask"].cumsum(1) - 1).clamp_min(0)
            both = {"input_ids": source["input_ids"].expand(2, -1)}
            batch = intervene(
                model, Intervention(FIRST), {**base, "position_ids": position_ids}, both, {"sources->base": ([2], [where])}
            )
            one = intervene(model, Intervention(FIRST), alone, source, {"sources->base": ([2], [where])})
            torch.testing.assert_close(
                batch.intervened_outputs.logits[0, -1], one.intervened_outputs.logits[0, -1], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("many", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}])
def test_multiplied_rows_keep_their_own_sources(many) -> None:
    """Row 1's continuations are those of row 1 alone, whatever row 0's source is (pyvene gives all rows row 0's)."""
    model = tiny("gpt2")
    sources = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0)) * 3

    def run(rows: list[int]) -> Tensor:
        base = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])[rows]}
        torch.manual_seed(0)
        result = intervene_generate(
            model, Intervention(FIRST, "add"), base, unit_locations={"base": -1}, source_representations=sources[rows],
            steps="all", max_new_tokens=5, min_new_tokens=5, output_scores=True, return_dict_in_generate=True, **many,
        )  # fmt: skip
        return result.intervened_outputs

    both, alone = run([0, 1]), run([1])
    if "num_beams" in many:
        assert torch.equal(both.sequences[2:], alone.sequences)
    first_both, first_alone = both.scores[0], alone.scores[0]
    torch.testing.assert_close(first_both[-1], first_alone[-1], atol=1e-5, rtol=1e-5)
    assert float((both.scores[0][0] - both.scores[0][-1]).nan_to_num().abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("steps", "edited"),
    [("all", [0, 1, 2, 3]), ("generated_positions", [1, 2, 3]), ({"window": [1, 3]}, [1, 2]), ([0, 3], [0, 3])],
)
def test_steps_in_generate(steps, edited) -> None:
    """Each token's logits equal a plain forward with the block's output moved at exactly the chosen columns."""
    model, vector = tiny("llama"), torch.randn(32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 6, 7]])
    result = intervene_generate(
        model, Intervention(FIRST, "add"), {"input_ids": ids}, source_representations=vector, steps=steps,
        max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True,
    ).intervened_outputs  # fmt: skip
    moved = torch.zeros(1, 6, 32)
    moved[:, [2 + step for step in edited]] = vector
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: output + moved)
    try:
        with torch.no_grad():
            expected = model(result.sequences[:, :-1]).logits[:, 2:]
    finally:
        handle.remove()
    torch.testing.assert_close(torch.stack(result.logits, 1), expected, atol=1e-5, rtol=1e-5)


def test_default_in_generate_is_the_generated_positions() -> None:
    model, vector = tiny("llama"), torch.ones(32) * 2
    given = {"source_representations": vector, "max_new_tokens": 4, "do_sample": False}
    base = {"input_ids": torch.tensor([[5, 6, 7]])}
    default = intervene_generate(model, Intervention(FIRST, "add"), base, **given).intervened_outputs
    assert torch.equal(
        default,
        intervene_generate(model, Intervention(FIRST, "add"), base, steps="generated_positions", **given).intervened_outputs,
    )


def test_own_function_and_strength_by_row() -> None:
    model = tiny("qwen2")
    base = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    with torch.no_grad():
        plain = model(**base).logits
        result = intervene(
            model, Intervention(FIRST, lambda h, s: h * 2.0), base, strength=torch.tensor([0.0, 1.0])
        ).intervened_outputs.logits
    assert torch.equal(result[0], plain[0]), "strength 0 is plain"
    assert float((result[1] - plain[1]).abs().max()) > 1e-3


def test_encoder_decoder() -> None:
    model = tiny("t5")
    base = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    source = {"input_ids": torch.tensor([[15, 16, 17]]), "decoder_input_ids": torch.tensor([[0, 19, 20]])}
    at = {"layers": [0], "stack": "encoder"}
    with torch.no_grad():
        swapped = intervene(model, Intervention(at), base, source).intervened_outputs.logits
        last = intervene(model, Intervention({"layers": [1], "stack": "encoder"}), base, source).intervened_outputs.logits
        crossed = model(input_ids=source["input_ids"], decoder_input_ids=base["decoder_input_ids"]).logits
    torch.testing.assert_close(last, crossed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(swapped, crossed, atol=1e-5, rtol=1e-5)


def test_leaves_the_model_as_it_was(model) -> None:
    model.train()
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    intervene(model, Intervention(FIRST), BASE, ONE, WHERE_ONE)
    assert model.training and all(
        p.requires_grad == r and torch.equal(p, old) for p, (r, old) in zip(model.parameters(), before, strict=True)
    )
    model.eval()
    with unsteered():
        close(model(**BASE).logits, "original")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(interventions=Intervention({"layers": [7]}), base=BASE, sources=ONE), "layers: 7 is out of range"),
        (dict(interventions=Intervention(FIRST), base=BASE), "needs a source"),
        (dict(interventions=Intervention(FIRST), base=BASE, sources=[ONE, ONE]), "expected one per intervention"),
        (dict(interventions=Intervention(FIRST), base=BASE, sources=ONE, unit_locations={"base": 9}), "has 4 real tokens"),
        (dict(interventions=Intervention(FIRST), base=BASE, sources=ONE, unit_locations={"bass": 1}), "unknown key 'bass'"),
        (dict(interventions=Intervention(FIRST, "vanila"), base=BASE, sources=ONE), "no operation 'vanila'"),
        (dict(interventions=Intervention(FIRST), base=BASE, sources=ONE, mode="cereal"), "expected parallel or serial"),
        (dict(interventions=Intervention(FIRST, "add", {"strenth": 2}), base=BASE, sources=ONE), "takes strength, coordinates"),
        (
            dict(interventions=Intervention({"layers": [0], "component": "block"}), base=BASE, sources=ONE),
            "expected one of block_output",
        ),
    ],
)
def test_bad_input(model, arguments, words) -> None:
    with pytest.raises(UserError) as caught:
        intervene(model, **arguments)
    assert words in str(caught.value) and len(caught.value.lines) == 1
