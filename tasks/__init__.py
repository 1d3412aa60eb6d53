"""SeqIO tasks that ship with mtl_jax."""
