"""Process rewards: each step's value against the model run on the row alone."""

from __future__ import annotations

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout
from tests.episodes import samples_of, talk
from tests.models import tiny_tokenizer
from tests.reward.classifiers import saved, tiny_classifier
from tests.reward.rows import made

PROMPTS, RESPONSES = ["say:", "q"], ["one; two; three", "a;b"]


def rows(tokenizer):
    ids = [[tokenizer(text)["input_ids"] for text in texts] for texts in (PROMPTS, RESPONSES)]
    ids[1][1].append(2)
    return Rollout.of_ids(*ids), made(RESPONSES, PROMPTS)[1], ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "deberta"])
def test_every_token_is_judged_where_it_stands(family, tmp_path):
    model, tokenizer = tiny_classifier(family, labels=2, per_token=True), tiny_tokenizer()
    path = saved(model, tmp_path / "prm", tokenizer)
    rollout, texts, (prompts, responses) = rows(tokenizer)
    part = {"kind": "process", "path": path, "label": 1, "output": "probability"}
    scores = build_reward([part], tokenizer=tokenizer)(rollout, texts)
    for i in range(2):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompts[i] + responses[i]])).logits[0].double()
        expected = logits.softmax(-1)[len(prompts[i]) :, 1]
        got = scores.tokens_BR[i]
        assert torch.allclose(got[: len(responses[i])].double(), expected, atol=1e-5)
        assert not got[len(responses[i]) :].any()
        assert scores.total_B[i].item() == pytest.approx(expected.sum().item(), abs=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "last", "product"])
def test_steps_end_at_the_separator(reduce, tmp_path):
    model, tokenizer = tiny_classifier("llama", per_token=True), tiny_tokenizer()
    path = saved(model, tmp_path / "prm", tokenizer)
    rollout, texts, (prompts, responses) = rows(tokenizer)
    scores = build_reward([{"kind": "process", "path": path, "separator": "; ", "reduce": reduce}], tokenizer=tokenizer)(
        rollout, texts
    )
    ends = [[4, 9, 14], [3]]  # "one; " "two; " "three" ; "a;b</s>" holds no "; "
    for i in range(2):
        with torch.no_grad():
            values = (
                model(input_ids=torch.tensor([prompts[i] + responses[i]])).logits[0, len(prompts[i]) :, 0][ends[i]].double()
            )
        expected = {
            "sum": values.sum(),
            "mean": values.mean(),
            "min": values.min(),
            "last": values[-1],
            "product": values.prod(),
        }[reduce]
        assert scores.total_B[i].item() == pytest.approx(expected.item(), abs=1e-5)
        if reduce == "sum":
            assert scores.tokens_BR[i].nonzero().flatten().tolist() == ends[i]
    assert (scores.tokens_BR is not None) == (reduce == "sum")


def test_of_an_episode_only_the_policys_turns_are_judged(tmp_path):
    """The model reads the whole row; steps end in a turn, or with it, never in what was fed."""
    model, tokenizer = tiny_classifier("llama", per_token=True), tiny_tokenizer()
    path = saved(model, tmp_path / "prm", tokenizer)
    texts = made(["x"])[1]
    ids = tokenizer("one; two [3; 4] six; seven")["input_ids"]
    mask = [0 if 9 <= t < 15 else 1 for t in range(len(ids))]  # "[3; 4]" was fed
    rollout = Rollout.of_ids([[5, 6]], [ids], action_mask_BR=[mask])
    with torch.no_grad():
        values = model(input_ids=torch.tensor([[5, 6, *ids]])).logits[0, 2:, 0]
    ends = {"; ": [4, 8, 20, 25], None: [t for t, drawn in enumerate(mask) if drawn]}
    for separator, places in ends.items():
        tokens_BR = build_reward([{"kind": "process", "path": path, "separator": separator}], tokenizer=tokenizer)(
            rollout, texts
        ).tokens_BR
        assert tokens_BR[0].nonzero().flatten().tolist() == places
        assert torch.allclose(tokens_BR[0, places], values[places], atol=1e-5)


def test_turns_with_nothing_between_them_are_judged_apart(tmp_path):
    path = saved(tiny_classifier("llama", per_token=True), tmp_path / "prm", tiny_tokenizer())
    samples = samples_of([talk("go", ("left", ""), ("right", " you may"), ("on", ""), chat=False)])
    part = {"kind": "process", "path": path, "separator": "; ", "tokens": "ids"}
    scores = build_reward([part])(*samples)
    assert scores.tokens_BR[0].nonzero().flatten().tolist() == [3, 8, 18]


def test_a_separator_may_begin_with_the_blank_of_a_steps_first_token(tmp_path):
    tokenizer = tiny_tokenizer(330, kind="pieces")
    path = saved(tiny_classifier("llama", per_token=True, vocab_size=len(tokenizer)), tmp_path / "prm", tokenizer)
    the, end, dot = (tokenizer.convert_tokens_to_ids(token) for token in ("▁the", "end", "."))
    for prompt, response, ends in (([end], [the, end, the, the, dot], [0, 2, 3, 4]), ([dot], [end, dot, the], [2])):
        rollout = Rollout.of_ids([prompt], [response])
        part = {"kind": "process", "path": path, "separator": " the"}
        scores = build_reward([part], tokenizer=tokenizer)(rollout, made(["x"])[1])
        assert scores.tokens_BR[0].nonzero().flatten().tolist() == ends


def test_what_cannot_be_judged(tmp_path):
    model, tokenizer = tiny_classifier("llama", per_token=True), tiny_tokenizer()
    path = saved(model, tmp_path / "prm", tokenizer)
    rollout, texts, _ = rows(tokenizer)
    with pytest.raises(UserError, match=r"reward\[0\] \(process\).tokens: the model's vocabulary is not the policy's"):
        build_reward([{"kind": "process", "path": path}], tokenizer=tiny_tokenizer(60))(rollout, texts)
    with pytest.raises(UserError, match="row 10 sample 0 has no sampled ids"):
        build_reward([{"kind": "process", "path": path}], tokenizer=tokenizer)(*made([""]))
    saved(tiny_classifier("llama"), tmp_path / "rm", tokenizer)
    with pytest.raises(UserError, match=r"reward\[0\].path: .*has no weights for"):
        build_reward([{"kind": "process", "path": str(tmp_path / "rm")}])
