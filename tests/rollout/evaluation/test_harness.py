"""The model of the harness: beside the harness's own HFLM, and, steered, beside a model with a hand-written hook."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from steerl.rollout.common.errors import ConfigError, DataError
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.models import tiny, tiny_tokenizer

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from steerl.rollout.evaluation import answers
from steerl.rollout.evaluation.harness import SteerlLM
from steerl.rollout.evaluation.tasks import Tasks

TASKS = Path(__file__).parent / "tasks"
KINDS = {
    "llama": ("char", 64),
    "gpt2": ("bytes", 300),
    "t5": ("pieces", 340),
}
"""Family -> its tokenizer."""
TEXTS = [
    ("the good film was ", "bad"),
    ("Q: 1+1?\nA:", " 2"),
    ("Q: 1+1?\nA:", " 3"),
    ("Q: 1+1?\nA: ", "a longer answer, to be sure."),
    ("", "nothing before it"),
    ("trailing blanks   ", "go over"),
    ("x" * 150, " the context is cut"),
    ("short", "y" * 100 + " end"),
    ("ab", "abab"),  # `ab` is one piece of the bytes
    ("日本語 ", "質問 🙂"),
    ("one", "t"),
    ("one", "e"),
    ("one", "a"),
    ("two", "xya"),
    ("two", "xyb"),
]


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="none") for each in arguments]


def both(family: str, batch_size: int = 4, **arguments: Any) -> tuple[SteerlLM, HFLM]:
    kind, size = KINDS[family]
    tokenizer = tiny_tokenizer(size, kind=kind, chat=True)
    model = tiny(family, vocab_size=size)
    ours = SteerlLM(Policy.of(model, tokenizer), batch_size=batch_size, **arguments)
    theirs = HFLM(tiny(family, vocab_size=size), tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    return ours, theirs


def near(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", KINDS)
def test_log_likelihoods_are_the_harness_s_own(family):
    ours, theirs = both(family)
    for name in ("max_length", "prefix_token_id", "eot_token_id", "tokenizer_name", "backend"):
        assert getattr(ours, name) == getattr(theirs, name), name
    found, wanted = (lm.loglikelihood(requests(*TEXTS), disable_tqdm=True) for lm in (ours, theirs))
    near([value for value, _ in found], [value for value, _ in wanted])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("family", KINDS)
def test_rolling_log_likelihoods_are_the_harness_s_own(family):
    ours, theirs = both(family)
    texts = requests(("the film was good.",), ("a" * 127,), ("b" * 128,), ("the end. " * 60,), ("x",))
    near(ours.loglikelihood_rolling(texts, disable_tqdm=True), theirs.loglikelihood_rolling(texts, disable_tqdm=True))


@pytest.mark.parametrize("family", KINDS)
def test_generations_are_the_harness_s_own(family):
    ours, theirs = both(family)
    asked = [
        ("the good film was", {"until": ["\n", "q"], "max_gen_toks": 20}),
        ("Q: 1+1?\nA:", {"until": "\n", "max_new_tokens": 9, "do_sample": False, "temperature": 0.0}),
        ("a", {"until": ["zz", "</s>"], "max_gen_toks": 30}),
        ("y" * 140, {"until": ["<s>"], "max_gen_toks": 16}),
        ("the good film was bad", {"until": [], "max_gen_toks": 16}),
    ]
    found, wanted = (lm.generate_until(requests(*asked), disable_tqdm=True) for lm in (ours, theirs))
    if family == "t5":  # there the limit grows by the encoder's length, which takes up none of the decoder's
        assert len(found[0]) == 20  # one token a letter
        wanted = [text[: len(one)] for text, one in zip(wanted, found, strict=True)]
    assert found == wanted
    assert len({text[:8] for text in found}) > (0 if family == "t5" else 3)


def test_choices_that_differ_in_their_last_token_share_a_row():
    """Letters of one context, and longer ones; the likeliest of them is known as such."""
    ours, theirs = both("llama")
    ((text,), rows) = ours.generate_until(requests(("pick: ", {"until": [], "max_gen_toks": 3})), True), []
    asked = requests(*(("pick:", f" {text[:2]}{end}") for end in (text[2], "a", "b", "c")), *(("pick:", end) for end in "xyz"))
    ours.policy.model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.logits)))
    found, wanted = ours.loglikelihood(asked, True), theirs.loglikelihood(asked, True)
    assert sum(rows) == 2
    near([value for value, _ in found], [value for value, _ in wanted])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_greedy_continuation_is_said_to_be_one():
    ours, theirs = both("llama")
    ((text,), prompt) = ours.generate_until(requests(("the film", {"until": [], "max_gen_toks": 8})), True), "the film"
    other = text[:-1] + ("a" if text[-1] != "a" else "b")
    found = ours.loglikelihood(requests((prompt, text), (prompt, other), (prompt, text[:1]), (prompt, other[-1])), True)
    wanted = theirs.loglikelihood(requests((prompt, text), (prompt, other), (prompt, text[:1]), (prompt, other[-1])), True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] == [True, False, True, False]


@pytest.mark.parametrize("watched", [False, True])
def test_likeliest_is_the_argmax(watched):
    """With the head in chunks, and where somebody looks at the logits."""
    policy = Policy.of(tiny("llama"), tiny_tokenizer())
    ids = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rollout = Rollout.of_ids([row[:n] for row, n in zip(ids, (2, 4, 5), strict=True)], [row[5:] for row in ids])
    with torch.no_grad():
        logits = [
            policy.core(torch.tensor([row[:n] + row[5:]])).logits[0, n - 1 : -1] for row, n in zip(ids, (2, 4, 5), strict=True)
        ]
        best = torch.stack([each.argmax(-1) for each in logits])
        rollout.response_BR[0] = best[0]  # a row of which the first is the likeliest
    if watched:
        policy.core.lm_head.register_forward_hook(lambda module, inputs, output: None)
    with torch.no_grad():
        found = teacher_forced(policy, rollout, want_entropy=False, want_likeliest=True).likeliest_BR
    assert found.dtype == torch.bool and bool(found[0, 0])
    assert torch.equal(found[1:], best[1:] == rollout.response_BR[1:])


def test_what_the_harness_s_own_model_cannot_score():
    """A continuation that becomes part of the context's last token; blanks alone; nothing."""
    ours, _ = both("gpt2")
    (merged, _), (blank, _), (nothing, greedy) = ours.loglikelihood(requests(("xa", "b"), ("  ", "ok"), ("some", "")), True)
    alone = Rollout.of_ids([ours.tok_encode("xa")[:-1] + ours.tok_encode("ab")], [ours.tok_encode("b")])
    ids = torch.tensor([ours.tok_encode("xa") + ours.tok_encode("b")])
    with torch.no_grad():
        wanted = ours.policy.core(ids).logits.log_softmax(-1)[0, -2, ids[0, -1]]
    assert len(alone) and merged == pytest.approx(float(wanted), abs=1e-5)
    assert blank < 0 and (nothing, greedy) == (0.0, True)


def test_too_long_for_the_model():
    ours, _ = both("llama")
    with pytest.raises(DataError, match="a continuation has 200 tokens, more than the 128"):
        ours.loglikelihood(requests(("a", "y" * 200)), True)
    with pytest.raises(ConfigError, match="max_gen_toks 256 leaves no room for a prompt in the model's 128"):
        ours.generate_until(requests(("a", {"until": []})), True)
    with pytest.raises(ConfigError, match="gen_kwargs: num_beams: not known here"):
        ours.generate_until(requests(("a", {"num_beams": 4, "max_gen_toks": 4})), True)


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_batches_change_nothing(family, steered):
    kind, size = KINDS[family]
    policy = Policy.of(tiny(family, vocab_size=size), tiny_tokenizer(size, kind=kind))
    steering = Steering(policy.model, spec(prompt="all", noise=True), policy.tokenizer) if steered else None
    draw = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "max_gen_toks": 10, "until": []}
    asked = requests(*((f"a{'b' * n}", draw) for n in (1, 9, 3, 3, 3, 20)))
    found = []
    for sizes in ({"batch_size": 1}, {"batch_size": 16}, {"batch_size": 16, "batch_tokens": 40}):
        lm = SteerlLM(policy, steering=steering, **sizes)
        order = [5, 0, 2, 4, 3, 1] if sizes["batch_size"] == 1 else range(6)
        said = lm.generate_until([asked[i] for i in order], True)
        found.append(([v for v, _ in lm.loglikelihood(requests(*TEXTS), True)], sorted(said)))
    for values, said in found[1:]:
        near(values, found[0][0])
        assert said == found[0][1]
    assert len(set(found[0][1])) == 6  # the same request three times is three samples
    assert sorted(SteerlLM(policy, steering=steering, seed=1).generate_until(asked, True)) != found[0][1]


# -- steered -------------------------------------------------------------------------------------------------------------


def spec(prompt: str = "none", steps: str = "all", noise: bool = False) -> dict[str, Any]:
    op = {"vector": torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist(), "op": {"type": "add"}}
    if noise:
        op = {"op": {"type": "noise"}}
    site = {
        "at": {"layers": [0], "component": "block_output"},
        "strength": 1.5,
        "where": {"prompt": prompt, "steps": steps},
        **op,
    }
    return {"sites": [site]}


@contextlib.contextmanager
def hooked(block: torch.nn.Module, first: int, end: int | None = None):
    """Adds the vector of `spec` to what a block gives, at the columns from `first` to `end`."""
    vector = 1.5 * torch.randn(32, generator=torch.Generator().manual_seed(0))

    def add(module: Any, inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, first:end] += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(add)
    yield
    handle.remove()


def block_of(model: Any) -> torch.nn.Module:
    stack = getattr(model, "transformer", None) or getattr(model, "model", None)
    return stack.h[0] if hasattr(stack, "h") else stack.layers[0]


WHERE = {"response": ("none", "all"), "prompt": ("all", "none"), "generated": ("none", "generated_positions")}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steered_is_as_by_a_hand_written_hook(family, where):
    """Step 0 is the last token of the context, from which the continuation's first is predicted."""
    kind, size = KINDS[family]
    tokenizer = tiny_tokenizer(size, kind=kind)
    prompt, steps = WHERE[where]
    ours = SteerlLM(Policy.of(tiny(family, vocab_size=size), tokenizer), steering=spec(prompt, steps), batch_size=4)
    plain = tiny(family, vocab_size=size)
    texts = TEXTS[:6] + TEXTS[8:]
    for (value, greedy), (context, continuation) in zip(ours.loglikelihood(requests(*texts), True), texts, strict=True):
        before = tokenizer.encode(context.rstrip()) or [1]
        whole = (before if not context.rstrip() else []) + tokenizer.encode(context + continuation)
        length = len(before)
        columns = {"response": (length - 1, None), "prompt": (0, length), "generated": (length, None)}[where]
        ids = torch.tensor([whole])
        with torch.no_grad(), hooked(block_of(plain), *columns):
            logprobs = plain(ids).logits.log_softmax(-1)[0, length - 1 : -1]
        wanted = logprobs.gather(1, ids[0, length:, None])
        assert value == pytest.approx(float(wanted.sum()), abs=2e-4), (context, continuation)
        assert greedy == bool((logprobs.argmax(-1) == ids[0, length:]).all())
    for text in ("the film was", "a"):
        ids = tokenizer.encode(text)
        length = len(ids)
        columns = {"response": (length - 1, None), "prompt": (0, length), "generated": (length, None)}[where]
        with torch.no_grad(), hooked(block_of(plain), *columns):
            for _ in range(8):
                ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
        wanted_text = tokenizer.decode(ids[length:], skip_special_tokens=True)
        assert ours.generate_until(requests((text, {"until": [], "max_gen_toks": 8})), True) == [wanted_text]


def test_steered_rolling_is_response_from_the_first_token_on():
    """Also in the second window, whose first columns were scored in the one before."""
    tokenizer = tiny_tokenizer()
    ours = SteerlLM(Policy.of(tiny("llama"), tokenizer), steering=spec())
    plain = tiny("llama")
    text = "abcdefgh. " * 20
    ids = [1, *tokenizer.encode(text)]
    total = 0.0
    for first, end, scored in ((0, 129, 128), (72, 201, 72)):  # as the harness lays its windows over 200 tokens
        window = torch.tensor([ids[first:end]])
        with torch.no_grad(), hooked(block_of(plain), 0):
            logprobs = plain(window[:, :-1]).logits.log_softmax(-1)[0]
        total += float(logprobs.gather(1, window[0, 1:, None])[-scored:].sum())
    assert ours.loglikelihood_rolling(requests((text,)), True)[0] == pytest.approx(total, abs=2e-3)


def test_steered_encoder_decoder():
    kind, size = KINDS["t5"]
    tokenizer = tiny_tokenizer(size, kind=kind)
    steering = spec()
    steering["sites"][0]["at"]["stack"] = "decoder"
    ours = SteerlLM(Policy.of(tiny("t5", vocab_size=size), tokenizer), steering=steering, batch_size=4)
    plain = tiny("t5", vocab_size=size)
    start = plain.config.decoder_start_token_id
    for (value, _), (context, continuation) in zip(ours.loglikelihood(requests(*TEXTS[:4]), True), TEXTS, strict=False):
        blanks = context[len(context.rstrip()) :]
        labels = tokenizer.encode(blanks + continuation, add_special_tokens=False)
        with torch.no_grad(), hooked(plain.decoder.block[0], 0):
            inputs = torch.tensor([tokenizer.encode(context.rstrip())])
            logits = plain(input_ids=inputs, decoder_input_ids=torch.tensor([[start, *labels[:-1]]])).logits
        wanted = logits.log_softmax(-1)[0].gather(1, torch.tensor(labels)[:, None]).sum()
        assert value == pytest.approx(float(wanted), abs=2e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"role": "preventative"}, "steering.role: preventative acts while PPO learns"),
        ({"role": "trainable"}, "steering.role: trainable is still to be learned"),
        ({"strength": {"column": "how"}}, "strength: column 'how', but tasks have no columns"),
        ({"strength": {"samples": [0, 1]}}, "strength: one for each sample, but a request has one"),
    ],
)
def test_steering_that_evaluates_nothing(change, said):
    given = spec()
    (given if "role" in change else given["sites"][0]).update(change)
    with pytest.raises(ConfigError, match=said):
        SteerlLM(Policy.of(tiny("llama"), tiny_tokenizer()), steering=given)


def test_an_adapter(tmp_path):
    """By its folder, beside the harness's own model with peft."""
    tokenizer = tiny_tokenizer()
    tiny("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    ours = SteerlLM(str(tmp_path / "adapter"), batch_size="4", device="cpu", dtype="float32")
    theirs = HFLM(str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu", batch_size=4, dtype="float32")
    plain = SteerlLM(str(tmp_path / "base"))
    found, wanted, other = ([v for v, _ in lm.loglikelihood(requests(*TEXTS), True)] for lm in (ours, theirs, plain))
    near(found, wanted)
    assert max(abs(a - b) for a, b in zip(found, other, strict=True)) > 1e-2


def test_a_tokenizer_that_begins_with_bos():
    """It is not put there twice where a template has it already."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ours = SteerlLM(Policy.of(tiny("llama"), tokenizer), batch_size=4)
    theirs = HFLM(tiny("llama"), tokenizer=tokenizer, batch_size=4, device="cpu")
    assert ours.tok_encode("<s>a") == theirs.tok_encode("<s>a") == ours.tok_encode("a") == [1, 4]
    asked = requests(*TEXTS, ("<s>user:hi</s>assistant:", "hello"))
    near(*([v for v, _ in lm.loglikelihood(asked, True)] for lm in (ours, theirs)))
    rolling = requests(("the end. " * 30,))
    near(*(lm.loglikelihood_rolling(rolling, True) for lm in (ours, theirs)))
    asked = requests(*((text, {"until": [], "max_gen_toks": 8}) for text in ("the film", "<s>user:hi</s>assistant:")))
    assert [ours.generate_until([one], True) for one in asked] == [theirs.generate_until([one], True) for one in asked]


def test_what_the_model_is_given_by_name():
    with pytest.raises(ConfigError, match="paht: unknown .*did you mean path"):
        SteerlLM(paht="x")
    with pytest.raises(ConfigError, match="batch_size: 'auto'; sizes are not searched for"):
        SteerlLM("x", batch_size="auto")


def test_thinking_is_left_out():
    """Of a generation only what follows the mark; and the template is told."""
    tokenizer = tiny_tokenizer(chat="{{ enable_thinking }}{% for message in messages %}{{ message.content }}{% endfor %}")
    policy = Policy.of(tiny("llama"), tokenizer)
    asked = requests(("the film", {"until": [], "max_gen_toks": 12}))
    (whole,) = SteerlLM(policy).generate_until(asked, True)
    (rest,) = SteerlLM(policy, think_end_token=whole[3:5]).generate_until(asked, True)
    assert rest == whole.split(whole[3:5])[-1].lstrip() != whole
    told = SteerlLM(policy, enable_thinking=False).apply_chat_template([{"role": "user", "content": "hi"}])
    assert told == "Falsehi"


# -- whole tasks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tasks, their data by its whole path."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in TASKS.iterdir():
        (folder / file.name).write_text(file.read_text(encoding="utf-8").replace("DATA", str(folder)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "how",
    [{}, {"apply_chat_template": True, "system_instruction": "be brief", "num_fewshot": 2}, {"num_fewshot": 1, "limit": 3}],
)
def test_a_task_s_results_are_the_harness_s_own(tasks, how):
    ours, theirs = both("llama")
    results = []
    for lm in (ours, theirs):
        asked = Tasks(["tiny_all"], [str(tasks)])
        assert not asked.whole
        results.append(simple_evaluate(lm, tasks=asked.names, task_manager=asked, log_samples=True, **how))
    found, wanted = results
    for name in ("tiny_choice", "tiny_write", "tiny_read"):
        for key, value in wanted["results"][name].items():
            assert found["results"][name][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
        for one, other in zip(found["samples"][name], wanted["samples"][name], strict=True):
            assert one["prompt_hash"] == other["prompt_hash"] and one["doc"] == other["doc"]
    said = [sample["resps"] for sample in found["samples"]["tiny_write"]]
    assert said == [sample["resps"] for sample in wanted["samples"]["tiny_write"]]


def test_keys_are_of_the_prompt_alone():
    assert answers.row_key([1, 2]) == answers.row_key([1, 2]) != answers.row_key([1, 2], 1)
    assert answers.row_key([1, 2]) != answers.row_key([12])
    assert 0 <= answers.row_key([0]) < 2**62
    assert list(answers.batches([3, 9, 1], 2, 0)) == [[1, 0], [2]]
    assert list(answers.batches([3, 9, 1], 5, 9)) == [[1], [0, 2]]
