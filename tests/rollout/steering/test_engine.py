"""The engine around models that are used in every way: caches, beams, hooks of others, threads, gradients, compile."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.model.hooks import current, unsteered
from steerl.rollout.steering import Steering, engine
from tests.models import FAMILIES, tiny
from tests.rollout.steering.helpers import vector

IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BLOCK = {"at": {"layers": [0]}, "vector": vector(), "strength": 2.0}


def everything(**fields: Any) -> dict[str, Any]:
    return {
        "sites": [
            {"name": "a", **BLOCK, "where": {"prompt": [0], "steps": {"window": [0, 4]}, "ramp": {"over": 6}}},
            {"name": "b", "at": {"layers": [1], "component": "mlp_output"}, "op": {"type": "rotate"}, "vector": vector(2), "strength": 0.5,
             "gate": {"vector": vector(3), "layer": 0, "open_above": -0.2}},
            {"name": "c", "at": {"layers": [1], "component": "attn_output"}, "op": {"type": "noise"}, "strength": 0.3},
        ],
        **fields,
    }  # fmt: skip


def generated(model, steering: Steering, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    out = steering.generate(**{**given, **options}, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1)


CACHES = {
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 2},
    "quantity": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "mistral", "t5"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches_agree(family: str, cache: str) -> None:
    if family == "t5" and cache == "chunked":
        pytest.skip("transformers does not chunk an encoder-decoder's prefill")
    model = tiny(family)
    spec = everything()
    if cache == "chunked":
        del spec["sites"][1]["gate"]
    steering = Steering(model, spec)
    ids, logits = generated(model, steering)
    other_ids, other = generated(model, steering, **CACHES[cache])
    assert torch.equal(ids, other_ids)
    torch.testing.assert_close(other, logits, atol=2e-5, rtol=0.0)
    with torch.no_grad():
        plain = model.generate(
            IDS,
            attention_mask=MASK,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert float((torch.stack(plain.logits, 1) - logits).abs().max()) > 1e-2


def test_assisted_decoding_agrees() -> None:
    model, helper = tiny("llama"), tiny("llama", seed=5)
    steering = Steering(model, everything())
    one = {"input_ids": IDS[1:], "attention_mask": MASK[1:]}
    ids, _ = generated(model, steering, **one)
    out = steering.generate(**one, max_new_tokens=6, min_new_tokens=6, do_sample=False, assistant_model=helper)
    assert torch.equal(out, ids)


def test_row_alone_is_row_in_a_padded_batch() -> None:
    model = tiny("llama")
    steering = Steering(model, {"sites": everything()["sites"][:2]})
    _, both = generated(model, steering)
    _, alone = generated(model, steering, input_ids=IDS[:1, 2:], attention_mask=MASK[:1, 2:])
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0.0)


def test_beams_and_return_sequences_keep_their_rows() -> None:
    model = tiny("gpt2")
    steering = Steering(model, {"sites": [{**BLOCK, "strength": {"column": "s"}}]})
    given = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}

    def run(rows: list[int]) -> Tensor:
        strengths = [[3.0, -3.0][row] for row in rows]
        with steering.active(prompt_mask_BP=MASK[rows], columns={"s": strengths}):
            return model.generate(input_ids=IDS[rows], attention_mask=MASK[rows], **given)

    both = run([0, 1])
    assert torch.equal(both[2:], run([1])), "row 1 was steered with row 0's strength"
    row_B = torch.arange(2)
    applied = steering.applied(MASK, row_B, row_B * 0, {"s": [3.0, -3.0]})
    with pytest.raises(UserError, match="columns have no effect beside applied"):
        steering.active(prompt_mask_BP=MASK, columns={"s": [3.0, -3.0]}, applied=applied).__enter__()
    with steering.active(prompt_mask_BP=MASK, applied=applied):
        assert torch.equal(model.generate(input_ids=IDS, attention_mask=MASK, **given), both)


# -- the hooks' manners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "opt"])
def test_hidden_states_show_the_steered_values(family: str) -> None:
    model = tiny(family)
    given = {"input_ids": IDS[1:]} | ({"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family == "t5" else {})
    name = "decoder_hidden_states" if family == "t5" else "hidden_states"
    with torch.no_grad():
        before = model(**given, output_hidden_states=True)[name]  # transformers hangs its hooks here, before ours
        steering = Steering(model, {"sites": [{**BLOCK, "where": {"prompt": "all"}}]})
        with steering.active():
            after = model(**given, output_hidden_states=True)[name]
    moved = after[1] - before[1]
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(
        moved[0, -1] if family != "t5" else moved[0, 0], 2.0 * torch.tensor(vector()), atol=1e-5, rtol=0.0
    )


def test_other_peoples_hooks_and_states_stay() -> None:
    model = tiny("llama").train()
    model.model.layers[0].requires_grad_(False)
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    hooks_before = list(model.model.layers[0]._forward_hooks.values())
    grads = [p.requires_grad for p in model.parameters()]
    steering = Steering(model, {"sites": [{**BLOCK, "where": {"prompt": "all"}}]})
    with torch.no_grad():
        model(IDS[1:])
        with steering.active():
            model(IDS[1:])
        model(IDS[1:])
    assert torch.equal(seen[0], seen[2])
    torch.testing.assert_close(seen[1] - seen[0], 2.0 * torch.tensor(vector()).expand(1, 5, 32), atol=1e-5, rtol=0.0)
    assert model.training and [p.requires_grad for p in model.parameters()] == grads
    assert [h for h in model.model.layers[0]._forward_hooks.values() if h in hooks_before] == hooks_before
    handle.remove()
    Steering(model, {"sites": [BLOCK]})
    assert len(model.model.layers[0]._forward_hooks) == 1, "hooks pile up"


def test_an_exception_leaves_nothing_behind() -> None:
    model = tiny("llama")
    steering = Steering(model, {"sites": [BLOCK]})
    plain = model(IDS[1:]).logits
    with pytest.raises(RuntimeError, match="boom"), steering.active():
        model(IDS[1:])
        raise RuntimeError("boom")
    assert current() is None and torch.equal(model(IDS[1:]).logits, plain)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    with pytest.raises(RuntimeError, match="inside"), steering.active():
        model(IDS[1:])
    handle.remove()
    assert current() is None and torch.equal(model(IDS[1:]).logits, plain)


def test_nested_passes() -> None:
    """Unsteered inside is exact; two steerings inside each other add up; leaving the inner leaves the outer."""
    model = tiny("gpt2")
    one, two = (Steering(model, {"sites": [{**BLOCK, "vector": vector(seed)}]}) for seed in (1, 2))
    both = Steering(model, {"sites": [{**BLOCK, "vector": (torch.tensor(vector(1)) + torch.tensor(vector(2))).tolist()}]})
    with torch.no_grad():
        plain = model(IDS[1:]).logits
        with both.active():
            expected = model(IDS[1:]).logits
        with one.active():
            only = model(IDS[1:]).logits
            with unsteered():
                assert torch.equal(model(IDS[1:]).logits, plain)
            with two.active():
                torch.testing.assert_close(model(IDS[1:]).logits, expected, atol=1e-4, rtol=0.0)
            assert torch.equal(model(IDS[1:]).logits, only)
        assert torch.equal(model(IDS[1:]).logits, plain)


def test_threads_do_not_see_each_other() -> None:
    model = tiny("llama")
    steerings = [Steering(model, {"sites": [{**BLOCK, "strength": s}]}) for s in (3.0, -3.0)]
    expected: list[Tensor] = []
    with torch.no_grad():
        plain = model(IDS[1:]).logits
        for steering in steerings:
            with steering.active():
                expected.append(model(IDS[1:]).logits)
    found: list[list[Tensor]] = [[], [], []]
    gate = threading.Barrier(3)

    def work(number: int) -> None:
        with torch.no_grad():
            gate.wait()
            for _ in range(20):
                if number == 2:
                    found[2].append(model(IDS[1:]).logits)
                    continue
                with steerings[number].active():
                    found[number].append(model(IDS[1:]).logits)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate([*expected, plain]):
        assert len(found[number]) == 20 and all(torch.equal(logits, wanted) for logits in found[number])


def test_a_copy_of_the_model_is_plain() -> None:
    model = tiny("llama")
    steering = Steering(model, {"sites": [BLOCK]})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        plain = model(IDS[1:]).logits
        with steering.active():
            assert not torch.equal(model(IDS[1:]).logits, plain)
            assert torch.equal(twin(IDS[1:]).logits, plain)
        other = Steering(twin, {"sites": [BLOCK]})
        with steering.active():
            expected = model(IDS[1:]).logits
        with other.active():
            assert torch.equal(twin(IDS[1:]).logits, expected), "a copied hook edits twice"


# -- gradients ----------------------------------------------------------------------------------------------------------------

POINTS = [{"layers": [0]}, {"layers": [0], "component": "attn_output"}, {"layers": [1], "component": "mlp_output"}, {"layers": [1], "head": [1]},
          {"layers": [1], "component": "block_input"}]  # fmt: skip


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("kind", ["add", "ablate", "rotate", "renormalise"])
def test_gradients_by_finite_differences(at: dict[str, Any], kind: str) -> None:
    model = tiny("gpt2").double()  # Llama's norms are in float32 whatever the model's dtype
    site = {
        "at": at,
        "op": {"type": kind},
        "vector": vector(1, 8 if "head" in at else 32),
        "strength": 0.7,
        "where": {"prompt": "all"},
    }
    steering = Steering(model, {"sites": [site]})
    weight = model.transformer.h[0].attn.c_attn.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss() -> Tensor:
        with steering.active(prompt_mask_BP=MASK):
            return model(IDS, attention_mask=MASK).logits[:, -2:].square().mean()

    gradient = torch.autograd.grad(loss(), weight)[0]
    step = 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        up = loss()
        weight.sub_(2 * step * direction)
        down = loss()
        weight.add_(step * direction)
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("late", [True, False], ids=["backward after the context", "backward inside"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("at", POINTS[:4], ids=["block", "attn", "mlp", "head"])
def test_checkpointing_on_equals_off(at: dict[str, Any], family: str, late: bool, reentrant: bool) -> None:
    model = tiny(
        family,
        **{"t5": {"dropout_rate": 0.0}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}.get(family, {}),
    )
    site = {
        "at": at,
        "op": {"type": "ablate"},
        "vector": vector(1, 8 if "head" in at else 32),
        "strength": 0.7,
        "where": {"prompt": "all"},
    }
    steering = Steering(model, {"sites": [site]})
    given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    if family == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 5, 6], [0, 7, 8]])

    def gradients(checkpointed: bool, active: bool = True) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        model.eval()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
        if not active:
            loss = model(**given).logits[:, -2:].square().mean()
            with steering.active(prompt_mask_BP=MASK):  # backward of a plain pass while steering is on
                model(**given)
                loss.backward()
        else:
            with steering.active(prompt_mask_BP=MASK):
                loss = model(**given).logits[:, -2:].square().mean()
                if not late:
                    loss.backward()
            if late:
                loss.backward()
        if checkpointed:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for active in (True, False):
        for one, two in zip(gradients(False, active), gradients(True, active), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


# -- what cannot work says so -------------------------------------------------------------------------------------------------


def test_no_pass_is_an_error() -> None:
    model, other = tiny("llama"), tiny("llama")
    steering = Steering(model, {"sites": [BLOCK]})
    with pytest.raises(UserError, match="steering did not run"), steering.active():
        other(IDS)


def decoded(model: Any, steering: Steering) -> list[Tensor]:
    """Logits of a padded prompt and of steps after it, with rows that leave, and another sequence of one column."""
    strength_B = torch.tensor([2.0, 0.0, 1.0])
    mask = torch.cat([MASK, MASK[:1]]).bool()
    seen: list[Tensor] = []

    def call(ids: Tensor, **given: Any) -> Any:
        out = model(input_ids=ids, use_cache=True, **given)
        seen.append(out.logits[:, -1])
        return out.past_key_values

    nothing = torch.zeros(3, dtype=torch.int64)
    applied = Applied(
        strength_B[:, None].expand(-1, len(steering.sites)),
        nothing[:, None, None].expand(-1, len(steering.sites), 0),
        nothing,
        0,
    )
    with torch.no_grad(), steering.active(prompt_mask_BP=mask, applied=applied) as active:
        cache = call(
            torch.cat([IDS, IDS[:1]]), attention_mask=mask.long(), position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)
        )
        for _ in range(3):
            cache = call(torch.tensor([[5], [6], [7]]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 1]))
        active.select([2, 1])
        for _ in range(3):
            cache = call(torch.tensor([[8], [9]]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        active.select([1, 0])
        for _ in range(2):
            cache = call(torch.tensor([[8], [9]]), past_key_values=cache)
        call(torch.tensor([[8], [9]]), past_key_values=DynamicCache(config=model.config))
    with torch.no_grad(), steering.active():
        for first in (5, 6):  # a prompt of one token, and then another
            cache = call(torch.tensor([[first]]), past_key_values=DynamicCache(config=model.config))
            for _ in range(2):
                cache = call(torch.tensor([[7]]), past_key_values=cache)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_steady_decoding_is_the_asked_one_bit_for_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every step is edited alike the edits are kept, until rows or the sequence change; others are asked each time."""
    model, kept = tiny(family), engine.HeldAddition.__call__
    used: list[int] = []

    def noted(self: Any, frame: Any, hidden: Tensor) -> Tensor:
        if frame.steady is not None:  # kept from an earlier step, and no rule was asked
            used.append(1)
        return kept(self, frame, hidden)

    monkeypatch.setattr(engine.HeldAddition, "__call__", noted)
    for where, steady in (
        ({}, True),
        ({"prompt": "none"}, True),
        ({"steps": {"window": [2, 4]}}, False),
        ({"ramp": {"over": 3}}, False),
    ):
        sites = [{**BLOCK, "name": "a", "where": where}, {**BLOCK, "name": "b", "at": {"layers": [0, 1]}, "vector": vector(1)}]
        used.clear()
        found = decoded(model, Steering(model, {"sites": sites}))
        assert len(used) == (3 * 7 if steady else 0)
        with monkeypatch.context() as asking:
            asking.setattr(engine.Active, "goes_on", lambda self, args, kwargs: False)
            used.clear()
            for one, other in zip(found, decoded(model, Steering(model, {"sites": sites})), strict=True):
                assert torch.equal(one, other)
            assert not used


def test_blocks_that_are_run_again_within_one_pass_are_refused() -> None:
    """A recurrent depth: what the cache holds then is no longer where the call is in the sequence."""
    model = tiny("opt")
    steering = Steering(model, {"sites": [BLOCK]})
    with torch.no_grad(), steering.active():
        model(IDS)
        model(IDS)
        model.model(IDS)
        model.model.decoder(IDS)
    once = model.forward
    model.forward = lambda *args, **kwargs: (once(*args, **kwargs), once(*args, **kwargs))[1]
    with torch.no_grad(), pytest.raises(UserError, match="OPTDecoder is run several times in one pass"), steering.active():
        model(IDS)
    with torch.no_grad():
        model(IDS)


def test_a_model_compiled_before_is_an_error() -> None:
    """Hooks that come after the first compiled call are ignored by torch.compile: said, not silently plain."""
    torch._dynamo.reset()
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
        steering = Steering(model, {"sites": [BLOCK]})
        with pytest.raises(UserError, match="steering did not run"), steering.active():
            compiled(IDS)
    torch._dynamo.reset()


def test_a_model_compiled_after_is_steered() -> None:
    torch._dynamo.reset()
    model = tiny("llama")
    steering = Steering(model, {"sites": [BLOCK]})
    with torch.no_grad():
        plain = model(IDS[1:]).logits
        with steering.active():
            expected = model(IDS[1:]).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(IDS[1:]).logits, plain, atol=1e-5, rtol=0.0)
        with steering.active():
            torch.testing.assert_close(compiled(IDS[1:]).logits, expected, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(compiled(IDS[1:]).logits, plain, atol=1e-5, rtol=0.0)
    torch._dynamo.reset()


def test_rows_that_do_not_fit_are_an_error() -> None:
    model = tiny("llama")
    steering = Steering(model, {"sites": [BLOCK]})
    with (
        pytest.raises(UserError, match="called with 2 rows, and steering is active for 3"),
        steering.active(prompt_mask_BP=torch.ones(3, 5)),
    ):
        model(IDS)
    with (
        pytest.raises(UserError, match="columns of padding"),
        steering.active(prompt_mask_BP=torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])),
    ):
        model(IDS, attention_mask=MASK)


def test_callers_may_leave_away_shared_padding() -> None:
    model = tiny("llama")
    steering = Steering(model, {"sites": [{**BLOCK, "where": {"prompt": [0], "steps": [1]}}]})
    with torch.no_grad():
        wide = torch.nn.functional.pad(MASK, (3, 0))
        ids = torch.cat([IDS, torch.tensor([[3], [4]])], 1)
        longer = torch.nn.functional.pad(MASK, (0, 1), value=1)
        with steering.active(prompt_mask_BP=MASK):
            expected = model(ids, attention_mask=longer).logits
        with steering.active(prompt_mask_BP=wide):
            assert torch.equal(model(ids, attention_mask=longer).logits, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_steered_at_its_blocks(family: str) -> None:
    """Found by structure: a vector added to the last block moves the logits as adding it by hand does."""
    if family == "prophetnet":
        pytest.skip("predicts several tokens at once")
    model = tiny(family)
    steering = Steering(model, {"sites": [{"at": {"layers": [-1]}, "vector": vector(), "where": {"prompt": "all"}}]})
    ids = IDS[1:]
    given = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {})
    block = steering.sites[0].points[0].module
    with torch.no_grad():
        plain = model(**given).logits
        where = [0] if model.config.is_encoder_decoder else slice(None)
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = given["decoder_input_ids"][:, :1]
            plain = plain[:, :1]
        with steering.active():
            found = model(**given).logits
        assert float((found - plain).abs().max()) > 1e-3

        def move(_: Any, __: Any, out: Any) -> Any:
            hidden = (out if isinstance(out, Tensor) else out[0]).clone()
            hidden[:, where] += torch.tensor(vector())
            return hidden if isinstance(out, Tensor) else type(out)((hidden, *out[1:]))

        handle = block.register_forward_hook(move)
        expected = model(**given).logits
        handle.remove()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
