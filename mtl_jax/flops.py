"""Floating-point work of one training step, and the peak of the device it runs on.

Model FLOPs count what the mathematics needs: a matrix product of `[m, k] x [k, n]` is `2mkn`, the
backward pass costs twice the forward pass, and nothing is added for recomputation (remat), for
padding that a kernel could skip, or for element-wise work. Divided by the time and the peak this is
the model FLOPs utilisation (MFU) of Chowdhery et al. 2022 (PaLM), appendix B.
"""

from typing import Any

# Dense bfloat16 peak of one JAX device, in FLOP/s. The key is matched against the start of
# `jax.Device.device_kind` in lower case, longest first.
#   TPU: Google Cloud TPU documentation, pages "TPU v4", "TPU v5p", "TPU v5e", "TPU v6e (Trillium)",
#        row "Peak compute per chip (bf16)". v4 and v5p chips show as one device (megacore).
#   GPU: NVIDIA data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU" and "H200 Tensor Core
#        GPU", row "BFLOAT16 Tensor Core", halved where the sheet states the figure with sparsity.
_PEAK_BFLOAT16_FLOPS = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,  # how v5e names itself
    "tpu v5e": 197e12,
    "tpu v5": 459e12,  # how v5p names itself
    "tpu v5p": 459e12,
    "tpu v6 lite": 918e12,  # how v6e names itself
    "tpu v6e": 918e12,
    "nvidia a100": 312e12,
    "nvidia h100 pcie": 756e12,
    "nvidia h100 nvl": 835e12,
    "nvidia h100": 989e12,
    "nvidia h200 nvl": 835e12,
    "nvidia h200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of one device in FLOP/s, or None for an unknown device.

    Args:
      device_kind: `jax.devices()[0].device_kind`, such as "TPU v4" or "NVIDIA H100 80GB HBM3".
    """
    kind = device_kind.lower()
    matches = [name for name in _PEAK_BFLOAT16_FLOPS if kind.startswith(name)]
    return _PEAK_BFLOAT16_FLOPS[max(matches, key=len)] if matches else None


def flops_per_step(
    cfg: Any, rows: int, inputs_length: int, targets_length: int, *, training: bool = True
) -> float:
    """Returns the model FLOPs of one step over `rows` rows of encoder and decoder tokens.

    Every position counts, also padding: with packing, rows are nearly full. Causal attention is
    counted as a full square, as MFU figures in the literature are.

    Args:
      cfg: a `mtl_jax.model.T5Config`; only its sizes are read.
      rows: rows of the global batch.
      inputs_length: encoder positions per row.
      targets_length: decoder positions per row.
      training: True for forward and backward (three times the forward pass), else forward only.

    Returns:
      Floating-point operations (not per second) of the whole global batch.
    """
    joined = cfg.num_heads * cfg.head_dim
    projection = cfg.emb_dim * joined
    # One kernel per activation (a gated layer has two) and one on the way out.
    mlp = (len(cfg.mlp_activations) + 1) * cfg.emb_dim * cfg.mlp_dim

    encoder_parameters = cfg.num_encoder_layers * (4 * projection + mlp)
    # Self-attention has four projections; of cross-attention, query and output see decoder tokens.
    decoder_parameters = cfg.num_decoder_layers * (6 * projection + mlp)
    cross_key_value_parameters = cfg.num_decoder_layers * 2 * projection
    head_parameters = cfg.emb_dim * cfg.vocab_size
    products = inputs_length * (encoder_parameters + cross_key_value_parameters)
    products += targets_length * (decoder_parameters + head_parameters)

    # Scores and weighted values: two products of query length x key length x joined heads.
    attended_pairs = cfg.num_encoder_layers * inputs_length**2
    attended_pairs += cfg.num_decoder_layers * targets_length * (targets_length + inputs_length)
    products += 2 * joined * attended_pairs

    forward = 2.0 * products * rows
    return 3.0 * forward if training else forward


def utilisation(
    flops: float, seconds: float, device_kind: str, device_count: int = 1
) -> float | None:
    """Returns model FLOPs utilisation in [0, 1], or None when the device's peak is unknown.

    Args:
      flops: model FLOPs done by all devices together, from `flops_per_step`.
      seconds: the time they took.
      device_kind: `jax.devices()[0].device_kind`.
      device_count: number of devices that shared the work.

    Raises:
      ValueError: `seconds` or `device_count` is not positive.
    """
    if seconds <= 0 or device_count <= 0:
        raise ValueError(f"seconds={seconds} and device_count={device_count} must be positive")
    peak = peak_flops(device_kind)
    return None if peak is None else flops / (seconds * peak * device_count)
