"""The reader of compiled programs against numbers counted by hand, on programs small enough to count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama4_jax.sharding import MeshConfig, hlo, make_mesh
from llama4_jax.sharding.hlo import Array, Instruction

MESH = {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1, "context": 1}


def compiled(function, *shapes_and_specs, mesh=MESH, out=None, **knowing) -> hlo.Costs:
    """What the compiled function costs, its arguments being float32 of (shape, spec)."""
    on = make_mesh(MeshConfig(**mesh))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on, PartitionSpec(*spec)))
        for shape, spec in shapes_and_specs
    ]
    how = {} if out is None else {"out_shardings": NamedSharding(on, PartitionSpec(*out))}
    with jax.set_mesh(on):
        return hlo.costs(jax.jit(function, **how).lower(*arguments).compile().as_text(), **knowing)


def summary(costs: hlo.Costs, mesh=MESH) -> list[tuple]:
    return sorted((c.kind, hlo.axes_of(c.groups, mesh), c.times, c.bytes) for c in costs.collectives)


def in_shard_map(function, in_specs, out_specs):
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def test_a_product_costs_two_operations_a_multiply_add_of_the_devices_own_rows():
    costs = compiled(lambda x, w: x @ w, ((64, 32), (("data", "fsdp"),)), ((32, 48), ()))
    assert costs.flops == {"f32": 2 * (64 // 8) * 32 * 48}
    assert not costs.collectives and not costs.assumptions


def test_products_over_batch_axes_count_each_batch_once():
    costs = compiled(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), ((8, 6, 10), ()), ((8, 10, 12), ()))
    assert costs.total_flops == 2 * 8 * 6 * 10 * 12


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    def five(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    costs = compiled(five, ((64, 32), (("data", "fsdp"),)), ((5, 32, 32), ()))
    assert costs.total_flops == 5 * 2 * 8 * 32 * 32


def test_a_sum_over_an_axis_inside_a_scan_of_five_runs_five_times():
    @functools.partial(in_shard_map, in_specs=PartitionSpec("data", "fsdp"), out_specs=PartitionSpec("data"))
    def sums(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.psum(x, "fsdp") * 0.5, x)

    assert summary(compiled(sums, ((16, 32), ("data", "fsdp")))) == [("all-reduce", ("fsdp",), 5, 8 * 8 * 4)]


def test_parameters_split_over_fsdp_are_gathered_forward_and_their_gradient_is_scattered():
    rows, parts = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")

    @functools.partial(in_shard_map, in_specs=(parts, rows), out_specs=parts)
    def gradient(w, x):
        def loss(w):
            return jnp.sum(jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)))

        return jax.lax.psum(jax.grad(loss)(w), "data")

    costs = compiled(gradient, ((256, 64), ("fsdp",)), ((128, 256), (("data", "fsdp"),)))
    assert summary(costs) == [
        ("all-gather", ("fsdp",), 1, 256 * 64 * 4),
        ("all-reduce", ("data",), 1, 64 * 64 * 4),
        ("reduce-scatter", ("fsdp",), 1, 256 * 64 * 4),
    ]
    assert costs.total_flops == 2 * (2 * 16 * 256 * 64)


def test_a_ring_passes_its_part_on_as_often_as_it_turns():
    @functools.partial(in_shard_map, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))
    def ring(x):
        around = [(i, (i + 1) % 4) for i in range(4)]
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.ppermute(x, "fsdp", around) + 1, x)

    assert summary(compiled(ring, ((32, 16), ("fsdp",)))) == [("collective-permute", ("fsdp",), 3, 8 * 16 * 4)]


def test_each_kind_of_collective_is_told_with_its_axes_and_the_bytes_of_the_whole_array():
    @functools.partial(
        in_shard_map, in_specs=PartitionSpec("data", "fsdp"), out_specs=(PartitionSpec(), PartitionSpec("data", "fsdp"))
    )
    def several(x):  # of [8, 8] on each device
        gathered = jax.lax.all_gather(x, ("data", "fsdp"), tiled=True)
        scattered = jax.lax.psum_scatter(gathered, "data", tiled=True)
        return gathered, jax.lax.all_to_all(scattered[:8], "fsdp", 0, 1, tiled=True)

    assert summary(compiled(several, ((16, 32), ("data", "fsdp")))) == [
        ("all-gather", ("data", "fsdp"), 1, 8 * 8 * 8 * 4),
        ("all-to-all", ("fsdp",), 1, 8 * 8 * 4),
        ("reduce-scatter", ("data",), 1, 8 * 8 * 8 * 4),
    ]


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    costs = compiled(until, ((16, 16), ()))
    assert costs.total_flops == 2 * 16**3
    assert any("unknown length" in line for line in costs.assumptions)


def test_a_loop_of_unknown_length_runs_as_often_as_one_says_who_knows():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    text = jax.jit(until).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    costs = hlo.costs(text, turns=lambda op_name: 2.5 if op_name.endswith("/while") else None)
    assert costs.total_flops == 2.5 * 2 * 16**3 and not costs.assumptions


def test_of_a_conditional_the_dearest_branch_counts_and_it_is_said():
    def either(x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    costs = compiled(either, ((16, 16), ()))
    assert costs.total_flops == 2 * 2 * 16**3
    assert any("dearest branch" in line for line in costs.assumptions)

    known = compiled(either, ((16, 16), ()), takes_cheapest=lambda name: name.endswith("/cond"))
    assert known.total_flops == 2 * 16**3 and not known.assumptions


def test_updating_a_row_of_a_large_array_in_place_moves_the_row_alone():
    def write(big, row):
        return jax.lax.dynamic_update_slice(big, row, (3, 0))

    on = make_mesh(MeshConfig(data=8))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=NamedSharding(on, PartitionSpec()))
    text = jax.jit(write, donate_argnums=0).lower(shape((4096, 256)), shape((1, 256))).compile().as_text()
    assert 0 < hlo.costs(text).traffic <= 4 * 256 * 4 + 64


def test_what_an_elementwise_function_moves_is_its_operands_and_its_result():
    costs = compiled(lambda x, y: jnp.tanh(x) * y, ((1024, 64), (("data", "fsdp"),)), ((1024, 64), (("data", "fsdp"),)))
    assert costs.traffic == 3 * 128 * 64 * 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_notation_of_replica_groups_is_read(text, groups):
    assert hlo.replica_groups(f"channel_id=1, {text}, use_global_device_ids=true", 8).tolist() == groups


def test_a_notation_of_replica_groups_that_is_new_is_refused():
    with pytest.raises(ValueError, match="does not know"):
        hlo.replica_groups("replica_groups=rings[8], use_global_device_ids=true", 8)


def test_groups_lie_along_the_axes_in_which_their_devices_differ():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert hlo.axes_of(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), mesh) == ("tensor",)
    assert hlo.axes_of(np.array([[0, 2, 4, 6], [1, 3, 5, 7]]), mesh) == ("data", "fsdp")
    assert hlo.axes_of(np.arange(8).reshape(8, 1), mesh) == ()


def convolution(attributes: str, result: tuple[int, ...]) -> Instruction:
    return Instruction("c", "convolution", (Array("f32", result, 0),), (), "", ", " + attributes, False)


def test_a_product_with_a_batch_axis_written_as_a_convolution_counts_the_product():
    """As TPUs' compilers write it: the batch is a dimension of the window, of which all but one place is padding."""
    batch, rows, summed, columns = 16, 32, 64, 128
    found = convolution(
        "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf", (batch, rows, columns)
    )
    lhs, rhs = Array("bf16", (batch, rows, summed), 0), Array("bf16", (batch, summed, columns), 0)
    assert hlo.convolution_flops(found, lhs, rhs) == 2 * batch * rows * summed * columns


def test_padding_of_a_convolution_is_no_work():
    found = convolution("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (2, 10, 4))
    assert hlo.convolution_flops(found, Array("f32", (2, 10, 5), 0), Array("f32", (3, 5, 4), 0)) == 2 * 2 * 5 * 4 * 28


TPU_TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=8, replica_count=1

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter (whole: bf16[1024,256]) -> bf16[128,256] {
  %whole = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} all-reduce(%whole), channel_id=2, replica_groups={}, to_apply=%add
  %place = s32[] constant(0)
  ROOT %part = bf16[128,256]{1,0} dynamic-slice(%all-reduce.1, %place, %place), dynamic_slice_sizes={128,256}
}

%fused (x: bf16[64,1024], w: bf16[1024,256]) -> bf16[64,256] {
  %x = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[64,256], bf16[128,256], s32[])) -> (s32[], bf16[64,256], bf16[128,256], s32[]) {
  %state = (s32[]{:T(128)}, bf16[64,256]{1,0}, bf16[128,256]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %y = bf16[64,256]{1,0} get-tuple-element(%state), index=1
  %shard = bf16[128,256]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %limit = s32[] get-tuple-element(%state), index=3
  %one = s32[] constant(1)
  %copy.i = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[] add(%copy.i, %one)
  %in-vmem = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %ag = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=1, dimensions={0},
  %fusion = bf16[64,256]{1,0} fusion(%in-vmem, %ag), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/dot"}
  %rs = bf16[128,256]{1,0} fusion(%ag), kind=kCustom, calls=%all-reduce-scatter
  ROOT %out = (s32[], bf16[64,256]{1,0}, bf16[128,256]{1,0}, s32[]) tuple(%next, %fusion, %rs, %limit)
}

%condition (state: (s32[], bf16[64,256], bf16[128,256], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[64,256]{1,0}, bf16[128,256]{1,0}, s32[]) parameter(0)
  %at = s32[] get-tuple-element(%state.1), index=0
  %to = s32[] get-tuple-element(%state.1), index=3
  ROOT %less = pred[] compare(%at, %to), direction=LT
}

ENTRY %main (p: bf16[64,256], q: bf16[128,256]) -> bf16[64,256] {
  %p = bf16[64,256]{1,0} parameter(0)
  %q = bf16[128,256]{1,0} parameter(1)
  %zero = s32[] constant(2)
  %twelve = s32[] constant(12)
  %init = (s32[], bf16[64,256]{1,0}, bf16[128,256]{1,0}, s32[]) tuple(%zero, %p, %q, %twelve)
  %loop = (s32[], bf16[64,256]{1,0}, bf16[128,256]{1,0}, s32[]) while(%init), condition=%condition, body=%body
  ROOT %done = bf16[64,256]{1,0} get-tuple-element(%loop), index=1
}
""".replace("dimensions={0},\n", "replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}\n")


def test_the_text_of_a_tpu_program_is_read():
    """Its loops do not say how long they are, its products are convolutions in fusions, its reduce-scatters are
    fusions, and S(1) is its vector memory."""
    costs = hlo.costs(TPU_TEXT)
    turns = 12 - 2
    assert costs.flops == {"bf16": turns * 2 * 64 * 1024 * 256}
    gathered, part, out = 1024 * 256 * 2, 128 * 256 * 2, 64 * 256 * 2
    assert summary(costs, {"fsdp": 8}) == [
        ("all-gather", ("fsdp",), turns, gathered),
        ("reduce-scatter", ("fsdp",), turns, gathered),
    ]
    counter = 4 + 8 + 4  # its copy, whose target is in scalar memory, and the sum of two
    moved = (part + gathered) + (gathered + out) + (gathered + part)
    assert moved * turns <= costs.traffic <= (moved + counter) * turns
    assert not costs.assumptions


def test_a_kernel_that_says_its_operations_is_taken_at_its_word_and_another_is_asked_about():
    head = "HloModule m\n\nENTRY %main (x: bf16[8,128]) -> bf16[8,128] {\n  %x = bf16[8,128]{1,0} parameter(0)\n"
    call = '  ROOT %k = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
    said = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"4096","bytes_accessed":"7"}}}\n}\n'
    assert hlo.costs(head + call + said).flops == {"kernel": 4096}

    silent = 'metadata={op_name="jit(f)/my_kernel"}\n}\n'
    asked = hlo.costs(head + call + silent, lambda name, operands, results, said: 5.0 * operands[0].shape[0])
    assert asked.flops == {"kernel": 40} and not asked.assumptions
    two = (head + call).replace("(%x)", "(%x, %x)").replace("bf16", "f8e4m3fn")
    assert hlo.costs(two + said).flops == {"f8e4m3fn": 4096}  # whose peak is another
    unknown = hlo.costs(head + call + silent)
    assert unknown.total_flops == 0 and any("my_kernel" in line for line in unknown.assumptions)


def entry(parameters: str, *lines: str) -> str:
    return "\n".join([f"ENTRY %main ({parameters}) -> bf16[8] {{", *(f"  {line}" for line in lines), "}", ""])


def test_a_weight_that_a_fusion_renames_before_its_product_is_read():
    text = """HloModule m

%renamed (w: bf16[1024,256]) -> bf16[1024,256] {
  %w = bf16[1024,256]{1,0} parameter(0)
  ROOT %bitcast = bf16[1024,256]{1,0} bitcast(%w)
}

%product (x: bf16[8,1024], w: bf16[1024,256]) -> bf16[8,256] {
  %x = bf16[8,1024]{1,0} parameter(0)
  %w.1 = bf16[1024,256]{1,0} parameter(1)
  %w.2 = bf16[1024,256]{1,0} fusion(%w.1), kind=kLoop, calls=%renamed
  ROOT %convolution = bf16[8,256]{1,0} convolution(%x, %w.2), dim_labels=bf_io->bf
}

""" + entry(
        "x: bf16[8,1024], w: bf16[1024,256]",
        "%x = bf16[8,1024]{1,0} parameter(0)",
        "%w = bf16[1024,256]{1,0} parameter(1)",
        "ROOT %y = bf16[8,256]{1,0} fusion(%x, %w), kind=kOutput, calls=%product",
    )
    assert hlo.costs(text).traffic == 2 * (8 * 1024 + 1024 * 256 + 8 * 256)


def test_of_a_stack_that_a_fusion_lays_out_otherwise_only_the_part_that_it_slices_is_read():
    text = """HloModule m

%retiled (w: s4[16,64,128]) -> s4[16,64,128] {
  %w = s4[16,64,128]{2,1,0:T(64,128)(8,1)} parameter(0)
  ROOT %copy = s4[16,64,128]{2,1,0:T(8,128)(8,1)} copy(%w)
}

%twice (w: s4[16,64,128]) -> s4[16,64,128] {
  %w.0 = s4[16,64,128]{2,1,0:T(64,128)(8,1)} parameter(0)
  %w.1 = s4[16,64,128]{2,1,0:T(8,128)(8,1)} fusion(%w.0), kind=kLoop, calls=%retiled
  ROOT %bitcast = s4[16,64,128]{2,1,0:T(8,128)(8,1)} bitcast(%w.1)
}

%one (w: s4[16,64,128], i: s32[]) -> s4[1,64,128] {
  %w.1 = s4[16,64,128]{2,1,0:T(64,128)(8,1)} parameter(0)
  %w.2 = s4[16,64,128]{2,1,0:T(8,128)(8,1)} fusion(%w.1), kind=kLoop, calls=%twice
  %i = s32[]{:S(1)} parameter(1)
  %zero = s32[] constant(0)
  %part = s4[1,64,128]{2,1,0:T(8,128)(8,1)} dynamic-slice(%w.2, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %copy.1 = s4[1,64,128]{2,1,0:T(64,128)(8,1)S(1)} copy(%part)
}

""" + entry(
        "w: s4[16,64,128]",
        "%w = s4[16,64,128]{2,1,0:T(64,128)(8,1)} parameter(0)",
        "%i = s32[]{:S(1)} constant(3)",
        "ROOT %y = s4[1,64,128]{2,1,0:T(64,128)(8,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%one",
    )
    assert hlo.costs(text).traffic == 64 * 128 / 2


def test_what_is_sliced_into_vector_memory_is_read_and_not_written():
    text = """HloModule m

%fetch (w: bf16[1024,256]) -> bf16[512,256] {
  %w = bf16[1024,256]{1,0} parameter(0)
  ROOT %half = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} slice(%w), slice={[0:512], [0:256]}
}

""" + entry(
        "w: bf16[1024,256]",
        "%w = bf16[1024,256]{1,0} parameter(0)",
        "%start = ((bf16[1024,256]{1,0}), bf16[512,256]{1,0:S(1)}, s32[]{:S(2)}) async-start(%w), calls=%fetch",
        "%done = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} async-done(%start)",
        "ROOT %again = bf16[8,256]{1,0:S(1)} slice(%done), slice={[0:8], [0:256]}",
    )
    assert hlo.costs(text).traffic == 2 * 512 * 256


def test_a_kernel_that_updates_an_operand_moves_what_it_says_and_another_all_that_it_is_given():
    call = '%k = bf16[64,128]{1,0} custom-call(%new, %old), custom_call_target="tpu_custom_call", '
    said = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"0","bytes_accessed":"4096"}}}'
    operands = "%new = bf16[1,128]{1,0} parameter(0)", "%old = bf16[64,128]{1,0} parameter(1)"

    def traffic(attributes):
        parameters = "new: bf16[1,128], old: bf16[64,128]"
        return hlo.costs("HloModule m\n\n" + entry(parameters, *operands, f"ROOT {call}{attributes}")).traffic

    assert traffic(f"output_to_operand_aliasing={{{{}}: (1, {{}})}}, {said}") == 4096
    assert traffic(said) == 2 * 128 * (1 + 64 + 64)


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.costs("HloModule nothing\n")


COMBINED = """HloModule combined, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (a: f32[64,128], b: f32[16,128]) -> (f32[8,128], f32[KEPT,128]) {
  %a = f32[64,128] parameter(0)
  %b = f32[16,128] parameter(1)
  %ar = (f32[64,128], f32[16,128]) all-reduce(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  %whole_a = f32[64,128] get-tuple-element(%ar), index=0
  %part_a = f32[8,128] dynamic-slice(%whole_a, %zero, %zero), dynamic_slice_sizes={8,128}
  %whole_b = f32[16,128] get-tuple-element(%ar), index=1
  PART
  ROOT %parts = (f32[8,128], f32[KEPT,128]) tuple(%part_a, %part_b)
}

ENTRY %main (a: f32[64,128], b: f32[16,128]) -> (f32[8,128], f32[KEPT,128]) {
  %a = f32[64,128] parameter(0)
  %b = f32[16,128] parameter(1)
  ROOT %rs = (f32[8,128], f32[KEPT,128]) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize(
    ("kept", "part", "kind"),
    [
        ("2", "dynamic-slice(%whole_b, %zero, %zero), dynamic_slice_sizes={2,128}", "reduce-scatter"),
        ("16", "negate(%whole_b)", "all-reduce"),
    ],
)
def test_several_sums_in_one_of_which_parts_are_kept_are_a_reduce_scatter(kept, part, kind):
    text = COMBINED.replace("PART", f"%part_b = f32[{kept},128] {part}").replace("KEPT", kept)
    (found,) = hlo.costs(text).collectives
    assert (found.kind, found.bytes, found.groups.shape) == (kind, (64 + 16) * 128 * 4, (1, 8))
