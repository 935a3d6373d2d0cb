"""Where a response ends (exactness rows 10 to 13): stop ids, stop strings, pad = eos, pads that were drawn, odd sizes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import Stops, can_spell, turn_end, warn_endless
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import STOP_EOS, STOP_LENGTH, STOP_USER
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
    fixed = type(policy.capabilities)(padding=True, caching=True, row_selection=False, pads_in_text=True)
    policy = policy.with_model(policy.model, fixed)
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


_BYTES = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]  # bytes that stand for themselves
_LONG = ["//--------", "-" * 70, "*/" + "=" * 40, "x//y" + "z" * 30]
LONG_TOKENS: dict[str, tuple[list[str], list[str]]] = {
    "bytes": ([*_BYTES, "Ġ", *_LONG, "Ġ//" + "-" * 50, "Ã", "©", "â", "Ĥ", "¬", "ð"], ["//", "/ /", "é", "€//", "--*", "z-"]),
    "pieces": (
        [*(f"<0x{b:02X}>" for b in range(256)), "▁", *"abx/-=*", *_LONG, "▁//" + "-" * 50],
        ["//", " //", "é", "€//", "--*", "x/"],
    ),
    "wordpiece": (
        ["the", "a", "##b", "//", "##//", *_LONG, *(f"##{text}" for text in _LONG), "é"],
        ["//", "- //", "ab", "é//", "the a"],
    ),
}


def long_tokenizer(kind: str) -> Any:
    entries = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(LONG_TOKENS[kind][0])]
    if kind == "pieces":
        core = Tokenizer(models.Unigram([(entry, -1.0) for entry in entries], unk_id=3, byte_fallback=True))
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        vocabulary = {entry: i for i, entry in enumerate(entries)}
        core = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>") if kind == "wordpiece" else models.BPE(vocabulary, []))
        core.decoder = decoders.WordPiece("##") if kind == "wordpiece" else decoders.ByteLevel()
        if kind == "bytes":
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in entries[:4]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.mark.parametrize("kind", LONG_TOKENS)
def test_a_row_ends_at_the_first_token_whose_text_has_the_string_however_long_tokens_are(kind: str) -> None:
    """Random rows, longer than any window, of a few tokens each: every prefix decoded from scratch says where."""
    tokenizer, (pieces, strings) = long_tokenizer(kind), LONG_TOKENS[kind]
    policy = Policy.of(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer)
    generator, ended = random.Random(0), 0
    long = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces if len(piece) > 8]
    for stop in [[text] for text in strings] + [strings[:3]]:
        stops = Stops(Sampling(stop=stop), policy)
        alone = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        safe = [i for i, said in enumerate(alone) if "\ufffd" not in said and not set(said) & set("".join(stop))]
        for _ in range(12):
            # A long beginning in which nothing matches, then anything: what is looked for comes late, in a long token too.
            ids = [generator.choice(safe or [0]) for _ in range(generator.randrange(0, 90))]
            ids += [generator.randrange(len(tokenizer)) for _ in range(generator.choice((0, 20)))]
            ids += [generator.choice(long) for _ in range(6)]
            texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
            expected = next((n for n, text in enumerate(texts) if any(part in text for part in stop)), None)
            assert stops.first(ids) == expected, (kind, stop, ids)
            whole = texts[-1] if expected is None else texts[expected]
            at = [whole.find(part) for part in stop if part in whole]
            assert stops.text(ids[:expected]) == (whole[: min(at)] if at else whole)
            ended += expected is not None and expected > 30
    assert ended > 15


def test_a_stop_string_at_the_start_of_a_long_token_ends_its_row() -> None:
    tokenizer = long_tokenizer("bytes")
    a, comment = (tokenizer.convert_tokens_to_ids(piece) for piece in ("a", "x//y" + "z" * 30))
    rollout, texts = scripted([[a] * 60 + [comment] + [a] * 5], tokenizer, stop=["//"])
    assert rollout.lengths_B.tolist() == [61] and rollout.stop_B.tolist() == [STOP_USER]
    assert texts.completions == ["a" * 60 + "x"]


def test_both_paths_end_rows_alike() -> None:
    tokenizer = tiny_tokenizer()
    policy = Policy.of(tiny("gpt2"), tokenizer)
    settings = Sampling(max_new_tokens=24, n=4, temperature=1.5, stop=["a", "e.", "q"], stop_ids=[30])
    batch = PromptBatch.of_ids([[5, 6, 7], [8], [2, 0, 30, 31]])
    rollout, _ = Sampler(policy, settings).sample(batch)
    reference, _ = Sampler(policy, settings, engine=EngineSettings("generate")).sample(batch)
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
        with pytest.raises(UserError, match="cannot spell"):
            Stops(Sampling(stop=[text]), policy)


def test_stop_ids_out_of_range() -> None:
    with pytest.raises(UserError, match=r"sampling.stop_ids: 64 is out of range; ids go from 0 to 63"):
        Sampler(tiny_policy("gpt2"), Sampling(stop_ids=[64]))


# -- templates that end a turn with a token of their own ---------------------------------------------------------------

MARKED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKED = [{"role": "user", "content": "hi"}]


def marked_policy(template: str = MARKED) -> Policy:
    tokenizer = tiny_tokenizer(chat=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Policy.of(tiny("gpt2", vocab_size=80), tokenizer)


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (MARKED, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}", "</s>"),
        ("<s>{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}<|im_start|>{{ m.content }}{{ ' ' if loop.last else '' }}{% endfor %}", None),
    ],
)
@pytest.mark.parametrize("talk", [ASKED, [*ASKED, {"role": "assistant", "content": "<s>b"}]])
def test_the_token_at_the_end_of_a_turn_is_found_by_rendering(template: str, token: str | None, talk: list) -> None:
    tokenizer = marked_policy(template).tokenizer
    assert turn_end(tokenizer, talk) == (None if token is None else tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize(
    ("settings", "eos", "prompt", "words"),
    [
        ({}, (), "hi", "no eos token, so every response runs to sampling.max_new_tokens; set sampling.stop_ids"),
        ({"stop_ids": [5]}, (), "hi", None),
        ({"stop": ["."]}, (), "hi", None),
        ({}, (2,), "hi", None),
        ({}, (2,), ASKED, "ends a turn with <|im_end|>"),
        ({}, (2, 65), ASKED, None),
        ({"stop": ["<|im_end|>"]}, (2,), ASKED, None),
    ],
)
def test_what_never_ends_is_told(settings: dict, eos: tuple, prompt: Any, words: str | None, caplog: Any) -> None:
    policy = dataclasses.replace(marked_policy(), eos_ids=eos)
    warn_endless(policy, Sampling(**settings), prompt)
    assert len(caplog.records) == (words is not None) and (words or "") in caplog.text
