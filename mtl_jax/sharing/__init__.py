"""Which parameters tasks share: copies of layers, LoRA, adapters, prompts, experts, an adversary.

Every microbatch, and every batch that is evaluated or generated from, holds examples of one task.
So sharing is a pure function of the parameters in front of an unchanged T5:

    plain(plan, params, task) -> the parameters of an ordinary T5

and the ordinary `model.encode`, `model.decode` and `decode.py` run on them. Training differentiates
through it; evaluation, generation and export call the same function. Hence the model that is
exported for a task is the model that was trained, nothing in attention, decoding or interop knows
of tasks, and a token costs what it costs in a plain T5.

    sharing_config.py   what Gin sets: Sharing, Lora, Adapter, Prompt, Experts, Adversary
    plan.py             these values, the tasks' names and the T5's shape, checked: a `SharingPlan`
    bank.py             a parameter with an entry for each task or cluster; picking an entry
    copies.py           layers and parameters that tasks or clusters have of their own; soft sharing
    lora.py             low-rank differences: per task, per cluster, shared, or mixed (Polytropon)
    embeddings.py       task embeddings and soft prompts
    experts.py          a mixture of experts whose router sees the task alone
    adversary.py        a classifier of tasks behind a gradient reversal: a loss, not a parameter
    tree.py             all of them at once: init, axes, plain, penalty, keep_absent, report

The tree of parameters is that of the plain T5, without what tasks own, and a subtree "sharing":
`sharing/task/...`, `sharing/cluster/...`, `sharing/inventory/...` and `sharing/experts/...` are
banks with a leading axis of entries, `sharing/shared/...` and `sharing/adversary/...` are not.
Task ids are those of `tasks.json`, from 1; id 0 is a task that is not known, which gets the mean of
the entries of every bank. Ids behind those of the tasks are such tasks of a known cluster.
"""
