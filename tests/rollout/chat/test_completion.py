"""Completions against definitions written out here: one unpadded row at a time through the bare model, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from steerl.rollout.chat.completion import chat_completion, check_dialog, complete, generate, text_completion
from steerl.rollout.chat.confidence import confidence, prompt_logprobs, sequence_logprob
from steerl.rollout.chat.terminal import Live
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.steering import Steering
from tests.models import CONTEXT, tiny_policy, tiny_tokenizer

PROMPTS = ["a", "the end of it", "bcd " * 6, "good"]


def law(policy: Any, ids: list[int], start: list[int] | None = None) -> torch.Tensor:
    """Log-probs after every prefix, at temperature 1: what the bare model says of one row."""
    with torch.no_grad():
        if start is None:
            logits = policy.model(torch.tensor([ids])).logits[0]
        else:
            logits = policy.model(input_ids=torch.tensor([start]), decoder_input_ids=torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double(), -1)


def alone(policy: Any, prompt: list[int], response: list[int]) -> list[float]:
    numbers = law(policy, [*prompt, *response])
    return [float(numbers[len(prompt) + t - 1, token]) for t, token in enumerate(response)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "mistral", "mamba"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_log_probs_are_those_of_each_row_alone_at_temperature_one(family: str, temperature: float) -> None:
    policy = tiny_policy(family)
    prompts = [policy.tokenizer(text)["input_ids"] for text in PROMPTS]
    tokens, numbers = generate(policy, prompts, 12, temperature=temperature, logprobs=True)
    echoed, with_prompt = generate(policy, prompts, 12, temperature=temperature, logprobs=True, echo=True)
    assert numbers is not None and with_prompt is not None
    for prompt, response, own, whole, both in zip(prompts, tokens, numbers, echoed, with_prompt, strict=True):
        assert whole == prompt + response and 2 not in response
        assert own == pytest.approx(alone(policy, prompt, response), abs=2e-5)
        assert both[0] is None and both[1:] == pytest.approx(alone(policy, prompt[:1], whole[1:]), abs=2e-5)
        if temperature == 0 and response:
            best = law(policy, [*prompt, *response]).argmax(-1).tolist()
            assert response == best[len(prompt) - 1 : len(prompt) + len(response) - 1]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(family: str) -> None:
    policy = tiny_policy(family)
    prompts = [policy.tokenizer(text)["input_ids"] for text in PROMPTS]
    tokens, numbers = generate(policy, prompts, 8, logprobs=True)
    assert numbers is not None
    for prompt, response, own in zip(prompts, tokens, numbers, strict=True):
        start = list(policy.start_ids)
        said = law(policy, [*start, *response], start=prompt)
        assert own == pytest.approx([float(said[len(start) + t - 1, token]) for t, token in enumerate(response)], abs=2e-5)
        assert sequence_logprob(policy, prompt, response) == pytest.approx(sum(own), abs=1e-4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="echo"):
        generate(policy, prompts, 8, echo=True)


def test_the_stop_token_is_cut_off_and_nothing_comes_after_it() -> None:
    policy = tiny_policy("gpt2")
    prompts = [policy.tokenizer(f"say {i}")["input_ids"] for i in range(40)]
    found = complete(policy, prompts, Sampling(max_new_tokens=30), logprobs=True)
    ended = [one for one in found if one.stop_reason == "eos"]
    assert len(ended) > 5 and {one.stop_reason for one in found} == {"eos", "length"}
    for one in found:
        assert one.rollout is not None and one.logprobs is not None
        drawn = one.rollout.response_BR[0, : int(one.rollout.lengths_B[0])].tolist()
        assert one.ids == (drawn[:-1] if one.stop_reason == "eos" else drawn)
        assert one.logprobs == pytest.approx(alone(policy, one.prompt_ids, one.ids), abs=2e-5)
    empty = [one for one in complete(policy, prompts, Sampling(max_new_tokens=30, seed=3), logprobs=True) if not one.ids]
    assert all(one.text == "" and one.logprobs == [] for one in empty)


@pytest.mark.parametrize("kind,size", [("char", 64), ("bytes", 270)])
def test_a_stop_string_ends_text_tokens_and_log_probs(kind: str, size: int) -> None:
    policy = tiny_policy("gpt2", tokenizer=tiny_tokenizer(size, kind=kind), vocab_size=size)
    prompts = [policy.tokenizer(f"say {i}")["input_ids"] for i in range(30)]
    free = complete(policy, prompts, Sampling(max_new_tokens=24))
    stop = next(one.text[2:4] for one in free if len(one.text) > 6 and "\ufffd" not in one.text[:6])
    for one in complete(policy, prompts, Sampling(max_new_tokens=24, stop=[stop]), logprobs=True):
        assert stop not in one.text and len(one.ids) == len(one.logprobs or [])
        if one.stop_reason == "stop":
            assert policy.tokenizer.decode(one.ids, skip_special_tokens=True).startswith(one.text)
            assert not policy.tokenizer.decode(one.ids[:-1], skip_special_tokens=True).startswith(one.text) or not one.ids
    said = text_completion(policy, [f"say {i}" for i in range(30)], 1.0, 1.0, 24, echo=True, stop=[stop])
    assert all(stop not in done["generation"][len("say ") :] for done in said)


def test_rows_do_not_depend_on_their_batch_or_their_neighbours_room() -> None:
    """The default limit is what the context leaves; a short prompt goes on after a long one is full."""
    policy = tiny_policy("gpt2", eos_token_id=None, tokenizer=tiny_tokenizer())
    policy = type(policy).of(policy.model, policy.tokenizer)
    lengths = [5, CONTEXT, 100, 1, 100]
    prompts = [[7 + (i % 40) for i in range(length)] for length in lengths]
    tokens, numbers = generate(policy, prompts, temperature=0, logprobs=True)
    assert numbers is not None
    for prompt, response, own in zip(prompts, tokens, numbers, strict=True):
        [lone], _ = generate(policy, [prompt], temperature=0)
        assert response == lone and len(own) == len(response)
        assert len(response) <= min(CONTEXT - 1, CONTEXT - len(prompt))
        if 2 not in law(policy, [*prompt, *response][:CONTEXT]).argmax(-1).tolist():
            assert len(response) == min(CONTEXT - 1, CONTEXT - len(prompt))


def test_a_full_context_and_no_length_at_all_still_echo() -> None:
    policy = tiny_policy("gpt2")
    full = [7 + i % 40 for i in range(CONTEXT)]
    tokens, numbers = generate(policy, [full, [9]], 0, logprobs=True, echo=True)
    assert numbers is not None and tokens == [full, [9]]
    assert numbers[0][0] is None and numbers[1] == [None]
    assert numbers[0][1:] == pytest.approx(alone(policy, full[:1], full[1:]), abs=5e-5)


def test_texts_and_tokens_are_those_of_the_ids() -> None:
    policy = tiny_policy("llama")
    [done] = text_completion(policy, ["the end"], 0.8, 0.95, 10, logprobs=True)
    [echoed] = text_completion(policy, ["the end"], 0.8, 0.95, 10, logprobs=True, echo=True)
    ids, _ = generate(policy, [policy.tokenizer("the end")["input_ids"]], 10, 0.8, 0.95)
    assert done["generation"] == policy.tokenizer.decode(ids[0]) and echoed["generation"] == "the end" + done["generation"]
    assert done["tokens"] == [policy.tokenizer.decode([token]) for token in ids[0]]
    assert echoed["tokens"] == [*"the end", *done["tokens"]] and len(echoed["logprobs"]) == len(echoed["tokens"])
    assert text_completion(policy, ["the end"], max_gen_len=3)[0].keys() == {"generation"}


def test_seeds_decide_the_draw() -> None:
    policy = tiny_policy("gpt2")
    one, same, other = (generate(policy, [[9, 8, 7]], 20, 1.0, 1.0, seed=seed)[0] for seed in (1, 1, 2))
    assert one == same != other


# -- dialogs --------------------------------------------------------------------------------------------------------------

SYSTEM, USER, SAID = ({"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize(
    "dialog", [[USER], [SYSTEM, USER], [USER, SAID, USER], [SYSTEM, USER, SAID, USER], [{"role": "user", "content": ""}]]
)
def test_dialogs_go_through_the_chat_template(dialog: list[dict[str, str]]) -> None:
    policy = tiny_policy("gpt2", tokenizer=tiny_tokenizer(chat=True))
    [done] = chat_completion(policy, [dialog], max_gen_len=9, logprobs=True)
    text = "<s>" + "".join(f"{message['role']}:{message['content']}</s>" for message in dialog) + "assistant:"
    prompt = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    [ids], [numbers] = generate(policy, [prompt], 9, logprobs=True)  # type: ignore[misc]
    assert done["generation"] == {"role": "assistant", "content": policy.tokenizer.decode(ids, skip_special_tokens=True)}
    assert done["logprobs"] == pytest.approx(alone(policy, prompt, ids), abs=2e-5) and numbers == done["logprobs"]


WRONG = {
    "no messages": [],
    "[0]: role 'assistant' after 'nothing', expected user": [SAID],
    "[1]: role 'user' after 'user', expected assistant": [USER, USER],
    "[2]: role 'assistant' after 'assistant', expected user or tool": [USER, SAID, SAID],
    "[1]: role 'system' after 'user'": [USER, SYSTEM],
    "[1]: role 'system' after 'system', expected user": [SYSTEM, SYSTEM],
    "[1]: role 'robot' after 'user'": [USER, {"role": "robot", "content": "x"}],
    "the last message is the assistant's": [USER, SAID],
    "the last message is the system's": [SYSTEM],
    "[0]: expected {'role'": [{"role": "user"}],
    "[0]: expected {'role': ..., 'content': ...}, found hello": ["hello"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_dialogs_are_refused_with_their_place(message: str) -> None:
    policy = tiny_policy("gpt2", tokenizer=tiny_tokenizer(chat=True))
    with pytest.raises(UserError) as refused:
        chat_completion(policy, [[USER], WRONG[message]])  # type: ignore[list-item]
    assert refused.value.lines[0].startswith("dialogs[1]") and message in refused.value.lines[0]
    check_dialog([USER, SAID, {"role": "tool", "content": "4"}, SAID, USER])


def test_bad_arguments_are_one_line_each() -> None:
    policy = tiny_policy("gpt2")
    ids = [[9, 8]]
    for problem, call in {
        "prompts: none": lambda: generate(policy, []),
        "prompts[0]: empty": lambda: generate(policy, [[]], 3),
        "prompts[1]: the id 64 is out of range": lambda: generate(policy, [[5], [64]], 3),
        "prompts[0]: 129 tokens, more than the 128": lambda: generate(policy, [[5] * 129], 3),
        "prompts[0]: 20 tokens, more than the 10": lambda: generate(policy, [[5] * 20], 3, max_seq_len=10),
        "max_seq_len: 500; give 1 to 128": lambda: generate(policy, ids, 3, max_seq_len=500),
        "more than max_batch_size 1": lambda: generate(policy, ids * 2, 3, max_batch_size=1),
        "max_gen_len: -1": lambda: generate(policy, ids, -1),
        "sampling.temperature": lambda: generate(policy, ids, 3, temperature=-1.0),
        "sampling.top_p": lambda: generate(policy, ids, 3, top_p=0.0),
        "max_gen_len: this model's context has no limit": lambda: generate(tiny_policy("mamba"), ids),
        "prompts: one text": lambda: text_completion(policy, "hello"),
        "no chat template": lambda: chat_completion(policy, [[USER]]),
        "response: an id is out of range": lambda: sequence_logprob(policy, [5], [64]),
        "prompt: empty": lambda: sequence_logprob(policy, [], [6]),
        "response: prompt and response have 130 tokens": lambda: sequence_logprob(policy, [5] * 100, [5] * 30),
    }.items():
        with pytest.raises(UserError) as refused:
            call()
        assert problem in refused.value.lines[0] and len(refused.value.lines) == 1
    with pytest.raises(TypeError, match="color"):
        text_completion(policy, ["a"], color=1)


# -- confidence -------------------------------------------------------------------------------------------------------------


def test_confidence_is_what_it_says() -> None:
    report = confidence(["a", "b", "c", "d"], [None, math.log(0.5), math.log(0.01), math.log(0.05)], k=2, below=0.1)
    assert report.count == 3 and report.logprob == pytest.approx(math.log(0.5 * 0.01 * 0.05))
    assert report.perplexity == pytest.approx((0.5 * 0.01 * 0.05) ** (-1 / 3))
    assert report.average_logprob == pytest.approx(math.log(0.5 * 0.01 * 0.05) / 3)
    assert [(t.text, t.position) for t in report.least_certain] == [("c", 2), ("d", 3)]
    assert [t.text for t in report.under] == ["c", "d"]
    assert report.lines()[1] == "least certain: 'c' 0.01 (token 2), 'd' 0.05 (token 3)"
    assert confidence([], []).lines() == ["no tokens"]


def test_sequence_log_prob_is_the_sum_of_one_rows_log_probs() -> None:
    policy = tiny_policy("llama")
    prompt, response = policy.tokenizer("the end")["input_ids"], policy.tokenizer(" is good")["input_ids"]
    wanted = sum(alone(policy, prompt, response))
    assert sequence_logprob(policy, "the end", " is good") == pytest.approx(wanted, abs=1e-4)
    assert sequence_logprob(policy, prompt, response) == pytest.approx(wanted, abs=1e-4)
    assert sequence_logprob(policy, prompt, []) == 0.0
    full = [7 + i % 40 for i in range(CONTEXT + 1)]
    assert sequence_logprob(policy, full[:100], full[100:]) == pytest.approx(
        sum(alone(policy, full[:100], full[100:-1])) + float(law(policy, full[:-1])[-1, full[-1]]), abs=1e-3
    )


def test_steered_log_probs_are_those_of_the_steered_model() -> None:
    """A vector added to a block's output at every position, written out with a plain forward hook."""
    policy = tiny_policy("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    spec = {"sites": [{"name": "push", "at": {"layers": [0], "component": "block_output"}, "op": {"type": "add"},
                       "vector": vector.tolist(),
                       "strength": 2.0, "where": {"prompt": "all", "steps": "all"}}]}  # fmt: skip
    steering = Steering(policy.model, spec, policy.tokenizer)
    prompts = [policy.tokenizer(text)["input_ids"] for text in PROMPTS]
    found = complete(policy, prompts, Sampling(max_new_tokens=8, temperature=0.7), logprobs=True, echo=True, steering=steering)
    plain = complete(policy, prompts, Sampling(max_new_tokens=8, temperature=0.7), logprobs=True)
    assert [one.ids for one in found] != [one.ids for one in plain]

    def push(module: Any, inputs: Any, output: Any) -> Any:
        return (output[0] + 2.0 * vector, *output[1:]) if isinstance(output, tuple) else output + 2.0 * vector

    handle = policy.model.model.layers[0].register_forward_hook(push)
    for one in found:
        assert one.logprobs == pytest.approx(alone(policy, one.prompt_ids, one.ids), abs=5e-5)
        assert one.prompt_logprobs == [None, *map(pytest.approx, alone(policy, one.prompt_ids[:1], one.prompt_ids[1:]))] or (
            one.prompt_logprobs is not None
            and one.prompt_logprobs[1:] == pytest.approx(alone(policy, one.prompt_ids[:1], one.prompt_ids[1:]), abs=5e-5)
        )
    handle.remove()
    for one in plain:
        assert one.logprobs == pytest.approx(alone(policy, one.prompt_ids, one.ids), abs=5e-5)


def test_prompt_log_probs_of_ragged_prompts() -> None:
    policy = tiny_policy("gpt2")
    prompts = [[9], [5, 6, 7], [8] * 30]
    for prompt, numbers in zip(prompts, prompt_logprobs(policy, prompts, batch_size=2), strict=True):
        assert numbers[0] is None and numbers[1:] == pytest.approx(alone(policy, prompt[:1], prompt[1:]), abs=2e-5)


# -- streams ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,size", [("char", 64), ("bytes", 270), ("pieces", 320)])
def test_a_stream_writes_the_text_and_nothing_of_a_stop_string(kind: str, size: int) -> None:
    policy = tiny_policy("gpt2", tokenizer=tiny_tokenizer(size, kind=kind), vocab_size=size)
    written: list[str] = []
    stops = 0
    for seed in range(25):
        prompt = policy.tokenizer("say it")["input_ids"]
        [free] = complete(policy, [prompt], Sampling(max_new_tokens=20, seed=seed))
        clean = free.text.replace("\ufffd", "")
        stop = [clean[3:6]] if len(clean) > 6 and clean[3:6] in free.text and clean[3:6].strip() else []
        live = Live(policy.tokenizer, lambda piece: written.append(piece.text), policy.eos_ids, stop)
        written.clear()
        [done] = complete(policy, [prompt], Sampling(max_new_tokens=20, seed=seed, stop=stop), on_token=live)
        live.end(done.text)
        stops += done.stop_reason == "stop"
        if kind != "pieces" or "\ufffd" not in done.text:
            assert live.written == done.text
        assert "".join(written) == live.written
    assert stops > 3
