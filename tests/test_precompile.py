"""`mtl-jax precompile` without compiling for anything: programs read, choices made, reports."""

import dataclasses
import shlex
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax import (
    build,
    cli,
    config,
    fitting,
    hlo,
    precompile,
    precompile_config,
    precompile_report,
    sharding,
)
from mtl_jax.errors import UserError

# Layers in a loop of 24 rounds; in each a gather in three pieces, the middle one in a loop of 8
# rounds that adds 2; a sum over pairs; and a loop that ends when a flag says so.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%x, %y)
}

%piece (param_0: bf16[8,4]) -> (bf16[8,4], bf16[8,128]) {
  %param_0 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=7, replica_groups=[2,32]<=[32,2]T(1,0), dimensions={1}
  ROOT %start = (bf16[8,4]{1,0}, /*index=1*/bf16[8,128]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece.1 (param_1: bf16[8,4]) -> bf16[8,128] {
  %param_1 = bf16[8,4]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,128]{1,0} all-gather(%param_1), channel_id=7, replica_groups=[2,32]<=[32,2]T(1,0), dimensions={1}
}

%all-reduce-scatter (input: f32[64,4]) -> f32[32,4] {
  %input = f32[64,4]{1,0} parameter(0)
  %whole = f32[64,4]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %part = f32[32,4]{1,0} dynamic-slice(%whole, %zero), dynamic_slice_sizes={32,4}
}

%inner_body (carry: (u32[], bf16[8,4], u32[])) -> (u32[], bf16[8,4], u32[]) {
  %carry = (u32[], bf16[8,4]{1,0}, u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%carry), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %x.1 = bf16[8,4]{1,0} get-tuple-element(%carry), index=1
  %fusion.1 = bf16[8,128]{1,0} fusion(%x.1), kind=kOutput, calls=%piece.1
  %permuted = bf16[8,4]{1,0} collective-permute(%x.1), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %end = u32[] get-tuple-element(%carry), index=2
  ROOT %tuple.1 = (u32[], bf16[8,4]{1,0}, u32[]) tuple(%next, %permuted, %end)
}

%inner_condition (carry.1: (u32[], bf16[8,4], u32[])) -> pred[] {
  %carry.1 = (u32[], bf16[8,4]{1,0}, u32[]) parameter(0)
  %i.1 = u32[] get-tuple-element(%carry.1), index=0
  %end.1 = u32[] get-tuple-element(%carry.1), index=2
  ROOT %less = pred[] compare(%i.1, %end.1), direction=LT
}

%less_fused (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %less.1 = pred[] compare(%p0, %p1), direction=LT
}

%outer_body (carry.2: (s32[], bf16[8,4], bf16[24,8,4], bf16[24,9])) -> (s32[], bf16[8,4], bf16[24,8,4], bf16[24,9]) {
  %carry.2 = (s32[], bf16[8,4]{1,0}, bf16[24,8,4]{2,1,0}, bf16[24,9]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.2), index=0
  %one = s32[] constant(1)
  %next.1 = s32[] add(%j, %one)
  %x.2 = bf16[8,4]{1,0} get-tuple-element(%carry.2), index=1
  %fusion.2 = (bf16[8,4]{1,0}, bf16[8,128]{1,0}) fusion(%x.2), kind=kOutput, calls=%piece
  %zero.1 = u32[] constant(0)
  %limit = u32[] constant(16)
  %limit.1 = u32[] copy(%limit)
  %start.1 = (u32[], bf16[8,4]{1,0}, u32[]) tuple(%zero.1, %x.2, %limit.1)
  %loop = (u32[], bf16[8,4]{1,0}, u32[]) while(%start.1), condition=%inner_condition, body=%inner_body
  %y.1 = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
  %summed-start = f32[3,5]{1,0} all-reduce-start(%y.1), channel_id=10, replica_groups=mesh['a'=16,'b'=4] {'a','b':(1)2}, to_apply=%sum
  %summed = f32[3,5]{1,0} all-reduce-done(%summed-start)
  %kept = bf16[24,8,4]{2,1,0} get-tuple-element(%carry.2), index=2
  %kept.1 = bf16[24,8,4]{2,1,0} dynamic-update-slice(%kept, %y.1, %j)
  %weights = bf16[24,9]{1,0} get-tuple-element(%carry.2), index=3
  ROOT %tuple.2 = (s32[], bf16[8,4]{1,0}, bf16[24,8,4]{2,1,0}, bf16[24,9]{1,0}) tuple(%next.1, %y.1, %kept.1, %weights)
}

%outer_condition (carry.3: (s32[], bf16[8,4], bf16[24,8,4], bf16[24,9])) -> pred[] {
  %carry.3 = (s32[], bf16[8,4]{1,0}, bf16[24,8,4]{2,1,0}, bf16[24,9]{1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%carry.3), index=0
  %layers = s32[] constant(24)
  ROOT %fusion.3 = pred[] fusion(%j.1, %layers), kind=kLoop, calls=%less_fused
}

%until_body (carry.4: (pred[], f32[2])) -> (pred[], f32[2]) {
  %carry.4 = (pred[], f32[2]{0}) parameter(0)
  %flag = pred[] get-tuple-element(%carry.4), index=0
  %z = f32[2]{0} get-tuple-element(%carry.4), index=1
  %all = f32[2]{0} all-reduce(%z), channel_id=11, replica_groups={}, to_apply=%sum
  ROOT %tuple.3 = (pred[], f32[2]{0}) tuple(%flag, %all)
}

%until (carry.5: (pred[], f32[2])) -> pred[] {
  %carry.5 = (pred[], f32[2]{0}) parameter(0)
  ROOT %flag.1 = pred[] get-tuple-element(%carry.5), index=0
}

ENTRY %main (p: bf16[8,4], table: f32[64,4], kept0: bf16[24,8,4], w: bf16[24,9], s: (pred[], f32[2])) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %table = f32[64,4]{1,0} parameter(1)
  %kept0 = bf16[24,8,4]{2,1,0} parameter(2)
  %w = bf16[24,9]{1,0} parameter(3)
  %s = (pred[], f32[2]{0}) parameter(4)
  %zero.2 = s32[] constant(0)
  %fusion.4 = f32[32,4]{1,0} fusion(%table), kind=kCustom, calls=%all-reduce-scatter
  %kernel = bf16[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %start.2 = (s32[], bf16[8,4]{1,0}, bf16[24,8,4]{2,1,0}, bf16[24,9]{1,0}) tuple(%zero.2, %kernel, %kept0, %w)
  %loop.1 = (s32[], bf16[8,4]{1,0}, bf16[24,8,4]{2,1,0}, bf16[24,9]{1,0}) while(%start.2), condition=%outer_condition, body=%outer_body, metadata={op_name="jit(step)/jvp(T5)/while"}
  %loop.2 = (pred[], f32[2]{0}) while(%s), condition=%until, body=%until_body
  ROOT %result = bf16[8,4]{1,0} get-tuple-element(%loop.1), index=1
}
"""  # noqa: E501, as long as a compiler writes them


def by_channel(unknown_trips=None):
    found = hlo.Program(PROGRAM).collectives(64, unknown_trips)
    return {(one.kind, one.type): one for one in found}


def test_collectives_count_as_often_as_they_run():
    """By hand, from the comment above the program."""
    found = by_channel()
    told = {key: (one.bytes, one.group, one.times) for key, one in found.items()}
    assert told == {
        ("all-gather", "bf16[8,128]"): (2048, 32, 24),  # its middle piece runs 24 x 8 times
        ("collective-permute", "bf16[8,4]"): (64, 64, 24 * 8),
        ("all-reduce", "f32[3,5]"): (60, 32, 24),
        ("reduce-scatter", "f32[32,4]"): (512, 2, 1),
        ("all-reduce", "f32[2]"): (8, 64, 1),
    }
    assert [one.type for one in found.values() if not one.counted] == ["f32[2]"]
    unknown = by_channel(unknown_trips=100)["all-reduce", "f32[2]"]
    assert (unknown.times, unknown.counted) == (100, True)


def test_what_a_ring_sends_of_each_kind():
    """(n-1)/n of what arrives; sums go round twice; a part of a sum has n-1 parts to hand on."""
    found = by_channel()
    sent = {key[0]: one.sent_bytes for key, one in found.items() if one.counted}
    assert sent["all-gather"] == 24 * 2048 * 31 / 32
    assert sent["all-reduce"] == 24 * 60 * 2 * 31 / 32
    assert sent["reduce-scatter"] == 512
    assert sent["collective-permute"] == 24 * 8 * 64
    rows = hlo.by_kind(list(found.values()))
    assert rows["all-reduce"]["times"] == 25
    assert rows["all-reduce"]["bytes"] == 24 * 60 + 8


def test_arrays_that_a_forward_loop_fills_are_kept_activations():
    program = hlo.Program(PROGRAM)
    assert program.kept_activations() == 24 * 8 * 4 * 2  # its weights only pass through
    assert hlo.Program(PROGRAM.replace("jvp(T5)", "T5")).kept_activations() is None
    assert program.kernels() == {"AsyncCollectiveStart": 1, "tpu_custom_call": 1}


def test_a_real_program_has_the_collectives_that_it_was_given():
    """On the eight devices of the tests, where XLA says how long loops are."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, tensor=2))
    whole = NamedSharding(mesh, PartitionSpec())

    def body(x, _):
        return jax.lax.psum(x, "data") * 0.5, None

    def loop(x):
        return jax.lax.scan(body, x, length=5)[0]

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=whole)
    text = jax.jit(mapped).lower(x).compile().as_text()
    (found,) = hlo.Program(text).collectives(8)
    assert (found.kind, found.bytes, found.group) == ("all-reduce", 16 * 32 * 4, 4)
    assert (found.times, found.counted) == (5, True)


@pytest.mark.parametrize(
    ("type_", "size"),
    [("f32[2,3]", 24), ("bf16[7]", 14), ("pred[]", 1), ("(s32[], f8e4m3fn[3], s4[4])", 9)],
)
def test_bytes_of_types(type_, size):
    assert hlo.bytes_of(type_) == size


def run(**values):
    made = config.load(["models/t5_1_1_xl.gin"])
    return fitting.with_values(made, {name.replace("__", "."): v for name, v in values.items()})


SIZES = {"data": 64, "fsdp": 1, "tensor": 1}


# Of libtpu 0.0.42: a sum over two slices of four chips.
MEGASCALE = """
HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[1,128]) -> f32[1,128] {
  %x = f32[1,128]{1,0:T(1,128)} parameter(0)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce_0"}
  %all-reduce.1 = f32[1,128]{1,0:T(1,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%sum
  %send = (f32[1,128]{1,0:T(1,128)}, u32[], token[]) send(%all-reduce.1, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[1,128]{1,0:T(1,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[1,128]{1,0:T(1,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %got = f32[1,128]{1,0:T(1,128)} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


def test_what_goes_between_slices_is_told_apart():
    within, between = hlo.Program(MEGASCALE).collectives(8)
    assert (within.kind, within.group, within.sent_bytes) == ("all-reduce", 4, 2 * 3 / 4 * 512)
    assert (between.kind, between.group) == ("between slices all-reduce", 2)
    assert (between.bytes, between.sent_bytes) == (512, 512.0)
    assert (within.between_slices, between.between_slices) == (False, True)


def test_choices_are_legal_and_the_cheap_come_first():
    cfg = run(Eval__batch_size=128)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=512))
    found = fitting.choices(cfg, SIZES, ["train", "decode"], 4e9, 1e8)
    costs = [choice.cost for choice in found]
    assert costs == sorted(costs)
    assert {"full", "minimal", None} == {c.values.get("T5.remat") for c in found}
    for choice in found:
        mesh = choice.config.mesh
        sizes = (mesh.data, mesh.fsdp, mesh.tensor)
        if "Mesh.fsdp" in choice.values:
            assert np.prod(sizes) == 64
        assert cfg.model.emb_dim % mesh.fsdp == 0
        assert 512 % (64 // mesh.tensor * choice.config.step.microbatches) == 0
        assert choice.config == fitting.with_values(cfg, choice.values)
    assert not [
        c for c in fitting.choices(cfg, SIZES, ["eval"], 4e9, 1e8) if "T5.remat" in c.values
    ]


def test_flags_of_a_choice_are_a_command_line_that_sets_it():
    cfg = run()
    values = {"T5.remat": "full", "Step.microbatches": 4}
    choice = fitting.Choice(values, fitting.with_values(cfg, values), 1.0, {})
    bindings = [word.removeprefix("--gin.") for word in shlex.split(choice.flags)]
    again = config.load(["models/t5_1_1_xl.gin"], bindings)
    assert (again.model.remat, again.step.microbatches) == ("full", 4)


def test_estimates_grow_with_what_is_kept_and_shrink_with_what_is_divided():
    def size(sizes=SIZES, **values):
        return fitting.estimate(run(**values), sizes, "train", 1.1e10, 1e7)

    assert size(T5__remat="none") > size(T5__remat="minimal") > size(T5__remat="full")
    assert size() > size({"data": 1, "fsdp": 64, "tensor": 1})
    assert size(T5__num_encoder_layers=48) > size()


def test_what_libtpu_says_of_too_large_programs_is_understood():
    first = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    second = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.74G) exceeds available HBM (15.75G)."
    )
    assert precompile._told_bytes(first) == 20.5 * 2**30
    assert precompile._told_bytes(second) == 18.74 * 2**30
    assert precompile._told_bytes("RESOURCE_EXHAUSTED: vmem") is None


def test_programs_are_chosen_by_name():
    assert precompile_config.programs("decode, train") == ["train", "decode"]
    with pytest.raises(UserError, match="Did you mean 'decode'"):
        precompile_config.programs("train,decod")
    with pytest.raises(UserError, match="names no program"):
        precompile_config.programs(" , ")


def test_a_run_without_its_tasks_keeps_no_best_checkpoint():
    asked = ["Checkpoint.keep_best=1", "Checkpoint.best_metric='average/accuracy'"]
    given = config.load(["models/t5_1_1_xl.gin"], asked)
    made = precompile._without_tasks(given)
    assert (made.checkpoint.keep_best, made.checkpoint.best_metric) == (0, "")


def test_a_report_that_could_not_be_written_is_known_before_anything_is_compiled(tmp_path, capsys):
    words = ["precompile", "--gin_file=models/t5_1_1_tiny.gin", "--topology=v5e:2x2"]
    assert cli.main([*words, f"--json={tmp_path}/none/found.json"]) == 1
    assert "none/found.json: there is no folder" in capsys.readouterr().err


def test_a_report_tells_what_does_not_fit_and_what_would():
    program = precompile.Program("train", 12.0, 20.0, 30 * 2**30, fits=False, refusal="too large")
    report = {
        **{"topology": "v5e:2x2", "slices": 1, "device": "TPU v5 lite", "parameters": 5},
        "attention": "naive",
        **{"remat": "none", "dtype": "float32", "optimizer": "adafactor", "mixture": ""},
        "chip": {"memory": 16 * 2**30, "usable": 15 * 2**30},
        "versions": {"jax": "1.2"},
        "mesh": {"data": 4},
        "batch": {"rows": 8, "inputs_length": 16, "targets_length": 4, "microbatches": 1},
        "evaluation": {
            **{"rows": 8, "inputs_length": 16, "targets_length": 4, "max_decode_length": 9}
        },
        "programs": [dataclasses.asdict(program)],
        "fits": False,
        "tried": [{"flags": "--gin.A.b=1"}],
        "suggestion": "--gin.A.b=1",
    }
    text = precompile_report.text(report)
    for part in ("30.00 GiB", "NO", "can have 15.00 GiB", "refused: too large", "  --gin.A.b=1"):
        assert part in text
    none = precompile_report.text(report | {"suggestion": None})
    assert "neither do the 1 other" in none


class State(NamedTuple):
    params: Any
    opt_state: Any


def searched(monkeypatch, outcomes):
    """What a search finds whose programs come out as in the list, one after the other.

    Of a train step that does not fit; an outcome is an error, or whether it fits.
    """
    left = iter(outcomes)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4), jax.devices()[:4])
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}

    def session(cfg, devices=None):
        state = State(params, {"v": params["w"]})
        return SimpleNamespace(config=cfg, mesh=mesh, abstract_state=state)

    def compiled(session, name, topology):
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        needed = 2**30 if outcome else 2**40
        return precompile.Program(name, 1.0, 1.0, needed, fits=outcome)

    monkeypatch.setattr(precompile, "_compiled", compiled)
    monkeypatch.setattr(build, "build", session)
    found = [precompile.Program("train", 1.0, 1.0, 17 * 2**30, fits=False)]
    return precompile._search(session(run()), "v5e:2x2", found, 4)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile: bad layout\nand more"),
        NotImplementedError("Mosaic failed to compile: bad layout"),
    ],
)
def test_a_setting_that_does_not_compile_costs_the_search_that_setting_alone(monkeypatch, error):
    found = searched(monkeypatch, [error, True])
    failed, fitting_one = found["tried"]
    assert failed["flags"] != fitting_one["flags"] == found["suggestion"]
    assert (failed["fits"], fitting_one["fits"]) == (False, True)
    (line,) = precompile._failures(found)
    assert failed["flags"] in line
    assert "train: " in line
    assert line.endswith("Mosaic failed to compile: bad layout)")
    assert not precompile._failures({"tried": [fitting_one]})
    assert not precompile._failures({})  # where the run fits nothing is tried


def test_a_search_that_only_fails_suggests_nothing(monkeypatch):
    found = searched(monkeypatch, [ValueError("no")] * 4)
    assert found["suggestion"] is None
    assert len(precompile._failures(found)) == 4
