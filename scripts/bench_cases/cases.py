"""What is measured: shapes, loads, and the random-weight models, tokenizers and prompts made of them, the same for everyone.

Lengths. `mean` 0: no token stops a row, every response is full. Else the head gets a bias that gives the stop token about
1/mean of the probability at every step, whatever the row holds: lengths are then geometric, cut at `response`, for whoever
samples from the model. Learning rates are too small to change that.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from steerl.rollout.prompts.prompts import PromptBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from steerl.rollout.model.policy import Policy

PAD, STOP = 0, 1


@dataclass(frozen=True)
class Case:
    """One shape under one load."""

    work: str = "update"
    """update = a whole PPO update; sampling = rollouts alone."""
    hidden: int = 64
    layers: int = 2
    vocabulary: int = 1024
    rows: int = 32
    """Rollouts of an update; all are decoded together."""
    response: int = 32
    """Most tokens of a response."""
    mean: int = 0
    """Mean of the geometric lengths (before they are cut at `response`); 0 = every response is full."""
    prompt: int = 16
    """Tokens of each prompt."""
    n: int = 1
    """Samples per prompt; rows is a multiple of it."""
    epochs: int = 4
    minibatches: int = 1
    credit: str = "gae"
    """gae = with a value model and a reference; group, rloo = of n samples of a prompt, with neither."""
    kl: bool = False
    """Groups only: with a reference, and a KL to it."""
    micro: int = 16
    """Rows in one forward pass of the update."""
    distribution: str = "plain"
    """Sampling only: plain, top_k, top_p, min_p or all (see `DISTRIBUTIONS`)."""
    family: str = "llama"
    heads: int = 0
    """Attention heads; 0 = a head for 16 to 64 of hidden."""
    key_heads: int = 0
    """Key and value heads; 0 = as many."""
    intermediate: int = 0
    """Width of the feed-forward part; 0 = four times hidden."""
    tied: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    """Only for this project: sampling.compile, or ppo.compile for updates."""

    @property
    def name(self) -> str:
        lengths = f"geometric {self.mean}" if self.mean else "full"
        distribution = "" if self.distribution == "plain" else f" {self.distribution}"
        shared = f" n{self.n}" if self.n > 1 else ""
        small = f"{self.hidden}x{self.layers}"
        kind = small if self.family == "llama" and self.dtype == "float32" else f"{self.family} {small} {self.dtype}"
        credit = (
            "" if self.credit == "gae" else f" {self.credit} {self.epochs} epoch{'s' * (self.epochs > 1)}" + " KL" * self.kl
        )
        return f"{self.work}{credit} {kind} V{self.vocabulary:,} B{self.rows} R{self.response} {lengths}{shared}{distribution}"

    @property
    def query_heads(self) -> int:
        return self.heads or max(4, self.hidden // 32)

    @property
    def inner(self) -> int:
        """Width of the feed-forward part."""
        return self.intermediate or 4 * self.hidden

    @property
    def key_width(self) -> float:
        """Of a token's keys in one layer, and of its values."""
        return self.hidden * (self.key_heads or self.query_heads) / self.query_heads

    def to_json(self) -> dict[str, object]:
        return asdict(self)


DISTRIBUTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all": {
        "top_k": 200, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1, "no_repeat_ngram_size": 4, "temperature": 0.8,
    },
}  # fmt: skip

SMALLEST = Case(rows=8, response=8)
SHAPES = (
    Case(hidden=64, layers=2, vocabulary=1024, rows=32, response=32),
    Case(hidden=128, layers=4, vocabulary=8192, rows=32, response=64),
    Case(hidden=64, layers=2, vocabulary=32_000, rows=16, response=32),
    Case(hidden=256, layers=4, vocabulary=32_000, rows=16, response=32),
)
UPDATES = tuple(replace(shape, mean=mean) for shape in SHAPES for mean in (0, shape.response // 4))
_GROUPS = tuple(
    replace(shape, rows=32, n=8, credit=credit, epochs=1)
    for shape in (SHAPES[1], SHAPES[2], SHAPES[0])
    for credit in ("group", "rloo")
)
GROUPS = (*_GROUPS, replace(_GROUPS[0], kl=True), replace(_GROUPS[1], kl=True), replace(_GROUPS[0], epochs=4))
"""Beside the installed TRL's GRPO and RLOO."""
_DECODE = Case("sampling", 64, 2, 32_000, rows=32, response=32)
SAMPLING = (
    Case("sampling", 64, 2, 1024, rows=32, response=32),
    Case("sampling", 128, 4, 8192, rows=32, response=64),
    _DECODE,
    replace(_DECODE, hidden=256, layers=4),
    Case("sampling", 64, 2, 1024, rows=128, response=256, mean=64),
    Case("sampling", 128, 4, 8192, rows=128, response=256, mean=64),
    *(replace(_DECODE, distribution=name) for name in ("top_k", "top_p", "min_p", "all")),
)
_QWEN_HALF = Case(
    family="qwen2", hidden=896, layers=24, heads=14, key_heads=2, intermediate=4864, vocabulary=151_936, tied=True,
    rows=64, response=256, prompt=128, dtype="bfloat16", device="cuda",
)  # fmt: skip
_QWEN = replace(_QWEN_HALF, hidden=1536, layers=28, heads=12, intermediate=8960)
_LLAMA = replace(
    _QWEN_HALF, family="llama", hidden=2048, layers=16, heads=32, key_heads=8, intermediate=8192, vocabulary=128_256
)
CUDA = tuple(
    replace(shape, work=work, rows=rows, mean=mean)
    for shape in (_QWEN_HALF, _LLAMA, _QWEN)
    for work, rows, mean in (("sampling", 64, 0), ("sampling", 256, 0), ("sampling", 256, 64), ("update", 64, 0))
)
"""Shapes of Qwen2.5 0.5B and 1.5B and of Llama 3.2 1B, random weights."""


def config_of(case: Case) -> PretrainedConfig:
    from transformers import LlamaConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[case.family]
    return kind(
        vocab_size=case.vocabulary, hidden_size=case.hidden, num_hidden_layers=case.layers,
        num_attention_heads=case.query_heads,
        num_key_value_heads=case.key_heads or case.query_heads, intermediate_size=case.inner,
        max_position_embeddings=case.prompt + case.response + 8, tie_word_embeddings=case.tied, num_labels=1,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=STOP,
    )  # fmt: skip


def causal(case: Case, seed: int = 0) -> PreTrainedModel:
    """A language model of random weights, whose stop token has the probability that the case's lengths ask for."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(config_of(case), dtype=getattr(torch, case.dtype)).eval()
    if case.mean:
        bias = torch.zeros(case.vocabulary, dtype=model.lm_head.weight.dtype, device=case.device)
        bias[STOP] = math.log((case.vocabulary - 1) / max(case.mean - 1, 1e-3))  # logits of random weights are about 0
        model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    return model


def classifier(case: Case, seed: int = 0) -> PreTrainedModel:
    """The same trunk with a head of one number: the peer's value model."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    with torch.device(case.device):
        return AutoModelForSequenceClassification.from_config(config_of(case), dtype=getattr(torch, case.dtype)).eval()


def tokenizer_of(case: Case) -> PreTrainedTokenizerBase:
    """A word for every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": STOP} | {f"w{i}": i for i in range(2, case.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left", clean_up_tokenization_spaces=False
    )


def policy_of(case: Case, seed: int = 0) -> Policy:
    """This project's policy. Full lengths: nothing stops a row."""
    from steerl.rollout.model.policy import Policy

    policy = Policy.of(causal(case, seed), tokenizer_of(case))
    return policy if case.mean else replace(policy, eos_ids=())


def prompt_ids(case: Case, seed: int = 0) -> list[list[int]]:
    """One prompt for every `n` rows, all of one length."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (case.rows // case.n, case.prompt)
    return torch.randint(2, case.vocabulary, shape, generator=generator).tolist()


def prompt_batch(case: Case, seed: int = 0) -> PromptBatch:
    return PromptBatch.of_ids(prompt_ids(case, seed))
