"""From the decoder's hidden states to the loss, all tokens at once or a chunk at a time.

Letters: B rows, T decoder length, V vocabulary, C chunks, S tokens of a row in a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import model
from mtl_jax.model_config import T5Config


class TokenLosses(NamedTuple):
    """What is told of each target token; float32 [B, T].

    Attributes:
      loss: cross-entropy with z-loss.
      z_loss: the z-loss part of it.
      correct: 1.0 where no other token has a larger logit.
    """

    loss: jax.Array
    z_loss: jax.Array
    correct: jax.Array


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, *, z_loss: float, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each token, with T5X's label smoothing and z-loss.

    Args:
      logits_BTV: float32.
      targets_BT: int32.
      z_loss: weight of the squared log-partition.
      label_smoothing: s: the target keeps 1 - s, the others share s; the entropy of that
        distribution is subtracted, so that a perfect model has loss 0.

    Returns:
      (loss_BT including z-loss, the z-loss part), float32.
    """
    vocab = logits_BTV.shape[-1]
    confidence, low = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
    log_partition_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logit_BT = _target_logit(logits_BTV, targets_BT)
    loss_BT = log_partition_BT - (confidence - low) * target_logit_BT
    if label_smoothing:
        loss_BT = loss_BT - low * jnp.sum(logits_BTV, axis=-1)
        entropy = -(
            confidence * np.log(confidence) + (vocab - 1) * low * np.log(low + 1e-20)
        ).astype(np.float32)
        loss_BT = loss_BT - entropy
    z_BT = z_loss * jnp.square(log_partition_BT)
    return loss_BT + z_BT, z_BT


def _target_logit(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # A comparison instead of a gather: its gradient is a select, not a scatter over the vocabulary.
    vocabulary = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)[None, None]
    return jnp.sum(jnp.where(vocabulary == targets_BT[..., None], logits_BTV, 0.0), axis=-1)


def weighted_loss(
    cfg: T5Config,
    params: model.Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | Callable[[TokenLosses], jax.Array],
    *,
    z_loss: float,
    label_smoothing: float,
    chunk: int = 0,
) -> tuple[jax.Array, TokenLosses]:
    """The weighted sum of token losses, the scalar that training differentiates.

    With a `chunk`, the logits of about so many tokens exist at a time, and never those of the
    batch. Values and gradients are the same up to the order of float32 sums. A gradient that is
    asked for is made along with the loss, chunk by chunk, since the weights, all that it needs
    besides, are known: nothing is computed twice, as it would be by rematerialisation.

    Args:
      cfg: the model.
      params: tree of `model.init`.
      hidden_BTD: float32 or bfloat16, from `model.decode`.
      targets_BT: int32.
      weights_BT: float32, 0 for padding; or a function that makes them of the token losses, through
        which nothing is differentiated (without a chunk only).
      z_loss: see `cross_entropy`.
      label_smoothing: see `cross_entropy`.
      chunk: tokens in a chunk, at least one of every row and all rows alike; 0 for all at once.

    Returns:
      (float32 scalar, what is told of each token). The latter carries no gradient.
    """
    of_tokens = functools.partial(_of_tokens, cfg, z_loss=z_loss, label_smoothing=label_smoothing)
    if chunk:
        if callable(weights_BT):
            raise ValueError("chunks need the weights before the losses")
        of_tokens = _chunked(of_tokens, chunk)
    # float32 is what `model.logits` computes with; from here on its gradient is float32, too.
    hidden_BTD = hidden_BTD.astype(jnp.float32)
    total, told = of_tokens(model.output_params(cfg, params), hidden_BTD, targets_BT, weights_BT)
    return total, jax.lax.stop_gradient(told)


def _of_tokens(
    cfg: T5Config,
    params: model.Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | Callable[[TokenLosses], jax.Array],
    *,
    z_loss: float,
    label_smoothing: float,
) -> tuple[jax.Array, TokenLosses]:
    logits_BTV = model.logits(cfg, params, hidden_BTD)
    loss_BT, z_BT = cross_entropy(
        logits_BTV, targets_BT, z_loss=z_loss, label_smoothing=label_smoothing
    )
    # No argmax: on a CPU it takes four times as long as the maximum. A tie counts as correct.
    best_BT = jnp.max(logits_BTV, axis=-1)
    correct_BT = (_target_logit(logits_BTV, targets_BT) >= best_BT).astype(jnp.float32)
    told = TokenLosses(loss_BT, z_BT, correct_BT)
    if callable(weights_BT):
        weights_BT = weights_BT(jax.lax.stop_gradient(told))
    return jnp.sum(loss_BT * weights_BT), told


def _chunked(of_tokens: Any, chunk: int) -> Any:
    """`of_tokens` on one slice of all rows after the other.

    The rows' length is cut, not the rows: no mesh axis splits it, so each device has a share of
    every chunk in the rows that it holds, and hidden states never travel.
    """

    def forward(params: Any, *tokens_BT: jax.Array) -> Any:
        def body(total: jax.Array, slices: Any) -> Any:
            more, told = of_tokens(params, *slices)
            return total + more, told

        total, told = jax.lax.scan(body, jnp.float32(0.0), _slices(tokens_BT, chunk))
        return total, _join(told, tokens_BT[0].shape[1])

    def forward_and_gradients(params: Any, *tokens_BT: jax.Array) -> Any:
        gradients_of = jax.value_and_grad(of_tokens, argnums=(0, 1), has_aux=True)

        def body(sums: Any, slices: Any) -> Any:
            (more, told), (params_part, hidden_part) = gradients_of(params, *slices)
            return jax.tree.map(jnp.add, sums, (more, params_part)), (told, hidden_part)

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0.0), params))
        (total, params_grad), parts = jax.lax.scan(body, zeros, _slices(tokens_BT, chunk))
        told, hidden_grad = _join(parts, tokens_BT[0].shape[1])
        return (total, told), (params_grad, hidden_grad, told.loss)

    def backward(gradients: Any, cotangents: Any) -> Any:
        # All are float32, and of the total alone: the rest is behind a stop_gradient.
        params_grad, hidden_grad, weights_grad = jax.tree.map(
            lambda gradient: cotangents[0] * gradient, gradients
        )
        return params_grad, hidden_grad, None, weights_grad

    chunked = jax.custom_vjp(forward)
    chunked.defvjp(forward_and_gradients, backward)
    return chunked


def _slices(arrays: Any, chunk: int) -> Any:
    """[B, T, ...] -> [C, B, S, ...], with zeros (and so no weight) after the last token."""

    def split(x: jax.Array) -> jax.Array:
        rows, length = x.shape[:2]
        count = -(-length // max(1, chunk // rows))
        size = -(-length // count)  # as even as can be
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, count, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, arrays)


def _join(arrays: Any, length: int) -> Any:
    """[C, B, S, ...] -> [B, T, ...]: the way back."""

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, arrays)
