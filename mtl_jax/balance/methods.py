"""All methods of the project: importing this registers them."""

from mtl_jax.balance import (  # noqa: F401
    adaptive,
    common_descent,
    famo,
    gradnorm,
    group_dro,
    surgery,
    weighting,
)
