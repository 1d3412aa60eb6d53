"""T5 attention in linear memory: one custom gradient, three implementations of its tiles.

`flash.py` is the function and its gradient; `chunked.py` runs its blocks as plain XLA on any
device, `pallas_gpu.py` and `pallas_tpu.py` are the hand-written kernels. They share the bias
(`bias.py`), the ranges of blocks that can meet (`blocks.py`) and the mathematics of one tile
(`tile.py`). docs/kernel.md explains the idea.
"""
