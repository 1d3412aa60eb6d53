"""FLOPs of a step against published figures, a count by hand and XLA's own cost analysis."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from mtl_jax import flops


@dataclasses.dataclass(frozen=True)
class Sizes:
    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")


# T5 1.1 as released (google-research/text-to-text-transfer-transformer, released_checkpoints.md).
T5_1_1 = {
    "small": Sizes(32128, 512, 6, 64, 1024, 8, 8),
    "base": Sizes(32128, 768, 12, 64, 2048, 12, 12),
    "large": Sizes(32128, 1024, 16, 64, 2816, 24, 24),
    "xl": Sizes(32128, 2048, 32, 64, 5120, 24, 24),
    "xxl": Sizes(32128, 4096, 64, 64, 10240, 24, 24),
}


@pytest.mark.parametrize(
    ("size", "tera"),
    [("small", 0.110), ("base", 0.438), ("large", 1.504), ("xl", 5.472), ("xxl", 21.38)],
)
def test_flops_equal_the_published_figures_of_t5_1_1(size, tera):
    """TFLOP per sequence of 512/128; the figures carry three to four digits, hence 0.5 %."""
    assert flops.flops_per_step(T5_1_1[size], 1, 512, 128) / 1e12 == pytest.approx(tera, rel=5e-3)


def test_flops_of_a_tiny_model_counted_by_hand():
    """One layer each, one head of 2, embedding 3, relu MLP of 5, vocabulary 7, lengths 4 and 2."""
    cfg = Sizes(7, 3, 1, 2, 5, 1, 1, ("relu",))
    encoder = 4 * (4 * 3 * 2 + 2 * 3 * 5) + 2 * 4 * 4 * 2
    decoder = 2 * (4 * 3 * 2 + 2 * 3 * 5) + 2 * 2 * 2 * 2
    cross = 2 * (2 * 3 * 2) + 4 * (2 * 3 * 2) + 2 * 2 * 4 * 2
    head = 2 * 3 * 7
    multiply_adds = encoder + decoder + cross + head
    assert flops.flops_per_step(cfg, 1, 4, 2, training=False) == 2 * multiply_adds
    assert flops.flops_per_step(cfg, 5, 4, 2) == 5 * 3 * 2 * multiply_adds


def test_encoder_flops_agree_with_the_compiler():
    """XLA counts the same matrix products in one encoder layer (its gate product adds 0.2 %)."""
    cfg = Sizes(0, 64, 4, 16, 128, 1, 0)
    rows, length = 2, 32

    def encoder_layer(x_BLD, attention_DHK, out_HKD, in_DF, gate_DF, out_FD):
        q_BLHK = jnp.einsum("BLD,DHK->BLHK", x_BLD, attention_DHK[0])
        k_BLHK = jnp.einsum("BLD,DHK->BLHK", x_BLD, attention_DHK[1])
        v_BLHK = jnp.einsum("BLD,DHK->BLHK", x_BLD, attention_DHK[2])
        scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK)
        mixed_BLHK = jnp.einsum("BHLM,BMHK->BLHK", scores_BHLM, v_BLHK)
        y_BLD = jnp.einsum("BLHK,HKD->BLD", mixed_BLHK, out_HKD)
        return ((y_BLD @ in_DF) * (y_BLD @ gate_DF)) @ out_FD

    shapes = [(rows, length, 64), (3, 64, 4, 16), (4, 16, 64), (64, 128), (64, 128), (128, 64)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(encoder_layer).lower(*arguments).compile().cost_analysis()
    counted = analysis["flops"] if isinstance(analysis, dict) else analysis[0]["flops"]
    expected = flops.flops_per_step(cfg, rows, length, 0, training=False)
    assert counted == pytest.approx(expected, rel=0.01)


def test_peak_of_known_and_unknown_devices():
    assert flops.peak_flops("TPU v4") == 275e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("TPU v6 lite") == 918e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H200") == 989e12
    assert flops.peak_flops("cpu") is None


def test_utilisation_reproduces_a_published_row():
    """NVIDIA JAX-Toolbox: T5 1.1 large, bf16, 64 A100, 4,853 sequences/s, which is 36.5 %."""
    work = flops.flops_per_step(T5_1_1["large"], 4853, 512, 128)
    kind = "NVIDIA A100-SXM4-80GB"
    assert flops.utilisation(work, 1.0, kind, 64) == pytest.approx(0.365, abs=2e-3)
    assert flops.utilisation(work, 1.0, "cpu", 64) is None
    with pytest.raises(ValueError, match="must be positive"):
        flops.utilisation(work, 0.0, kind)


def test_no_field_is_ignored():
    base = T5_1_1["small"]
    reference = flops.flops_per_step(base, 1, 512, 128)
    for field in dataclasses.fields(Sizes):
        value = getattr(base, field.name)
        changed = (*value, "linear") if isinstance(value, tuple) else value * 2
        other = types.SimpleNamespace(**{**dataclasses.asdict(base), field.name: changed})
        assert flops.flops_per_step(other, 1, 512, 128) > reference, field.name
