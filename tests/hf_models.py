"""Small random models of Hugging Face's T5 family, one kind each, with logits worth comparing."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mtl_jax import interop
from mtl_jax.interop.source import tensors
from mtl_jax.model_config import T5Config

FAMILIES = ("t5", "t5_1_1", "mt5", "umt5", "byt5")
SHAPE = dict(
    vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
)
# ByT5's encoder is three times as deep as its decoder.
_CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {"feed_forward_proj": "gated-gelu"},
    "byt5": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "vocab_size": 384,
    },
}


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode, its logits of order 10.

    Args:
      family: one of `FAMILIES`; all but "t5" have an output matrix of their own.
      seed: of the weights.
      **changes: fields of transformers' configuration.
    """
    import torch
    import transformers

    kind = {"mt5": "MT5", "umt5": "UMT5"}.get(family, "T5")
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | _CONFIGS[family] | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if family != "t5":
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                x.copy_(1 + 0.2 * torch.randn_like(x))
            elif "relative_attention_bias" in name:
                x.copy_(torch.randn_like(x))
            elif name == "shared.weight" or ".embed_tokens." in name:
                x.copy_(torch.randn_like(x) * (10 if family == "t5" else 1))
            elif name == "lm_head.weight":
                # umT5 divides by sqrt(d_model) = 4.
                x.copy_(torch.randn_like(x) * (10 if family == "umt5" else 2.5))
            else:
                # An attention without 1/sqrt(K) is sharp enough with small queries.
                scale = 0.5 if name.endswith(".q.weight") else 1.0
                x.copy_(torch.randn_like(x) * scale / x.shape[1] ** 0.5)
    return model.eval()


def ours(hf_model: Any) -> tuple[T5Config, dict[str, Any]]:
    """Our configuration and parameters (numpy, float32) of such a model, by way of its files."""
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        source = interop.open_source(Path(folder))
        params: dict[str, Any] = {}
        for path, shape in tensors(source.config).items():
            if "layers" in path:
                layers = [source.read(path, layer) for layer in range(shape[0])]
                leaf = np.stack(layers)
            else:
                leaf = np.array(source.read(path, None))
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = leaf
        return source.config, params
