"""What is exported of a task has, in transformers, the logits of the multi-task model."""

import golden
import jax
import numpy as np
import pytest
import sharing_plans as plans

from mtl_jax import patterns
from mtl_jax.errors import UserError
from mtl_jax.interop import hf
from mtl_jax.interop.source import Source
from mtl_jax.sharing import tree
from mtl_jax.sharing.embeddings import prompt_ids
from mtl_jax.sharing.plan import make_plan
from mtl_jax.sharing.sharing_config import (
    ExpertsConfig,
    LoraConfig,
    PromptConfig,
    Rooms,
    SharingConfig,
)

# All that a plain T5 can say, at once.
ROOMS = Rooms(
    SharingConfig(
        clusters=plans.CLUSTERS,
        levels=(("decoder", "cluster", 0, 1), ("decoder", "task", 1, 2)),
        copies=(("encoder/relpos_bias/.*", "task"),),
        task_embedding="task",
    ),
    LoraConfig(rank=2, owner="inventory", inventory=3, patterns=(".*attention/.*/kernel",)),
    prompt=PromptConfig(length=2, owners=("shared", "task")),
    experts=ExpertsConfig(number=3, top_k=2, stacks=("encoder",)),
)


class Made(Source):
    """A task's plain T5, from memory."""

    def __init__(self, plan, params, task):
        self.config, self.description = plan.model_config, "made"
        self._leaves = patterns.by_path(jax.device_get(tree.plain(plan, params, task)))

    def read(self, path, layer):
        leaf = self._leaves["/".join(path)]
        return leaf if layer is None else leaf[layer]


@pytest.mark.torch
@pytest.mark.parametrize("task", [0, 1, 3])
def test_transformers_computes_the_logits_of_the_task(tmp_path, task):
    import torch
    import transformers

    plan = make_plan(ROOMS, plans.NAMES, golden.config("1.1"))
    params = plans.perturbed(plan)
    hf.write(Made(plan, params, task), tmp_path, "float32", 10**9)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = plans.with_prompt(golden.batch(), prompt_ids(plan))
    found = jax.jit(plans.forward, static_argnums=0)(plan, params, task, batch)
    real = batch["decoder_segment_ids"] > 0
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(batch["encoder_input_tokens"]).long(),
            attention_mask=torch.tensor(batch["encoder_segment_ids"]).long(),
            decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]).long(),
        ).logits.numpy()
    # Rounding of float32 over four layers, logits of order 1 to 10.
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=1e-4, atol=1e-4)
    plain = jax.jit(plans.forward, static_argnums=0)(plan, params, 2, batch)
    assert np.abs(np.asarray(plain)[real] - expected[real]).max() > 0.1


def test_adapters_have_no_name_there(tmp_path):
    plan = plans.plan("adapter")
    with pytest.raises(UserError, match=r"T5\.adapter_dim = 4: .* Train with Lora instead"):
        hf.write(Made(plan, plans.perturbed(plan), 1), tmp_path, "float32", 10**9)
    assert not list(tmp_path.iterdir())
