"""What ids say after a prompt (exactness row 36): prompt text + completion is the decoded row, for every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerl.rollout.chat.confidence import sequence_logprob
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.prompts.prompts import PromptBatch
from tests.models import tiny, tiny_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|turn|>"]
WORDS = ["▁", "▁the", "▁film", "▁was", "good", "er", "s", ".", "▁▁", "\n", "▁é", "語"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def fast(core: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **more)


def legacy_llama() -> Any:
    """Llama 2 as it was converted at first: the blank before a row's first word is stripped when decoding."""
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *BYTES, *WORDS])}, [], unk_token="<unk>"))
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return fast(core)


def metaspace(scheme: str) -> Any:
    core = Tokenizer(models.Unigram([(t, -float(i)) for i, t in enumerate([*SPECIAL, *WORDS])], unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return fast(core)


def wordpiece(clean: bool) -> Any:
    entries = [*SPECIAL, "the", "film", "was", "##good", "##er", "##s", ".", "don", "##'t", "é"]
    core = Tokenizer(models.WordPiece({t: i for i, t in enumerate(entries)}, unk_token="<unk>"))
    core.decoder = decoders.WordPiece(cleanup=False)
    return fast(core, clean_up_tokenization_spaces=clean)


def blanks(tokens: list[str]) -> str:
    return "".join(tokens).replace("▁", " ")


def words(tokens: list[str]) -> str:
    return "".join(token[2:] if token.startswith("##") else " " + token for token in tokens)


def cleaned(tokens: list[str]) -> str:
    return words(tokens).replace(" .", ".")


KINDS: dict[str, tuple[Callable[[], Any], Callable[[list[str]], str]]] = {
    "legacy llama": (legacy_llama, blanks),
    "metaspace always (T5)": (lambda: metaspace("always"), blanks),
    "metaspace first": (lambda: metaspace("first"), blanks),
    "metaspace never": (lambda: metaspace("never"), blanks),
    "WordPiece": (lambda: wordpiece(False), words),
    "WordPiece, cleaned up": (lambda: wordpiece(True), cleaned),
    "words": (lambda: tiny_tokenizer(64, kind="word"), words),
    "sentencepiece-like": (lambda: tiny_tokenizer(320, kind="pieces"), blanks),
}


def rows(tokenizer: Any, seed: int, count: int, low: int = 4) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) ids: a prompt with a word in it and special tokens about, a response with some inside."""
    draw, special = random.Random(seed), [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    plain = [i for i in range(low, len(tokenizer)) if i not in special]

    def some(most: int) -> list[int]:
        return [draw.choice(special) if draw.random() < 0.15 else draw.choice(plain) for _ in range(draw.randint(1, most))]

    return [([*some(6), draw.choice(plain), *draw.choices(special, k=draw.randint(0, 2))], some(8)) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_says_its_pieces_with_their_blanks(kind: str) -> None:
    make, said = KINDS[kind]
    tokenizer = make()
    speller, silent = Speller(tokenizer), set(SPECIAL)
    is_byte = len(BYTES) + len(SPECIAL) if "llama" in kind else 4 + 256 if "sentencepiece" in kind else 0
    alone = 0
    for prompt, response in rows(tokenizer, 0, 500, low=is_byte):
        tokens = [token for token in tokenizer.convert_ids_to_tokens(response) if token not in silent]
        assert speller.after(prompt, response) == said(tokens), (prompt, response)
        alone += tokenizer.decode(response, skip_special_tokens=True) != said(tokens)
    assert alone > 50 or kind == "metaspace never"  # what decoding the response alone gets wrong


@pytest.mark.parametrize("kind", ["legacy llama", "sentencepiece-like"])
def test_prompt_and_completion_are_the_decoded_row_with_bytes_at_the_border(kind: str) -> None:
    tokenizer = KINDS[kind][0]()
    speller, silent, split = Speller(tokenizer), Speller(tokenizer).silent, 0
    for prompt, response in rows(tokenizer, 1, 1000):
        before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *(i for i in response if i not in silent)])
        text = speller.after(prompt, response)
        long = prompt * 4
        assert speller.after(speller.tail(long), response) == speller.after(long, response)  # its end says enough
        if whole.startswith(before):
            assert before + text == whole
        else:  # bytes of both sides make other characters together
            split += 1
            assert whole.endswith(text) or text == tokenizer.decode(response, skip_special_tokens=True)
    assert split < 200
    euro = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "€".encode()]
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert speller.after([the, *euro[:1]], [*euro[1:], the]) == "€ the"


@pytest.mark.parametrize(("kind", "size"), [("bytes", 270), ("char", 64)])
def test_texts_of_byte_level_tokenizers_are_what_they_were(kind: str, size: int) -> None:
    tokenizer = tiny_tokenizer(size, kind=kind)
    stops = Stops(Sampling(), Policy.of(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer))
    for prompt, response in rows(tokenizer, 2, 500):
        if "\ufffd" not in tokenizer.decode(prompt)[-1:]:
            assert stops.text(response, prompt) == tokenizer.decode(response, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_join_to_the_text(kind: str) -> None:
    """What tables and the viewer show: no word runs into the next."""
    tokenizer = KINDS[kind][0]()
    speller, special = Speller(tokenizer), set(SPECIAL)
    for entry, i in tokenizer.get_vocab().items():
        if entry in special:
            assert entry in speller.token(i)
        elif not entry.startswith("<0x"):
            assert speller.token(i) == KINDS[kind][1]([entry])


def test_a_text_that_goes_on_is_encoded_as_it_was_drawn() -> None:
    """sequence_logprob and pairs of texts: the blank that a tokenizer adds is not said twice."""
    tokenizer = tiny_tokenizer(320, kind="pieces")
    policy = Policy.of(tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    prompt, drawn = tokenizer("the end")["input_ids"], tokenizer.convert_tokens_to_ids(["▁good", "er", "▁the"])
    text = Speller(tokenizer).after(prompt, drawn)
    assert text == " gooder the" and Speller(tokenizer).ids(prompt, text) == drawn
    assert sequence_logprob(policy, "the end", text) == sequence_logprob(policy, prompt, drawn)


def test_an_encoder_decoder_begins_a_text_of_its_own() -> None:
    tokenizer = metaspace("always")
    stops = Stops(Sampling(), Policy.of(tiny("t5", vocab_size=len(tokenizer)), tokenizer))
    for prompt, response in rows(tokenizer, 3, 100):
        assert stops.text(response, prompt) == tokenizer.decode(response, skip_special_tokens=True)


@pytest.mark.parametrize("stop", ([], [" the", "d."]))
def test_what_the_sampler_says_is_the_decoded_row(stop: list[str]) -> None:
    tokenizer = tiny_tokenizer(320, kind="pieces")
    policy = Policy.of(tiny("llama", vocab_size=len(tokenizer), scale=0.05), tokenizer)
    batch = PromptBatch.of_ids([tokenizer(text)["input_ids"] for text in ("the end", "a good", "inner")], tokenizer=tokenizer)
    settings = Sampling(max_new_tokens=12, n=40, temperature=1.5, stop=stop, bad_words=[])
    rollout, texts = Sampler(policy, settings).sample(batch)
    begun = 0
    for i, text in enumerate(texts.completions):
        row = [*batch.ids[i // 40], *rollout.response_BR[i, : int(rollout.lengths_B[i])].tolist()]
        whole = tokenizer.decode([token for token in row if token > 3])
        here = [at for end in stop if (at := whole.find(end, len(texts.prompt_texts[i]))) >= 0]
        assert texts.prompt_texts[i] + text == (whole[: min(here)] if here else whole)
        assert (rollout.stop_B[i] == 2) == bool(here)
        begun += text.startswith(" ")
    assert begun or stop
