"""Where a response ends (exactness rows 10 to 13): stop ids, stop strings, pad = eos, pads that were drawn, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rollout.batch import STOP_EOS, STOP_LENGTH, STOP_USER
from rollout.errors import Problem
from rollout.policy import Policy
from rollout.prompts import PromptBatch
from rollout.reference import reference_generate
from rollout.sampler import Sampler
from rollout.sampling import Sampling
from rollout.stops import Stops, can_spell
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.rollout.definitions import real_response, worst_gap


def sampled(policy: Policy, prompts: list[list[int]] | None = None, **settings: Any) -> Any:
    batch = PromptBatch.of_ids(prompts or [[5, 6, 7], [8], [2, 0, 30, 31]])
    return Sampler(policy, Sampling(**{"max_new_tokens": 16, "n": 8, "temperature": 1.5, **settings})).sample(batch)


class Script:
    """Makes a model draw given tokens: all of a step's probability is on the row's next one."""

    def __init__(self, model: Any, rows: list[list[int]], size: int):
        self.rows, self.size, self.step = rows, size, 0
        model.lm_head.register_forward_hook(self)

    def __call__(self, _: Any, __: Any, logits: Any) -> Any:
        wanted = torch.tensor([row[min(self.step, len(row) - 1)] for row in self.rows])[: len(logits)]
        self.step += 1
        return torch.nn.functional.one_hot(wanted, self.size)[:, None].float().expand(-1, logits.shape[1], -1) * 1e4


def scripted(rows: list[list[int]], tokenizer: Any = None, **settings: Any) -> Any:
    """What the sampler makes of these drawn tokens, one prompt row each (of falling length, so that they keep their places)."""
    tokenizer = tokenizer or tiny_tokenizer()
    size = len(tokenizer)
    policy = Policy.of(tiny("llama", vocab_size=size), tokenizer)
    policy.__dict__["habits"] = type(policy.habits)(padding=True, caching=True, picking=False, pads_in_text=True)
    Script(policy.model, rows, size)
    batch = PromptBatch.of_ids([[5] * (len(rows) - k) for k in range(len(rows))])
    return Sampler(policy, Sampling(**{"max_new_tokens": max(map(len, rows)), **settings})).sample(batch)


# -- ids -------------------------------------------------------------------------------------------------------------


def test_a_stop_token_is_an_action_and_nothing_comes_after_it() -> None:
    rollout, _ = scripted([[9, 10, 2, 11], [9, 10, 11, 12], [2, 9, 9, 9], [9, 9, 9, 2]])
    assert rollout.lengths_B.tolist() == [3, 4, 1, 4]
    assert rollout.ended_B.tolist() == [True, False, True, True]
    assert rollout.response_BR.tolist() == [[9, 10, 2, 0], [9, 10, 11, 12], [2, 0, 0, 0], [9, 9, 9, 2]]
    assert rollout.stop_B.tolist() == [STOP_EOS, STOP_LENGTH, STOP_EOS, STOP_EOS]


def test_pad_equal_to_eos_and_pads_drawn_in_mid_response() -> None:
    """Lengths come from the stop's place. A drawn pad is text; where pad is eos it stops, and counts."""
    rollout, _ = scripted([[9, 0, 10, 2], [0, 0, 0, 9]])
    assert rollout.lengths_B.tolist() == [4, 4] and rollout.response_BR[1].tolist() == [0, 0, 0, 9]
    assert rollout.ended_B.tolist() == [True, False]
    same, _ = scripted([[9, 2, 10, 2], [0, 0, 0, 9]], tiny_tokenizer(pad="</s>"))
    assert same.lengths_B.tolist() == [2, 4] and same.response_BR[0].tolist() == [9, 2, 0, 0]


def test_several_stop_ids_and_what_each_is_called() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 33]
    policy = Policy.of(model, tiny_tokenizer())
    assert policy.eos_ids == (2, 33)
    stops = Stops(Sampling(stop_ids=[33, 40, 41]), policy)
    assert stops.by_id(torch.tensor([2, 33, 40, 41, 5])).tolist() == [STOP_EOS, STOP_EOS, STOP_USER, STOP_USER, STOP_LENGTH]
    rollout, _ = sampled(policy, stop_ids=[40, 41])
    for b in range(len(rollout)):
        response = real_response(rollout, b)
        assert not {2, 33, 40, 41} & set(response[:-1])
        reason = STOP_EOS if response[-1] in (2, 33) else STOP_USER if response[-1] in (40, 41) else STOP_LENGTH
        assert int(rollout.stop_B[b]) == reason and bool(rollout.ended_B[b]) == (reason != STOP_LENGTH)
        assert reason != STOP_LENGTH or len(response) == 16
    assert {STOP_EOS, STOP_USER} <= set(rollout.stop_B.tolist())


@pytest.mark.parametrize("family", ("gpt2", "opt", "bloom", "t5", "bart"))
@pytest.mark.parametrize(("pad", "side"), (("</s>", "right"), (None, "left"), ("<pad>", "right")))
def test_pad_missing_pad_equal_to_eos_and_either_side(family: str, pad: str | None, side: str) -> None:
    """None of them changes a token: padding is done here, with explicit masks."""
    model = tiny(family)
    expected, _ = sampled(Policy.of(model, tiny_tokenizer()))
    if pad != "<pad>":
        model.config.pad_token_id = model.generation_config.pad_token_id = None
    policy = Policy.of(model, tiny_tokenizer(pad=pad, side=side))
    assert policy.pad_id == (0 if pad == "<pad>" else 2)
    rollout, _ = sampled(policy)
    assert torch.equal(rollout.response_BR, expected.response_BR)
    assert (rollout.policy_logprobs_BR - expected.policy_logprobs_BR).abs().max() < 1e-5
    assert worst_gap(model, rollout, Sampling(temperature=1.5)) < 1e-5


@pytest.mark.parametrize("family", ("gpt2", "bart", "t5"))
def test_the_smallest_sizes(family: str) -> None:
    """A prompt of one token, a batch of one, a response of one token, a prompt of stop and pad tokens alone."""
    policy = tiny_policy(family)
    for prompts in ([[5]], [[2]], [[0, 2, 0]], [[2, 2], [0]]):
        rollout, texts = sampled(policy, prompts, n=1, max_new_tokens=1)
        assert rollout.response_BR.shape == (len(prompts), 1) and rollout.lengths_B.tolist() == [1] * len(prompts)
        assert worst_gap(policy.model, rollout, Sampling(temperature=1.5)) < 1e-5 and len(texts) == len(prompts)


def test_the_checkpoints_forced_bos_is_part_of_the_start_and_forced_eos_is_dropped() -> None:
    model = tiny("mbart", forced_eos_token_id=2)
    policy = Policy.of(model, tiny_tokenizer())
    assert policy.start_ids == (2, 5)
    rollout, _ = sampled(policy, max_new_tokens=4, stop_ids=[])
    assert rollout.start_ids == (2, 5) and rollout.sequences_BS[:, :2].tolist() == [[2, 5]] * len(rollout)
    assert any(not ended for ended in rollout.ended_B.tolist())  # the last token is not forced to be eos
    assert worst_gap(model, rollout, Sampling(temperature=1.5)) < 1e-5


# -- strings -----------------------------------------------------------------------------------------------------------


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def test_strings_that_span_tokens_or_begin_inside_one() -> None:
    tokenizer = tiny_tokenizer(320, kind="pieces")
    words = ids_of(tokenizer, "▁the", "end", "▁end", "▁good", ".", "th", "er")
    the, end, _end, good, dot, th, er = words
    # "eend" begins inside "▁the"; "d." spans; "good" is inside "▁good"; nothing stops the last row.
    rows = [[the, end, dot, good], [good, _end, dot, dot], [th, er, good, dot], [th, er, th, er]]
    rollout, texts = scripted(rows, tokenizer, stop=["eend", "d.", "good"])
    assert rollout.lengths_B.tolist() == [2, 1, 3, 4]
    assert rollout.stop_B.tolist() == [STOP_USER, STOP_USER, STOP_USER, STOP_LENGTH]
    assert texts.completions == [" th", " ", "ther ", "ther" * 2]


def test_multi_byte_strings_split_inside_a_character() -> None:
    tokenizer = tiny_tokenizer(264, kind="bytes")
    euro, dash = tokenizer.encode("€"), tokenizer.encode("—é")
    a = tokenizer.encode("a")
    assert len(euro) == 3 and len(dash) == 5
    rollout, texts = scripted([a + euro + a, dash + a, a + dash[:2] + euro], tokenizer, stop=["€", "é"])
    assert rollout.lengths_B.tolist() == [4, 5, 6]
    assert [text.replace("\ufffd", "?") for text in texts.completions] == ["a", "—", "a?"]


def test_byte_fallback_and_long_runs_of_split_characters() -> None:
    tokenizer = tiny_tokenizer(320, kind="pieces")
    sign = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "語".encode()]
    end = ids_of(tokenizer, "end")
    rows = [sign * 30 + end, sign * 29 + sign[:2] + end + sign[:1]]
    rollout, texts = scripted(rows, tokenizer, stop=["語end"], max_new_tokens=91)
    assert rollout.lengths_B.tolist() == [91, 91] and rollout.ended_B.tolist() == [True, False]
    assert texts.completions[0] == "語" * 29


def test_words_joined_by_blanks() -> None:
    """Word-level tokenizers: the blank between words is nobody's token."""
    tokenizer = tiny_tokenizer(64, kind="word")
    rows = [tokenizer.encode("the good film was bad"), tokenizer.encode("was good the film bad")]
    rollout, texts = scripted(rows, tokenizer, stop=["good film", "m b"])
    assert rollout.lengths_B.tolist() == [3, 5] and texts.completions == [" the ", " was good the fil"]


def test_special_tokens_as_stop_strings_and_inside_them() -> None:
    tokenizer = tiny_tokenizer()
    a, b = tokenizer.encode("ab")
    rollout, texts = scripted([[a, 1, b, b], [a, a, 3, b], [a, b, 1, b]], tokenizer, stop=["<s>", "a<unk>b"])
    assert rollout.lengths_B.tolist() == [2, 4, 3] and rollout.stop_B.tolist() == [STOP_USER] * 3
    assert texts.completions == ["a", "a", "ab"]


def test_the_window_finds_what_decoding_everything_finds() -> None:
    """Random ids of four kinds of tokenizers: the step found equals the first prefix whose whole text has the string."""
    generator = torch.Generator().manual_seed(0)
    for kind, size, strings in (
        ("char", 64, ["ab", "a", "zz.", ". "]),
        ("word", 64, ["good film", "d w", "the end ."]),
        ("bytes", 270, ["ab", " t", "é", "\u00ff", "b\x00"]),
        ("pieces", 330, ["end.", " the", "é", "thth", "n t"]),
    ):
        tokenizer = tiny_tokenizer(size, kind=kind)
        policy = Policy.of(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer)
        common = [i for text in strings for i in tokenizer.encode(text, add_special_tokens=False)]
        for stop in strings:
            stops = Stops(Sampling(stop=[stop]), policy)
            for _ in range(6):
                draw = torch.randint(4, len(tokenizer), (90,), generator=generator).tolist()
                use = torch.randint(0, 2, (90,), generator=generator).tolist()
                other = torch.randint(0, len(common), (90,), generator=generator).tolist()
                ids = [common[o] if u else d for d, u, o in zip(draw, use, other, strict=True)]
                texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(91)]
                expected = next((n for n in range(91) if stop in texts[n]), None)
                assert stops.first(ids) == expected, (kind, stop, ids)
                prompt = [*draw[:5], *tokenizer.encode("a the", add_special_tokens=False)]  # whole characters at its end
                said = tokenizer.decode(prompt)
                texts = [tokenizer.decode([*prompt, *(i for i in ids[:n] if i > 3)])[len(said) :] for n in range(91)]
                expected = next((n for n in range(91) if stop in texts[n]), None)
                assert stops.first(ids, stops.before(prompt)) == expected, (kind, stop, prompt, ids)


def test_both_paths_end_rows_alike() -> None:
    tokenizer = tiny_tokenizer()
    policy = Policy.of(tiny("gpt2"), tokenizer)
    settings = Sampling(max_new_tokens=24, n=4, temperature=1.5, stop=["a", "e.", "q"], stop_ids=[30])
    batch = PromptBatch.of_ids([[5, 6, 7], [8], [2, 0, 30, 31]])
    rollout, _ = Sampler(policy, settings).sample(batch)
    reference, _ = reference_generate(policy, settings, batch)
    assert STOP_USER in rollout.stop_B.tolist()
    for field in ("response_BR", "lengths_B", "stop_B", "ended_B"):
        assert torch.equal(getattr(rollout.trim(), field), getattr(reference.trim(), field)), field


@pytest.mark.parametrize(("kind", "text", "good"), [
    ("char", "abc", True), ("char", "é", False), ("char", "aé", False), ("word", "good film", True), ("word", "od fi", True),
    ("word", "goodfilm", False), ("word", "xyz", False), ("word", "d  w", False), ("bytes", "é語", True),
    ("pieces", "語 end", True), ("pieces", "xyz!", True),
])  # fmt: skip
def test_what_a_tokenizer_can_spell(kind: str, text: str, good: bool) -> None:
    size = {"char": 64, "word": 64, "bytes": 264, "pieces": 320}[kind]
    tokenizer = tiny_tokenizer(size, kind=kind)
    assert can_spell(tokenizer, text) == good
    policy = Policy.of(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer)
    if not good:
        with pytest.raises(Problem, match="cannot spell"):
            Stops(Sampling(stop=[text]), policy)


def test_stop_ids_out_of_range() -> None:
    with pytest.raises(Problem, match=r"sampling.stop_ids: 64 is out of range; ids go from 0 to 63"):
        Sampler(tiny_policy("gpt2"), Sampling(stop_ids=[64]))
