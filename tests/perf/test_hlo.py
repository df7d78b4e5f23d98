"""What is read from the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from anchor_jax.perf import hlo

HLO = """\
HloModule jit_f

%fused_computation (p0: f32[8,4680,18720]) -> f32[8,4680] {
  %p0 = f32[8,4680,18720]{2,1,0} parameter(0)
  ROOT %sum = f32[8,4680]{1,0} reduce(%p0)
}

ENTRY %main (a: bf16[4680,8960]) -> f32[8,4680] {
  %a = bf16[4680,8960]{1,0} parameter(0)
  %cache = bf16[30,18720,12,128]{3,2,1,0} broadcast(%a)
  ROOT %out = f32[8,4680]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation
}
"""


def shapes(line):
    text = HLO.replace("  %cache", f"  {line}\n  %cache")
    return hlo.score_shapes(text, tokens=4680, features={8960})


def test_scores_inside_a_fusion_are_not_in_memory():
    assert hlo.score_shapes(HLO, tokens=4680, features={8960}) == ()


@pytest.mark.parametrize(
    "line, found",
    [
        ("%s = f32[1,12,4680,18720]{3,2,1,0} dot(%a, %a)", "f32[1,12,4680,18720]"),
        ("%m = pred[4680,18720]{1,0} compare(%a, %a)", "pred[4680,18720]"),
        ("%t = (f32[2]{0}, bf16[4736,18944]{1,0}) while(%a)", "bf16[4736,18944]"),
    ],
)
def test_scores_and_masks_in_memory_are_found(line, found):
    assert shapes(line) == (found,)


@pytest.mark.parametrize(
    "line",
    [
        "%w = bf16[8960,8960]{1,0} copy(%a)",
        "%s = f32[12,512,4680]{2,1,0} dot(%a, %a)",
        "%x = f32[4680]{0} reduce(bf16[4680,4680] %a)",
    ],
)
def test_weights_and_short_sides_are_not_scores(line):
    assert shapes(line) == ()


def test_scores_are_found_in_a_program_that_xla_made():
    def attend(x):
        return jax.nn.softmax(x @ x.T) @ x

    x = jax.ShapeDtypeStruct((96, 8), jnp.float32)
    text = jax.jit(attend).lower(x).compile().as_text()

    assert set(hlo.score_shapes(text, tokens=96)) == {"f32[96,96]"}
    assert hlo.score_shapes(text, tokens=97) == ()


LOOPS = """\
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0}) parameter(0)
  %g = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %whole = bf16[32,64]{1,0} all-gather(%g), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %out = bf16[8,64]{1,0} fusion(%whole), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%p, %out)
}

%fused (p: bf16[32,64]) -> bf16[8,64] {
  %p.1 = bf16[32,64]{1,0} parameter(0)
  ROOT %m = bf16[8,64]{1,0} slice(%p.1), slice={[0:8],[0:64]}, backend_config={"estimated_cycles":"7"}
}

%until (p: (s32[], bf16[8,64])) -> pred[] {
  %p.2 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %now = s32[] get-tuple-element(%p.2), index=0
  ROOT %lt = pred[] compare(%now, %limit), direction=LT
}

%outer (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p.3 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %w = (s32[], bf16[8,64]{1,0}) while(%p.3), condition=%until, body=%inner
}

%yes (p: f32[16]) -> f32[16] {
  %p.4 = f32[16]{0} parameter(0)
  %kernel = f32[16]{0} custom-call(%p.4), custom_call_target="tpu_custom_call"
  ROOT %all = f32[16]{0} all-reduce(%kernel), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%no (p: f32[16]) -> f32[16] {
  ROOT %p.5 = f32[16]{0} parameter(0)
}

ENTRY %main (a: (s32[], bf16[8,64]), c: f32[16], i: pred[]) -> f32[16] {
  %a.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  %c.1 = f32[16]{0} parameter(1)
  %i.1 = pred[] parameter(2)
  %w.1 = (s32[], bf16[8,64]{1,0}) while(%a.1), condition=%until, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %copy = f32[16]{0} copy(%c.1), backend_config={"estimated_cycles":"11"}
  ROOT %x = f32[16]{0} conditional(%i.1, %copy, %c.1), true_computation=%yes, false_computation=%no
}
"""  # noqa: E501


def test_loops_repeat_what_their_bodies_do():
    work = hlo.read(LOOPS)

    by_kind = {one.kind: one for one in work.collectives}
    gather = by_kind["all-gather"]
    # The outer loop has the compiler's count, 3; the inner its condition's limit, 5.
    assert (gather.times, gather.nbytes, gather.dtype) == (15, 32 * 64 * 2, "bf16")
    assert gather.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    # Cycles inside a fusion are part of the fusion's.
    assert work.cycles == 15 * 100 + 11


def test_the_branch_with_most_work_counts():
    work = hlo.read(LOOPS)

    (reduce,) = [one for one in work.collectives if one.kind == "all-reduce"]
    assert (reduce.times, reduce.nbytes) == (1, 64)
    assert reduce.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert work.calls == {"tpu_custom_call": 1}


@pytest.mark.parametrize(
    "written, groups",
    [
        ("replica_groups={{0,3},{1,2}}", ((0, 3), (1, 2))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups={}", ()),
    ],
)
def test_all_ways_to_write_groups_are_read(written, groups):
    assert (
        hlo.read_groups(f"%x = f32[] all-reduce(%y), {written}, to_apply=%z") == groups
    )


def entry(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    "line, kind, nbytes",
    [
        (
            "%s = ((bf16[8]{0}, f32[8]{0}), (bf16[32]{0}, f32[32]{0}))"
            " all-gather-start(%a, %b), replica_groups=[2,4]<=[8], dimensions={0}",
            "all-gather",
            32 * 2 + 32 * 4,
        ),
        (
            "%r = f32[8]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8],"
            " dimensions={0}, to_apply=%add",
            "reduce-scatter",
            4 * 8 * 4,
        ),
        (
            "%r = (f32[8]{0}, f32[4]{0}) all-reduce-start(%a, %b),"
            " replica_groups=[2,4]<=[8], to_apply=%add",
            "all-reduce",
            48,
        ),
        (
            "%p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a),"
            " source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            36,
        ),
        (
            "%t = (f32[2]{0}, f32[2]{0}) all-to-all(%a, %b), replica_groups={{0,1}}",
            "all-to-all",
            16,
        ),
    ],
)
def test_the_bytes_of_each_kind_are_those_of_the_whole_array(line, kind, nbytes):
    (found,) = hlo.read(entry(line)).collectives

    assert (found.kind, found.nbytes) == (kind, nbytes)


def test_the_end_of_a_collective_is_not_counted():
    text = entry("%d = bf16[32]{0} all-gather-done(%s)")

    assert hlo.read(text).collectives == ()


ASYNC = """\
HloModule m

%start (p: bf16[8]) -> bf16[32] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g.1 = bf16[32]{0} all-gather(%p), channel_id=9, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%done (p: bf16[8]) -> bf16[32] {
  %p.1 = bf16[8]{0} parameter(0)
  ROOT %g.2 = bf16[32]{0} all-gather(%p.1), channel_id=9, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.3 (p: f32[32]) -> f32[8] {
  %p.2 = f32[32]{0} parameter(0)
  %r = f32[32]{0} all-reduce(%p.2), channel_id=10, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %s = f32[8]{0} dynamic-slice(%r, %i)
}

ENTRY %main (a: bf16[8], b: f32[32]) -> f32[8] {
  %a = bf16[8]{0} parameter(0)
  %b = f32[32]{0} parameter(1)
  %f.1 = bf16[32]{0} fusion(%a), kind=kCustom, calls=%start
  %f.2 = bf16[32]{0} fusion(%a), kind=kCustom, calls=%done
  ROOT %f.3 = f32[8]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_the_parts_of_a_tpus_collective_count_once():
    gather, scatter = hlo.read(ASYNC).collectives

    assert (gather.kind, gather.nbytes, gather.times) == ("all-gather", 64, 1)
    assert (scatter.kind, scatter.nbytes) == ("reduce-scatter", 128)


@pytest.mark.parametrize(
    "shape, nbytes",
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30),
        ("(f32[], pred[7]{0}, s4[8]{0}, f8e4m3fn[3], token[])", 4 + 7 + 4 + 3),
    ],
)
def test_arrays_have_the_bytes_of_their_type(shape, nbytes):
    assert hlo.array_bytes(shape) == nbytes


def test_a_program_that_xla_made_for_several_devices_is_read():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def gathered_five_times(x):
        def once(carry, _):
            put = jax.lax.with_sharding_constraint
            return put(put(jnp.sin(carry), whole) * 2, split), None

        return jax.lax.scan(once, x, length=5)[0]

    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=split)
    text = jax.jit(gathered_five_times).lower(x).compile().as_text()
    found = hlo.read(text).collectives

    gathers = [one for one in found if one.kind == "all-gather"]
    assert sum(one.times * one.nbytes for one in gathers) == 5 * 16 * 8 * 4
    assert gathers[0].groups in ((), ((0, 1, 2, 3),))
