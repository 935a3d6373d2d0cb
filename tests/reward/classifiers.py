"""Tiny random classifiers of many architectures, in memory and as folders, for the tests of reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.models import _IDS, _WIDE, CONTEXT, FAMILIES, VOCABULARY, tiny_tokenizer

_BERT = {**_WIDE, "type_vocab_size": 2}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _BERT),
    "roberta": ("roberta", {**_BERT, "max_position_embeddings": CONTEXT + 2}),
    "distilbert": (
        "distilbert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": CONTEXT},
    ),
    "albert": ("albert", {**_BERT, "embedding_size": 16}),
    "electra": ("electra", {**_BERT, "embedding_size": 16}),
    "deberta": ("deberta-v2", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}),
    "modernbert": ("modernbert", {**_WIDE, "global_attn_every_n_layers": 2, "local_attention": 8}),
    "mpnet": ("mpnet", _WIDE),
    "convbert": ("convbert", {**_BERT, "embedding_size": 32}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "xlm": ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": CONTEXT}),
    "fnet": ("fnet", {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT}),
    "funnel": (
        "funnel",
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1},
    ),
    "squeezebert": ("squeezebert", {**_BERT, "embedding_size": 32}),
}


def tiny_classifier(family: str, labels: int = 1, seed: int = 0, *, per_token: bool = False, **overrides: Any) -> Any:
    """A random classifier of `family`, its weights drawn wide so that a wrong position or a leaking pad shows."""
    model_type, fields = {**FAMILIES, **ENCODERS}[family]
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCABULARY, **_IDS, **fields, "num_labels": labels, **overrides})
    auto = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                parameter.normal_(0.0, 0.2)
            elif name.endswith("bias") and "dt_" not in name:
                parameter.normal_(0.0, 0.1)
    torch.random.set_rng_state(state)
    return model.eval()


def saved(model: Any, folder: Path, tokenizer: Any = None) -> str:
    """The folder that a reward model is loaded from, with a tokenizer."""
    model.save_pretrained(folder)
    (tokenizer if tokenizer is not None else tiny_tokenizer()).save_pretrained(folder)
    return str(folder)
