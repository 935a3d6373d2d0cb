"""Tiny random models, tokenizers and policies that every room's tests share. No network, no files.

    tiny("llama")                    a model of that family: two layers, hidden 32, vocabulary 64, float32, eval
    tiny_tokenizer(kind="char")      a fast tokenizer of the same vocabulary size: char | word | bytes | pieces
    tiny_policy("t5")                both, as a Policy

Weights are drawn wide (and biases away from zero), so that a law is far from flat and a wrong position, a leaking pad
or a forgotten bias moves log-probs by much more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 64
CONTEXT = 128
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# family -> (model_type, what differs from the plainest config). Every family is tiny in the same way.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # learned positions
    "gpt2": ("gpt2", _OLD),
    "gpt_bigcode": ("gpt_bigcode", _OLD),
    "gpt_neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT,
                            "window_size": 8, "attention_types": [[["global", "local"], 1]]}),
    "opt": ("opt", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": CONTEXT}),
    "openai-gpt": ("openai-gpt", _OLD),
    "biogpt": ("biogpt", _WIDE),
    "xglm": ("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": CONTEXT}),
    "ctrl": ("ctrl", {**_OLD, "dff": 64}),
    # ALiBi
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "falcon_alibi": ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    # rotary
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gpt_neox": ("gpt_neox", _WIDE),
    "gptj": ("gptj", {**_OLD, "rotary_dim": 4}),
    "codegen": ("codegen", {**_OLD, "rotary_dim": 4}),
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "phi": ("phi", _WIDE),
    "phi3": ("phi3", _GROUPED),
    "stablelm": ("stablelm", _GROUPED),
    "olmo": ("olmo", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "granite": ("granite", _GROUPED),
    "cohere": ("cohere", _GROUPED),
    "starcoder2": ("starcoder2", _GROUPED),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 8}),
    # sliding windows
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 6}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    # experts
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 32}),
    # states instead of attention
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": ("mamba2", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16,
                          "n_groups": 1, "chunk_size": 8}),
    "recurrent_gemma": ("recurrent_gemma", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                                            "intermediate_size": 64, "lru_width": 32, "attention_window_size": 8}),
    "rwkv": ("rwkv", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": CONTEXT}),
    "jamba": ("jamba", {**_GROUPED, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
                        "num_experts_per_tok": 1, "mamba_d_state": 8, "use_mamba_kernels": False}),
    "bamba": ("bamba", {**_GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
                        "mamba_d_state": 8, "mamba_chunk_size": 8}),
    "lfm2": ("lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    # encoder-decoders
    "t5": ("t5", _T5),
    "mt5": ("mt5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("umt5", _T5),
    "longt5": ("longt5", {**_T5, "local_radius": 8, "global_block_size": 4}),
    "switch": ("switch_transformers", {**_T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4,
                                       "num_decoder_layers": 2}),
    "bart": ("bart", _BART),
    "mbart": ("mbart", {**_BART, "forced_bos_token_id": 5}),
    "pegasus": ("pegasus", {**_BART, "decoder_start_token_id": 0}),
    "blenderbot": ("blenderbot", _BART),
    "marian": ("marian", {**_BART, "decoder_start_token_id": 0}),
    "m2m_100": ("m2m_100", _BART),
    "led": ("led", {**{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
                    "max_encoder_position_embeddings": CONTEXT, "max_decoder_position_embeddings": CONTEXT,
                    "attention_window": [8, 8]}),
    "prophetnet": ("prophetnet", {"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_encoder_layers": 2,
                                  "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
                                  "max_position_embeddings": CONTEXT, "decoder_start_token_id": 2, "ngram": 2,
                                  "disable_ngram_loss": True}),
}  # fmt: skip
_KEEP = ("A_log", "dt_bias", "time_decay", "time_first", "recurrent_param")
"""Parameters whose range carries a meaning: they stay as the family draws them."""


DEFAULT = ("gpt2", "llama", "recurrent_gemma", "gemma2", "mixtral", "t5")
"""Learned positions, rotary ones with grouped heads, states, soft caps and windows, experts, an encoder-decoder."""


def families(names: Iterable[str], *also: str) -> list[Any]:
    """Families as parameters of a test: the default ones and those named run in `make test`, the rest in `make proofs`."""
    return [name if name in (*DEFAULT, *also) else pytest.param(name, marks=pytest.mark.proofs) for name in names]


def tiny(family: str, seed: int = 0, scale: float = 0.2, **overrides: Any) -> PreTrainedModel:
    """A random model of `family`; `overrides` go into its config (vocab_size, dropout, sliding_window, ...)."""
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **_IDS, **fields, **overrides})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(kept in name for kept in _KEEP):
                continue
            if parameter.dim() >= 2:
                parameter.normal_(0.0, scale)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    torch.random.set_rng_state(state)
    if config.is_encoder_decoder:  # a generation parameter: configs no longer keep it
        model.generation_config.forced_bos_token_id = {**fields, **overrides}.get("forced_bos_token_id")
    return model.eval()


CHAT = (
    "{% if tools %}<s>tools:{% for tool in tools %}{{ tool.function.name }};{% endfor %}{% else %}<s>{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789.,:;!?'\"()-+=*/\n<>[]_#AB"


def tiny_tokenizer(
    vocab_size: int = VOCABULARY, pad: str | None = "<pad>", chat: bool | str = False, kind: str = "char", side: str = "left"
) -> PreTrainedTokenizerFast:
    """A fast tokenizer: <pad> 0, <s> 1, </s> 2, <unk> 3, then its pieces.

    char: one id per character. word: words joined by blanks. bytes: byte-level BPE with a few merges (vocab_size is
    then at least 264). pieces: sentencepiece-like, with a blank marker and byte fallback (at least 320).
    `pad=None` leaves it without a pad token; `pad="</s>"` makes pad and eos the same.
    """
    core = {"char": _characters, "word": _words, "bytes": _bytes, "pieces": _pieces}[kind](vocab_size)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    template = chat if isinstance(chat, str) else CHAT if chat else None
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **({"pad_token": pad} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side=side, chat_template=template, **names)


def _characters(size: int) -> Tokenizer:
    entries = (_SPECIAL + list(dict.fromkeys(_CHARACTERS)))[:size]
    core = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return core


def _words(size: int) -> Tokenizer:
    entries = _SPECIAL + ["the", "a", "good", "bad", "film", "plot", "was", "and", "very", "end", "."]
    entries += [f"w{i}" for i in range(size - len(entries))]
    core = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries[:size])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def _bytes(size: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "t"), ("Ġt", "h"), ("\u010a", "\u010a")]
    entries = _SPECIAL + alphabet + ["".join(pair) for pair in merges]
    entries += [f"<extra{i}>" for i in range(max(size - len(entries), 0))]
    core = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _pieces(size: int) -> Tokenizer:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁a", "end", "▁end", "th", ".", "!", "▁good", "er", "in"]
    entries = _SPECIAL + bytes_ + words
    entries += [f"▁w{i}" for i in range(max(size - len(entries), 0))]
    scores = [(entry, 0.0 if i < 4 else -20.0 if i < 260 else -1.0 - 0.01 * i) for i, entry in enumerate(entries)]
    core = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def tiny_policy(family: str = "gpt2", seed: int = 0, tokenizer: Any = None, **overrides: Any) -> Any:
    """A `rollout.policy.Policy` around a tiny model and a tokenizer of its size."""
    from steerl.rollout.model.policy import Policy

    model = tiny(family, seed, **overrides)
    return Policy.of(model, tokenizer if tokenizer is not None else tiny_tokenizer(model.config.vocab_size))
