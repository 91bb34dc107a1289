"""Parameters fill buckets from the last to the first, each at a block's start."""

from hypothesis import given
from hypothesis import strategies as st

from mpilm.comm.order import BLOCK, segments
from mpilm.sync._layout import Parameter, lay_out

parameters = st.lists(st.tuples(st.integers(1, 5 * BLOCK), st.booleans()), min_size=1, max_size=20).map(
    lambda items: [Parameter(f"p{index}", count, decay) for index, (count, decay) in enumerate(items)])


@given(parameters, st.integers(1, 8 * BLOCK), st.integers(1, 5))
def test_every_parameter_has_one_place(given_parameters, bucket_count, owners):
    """All of them, once, whole, at a block's start, without overlap, and segments are whole blocks."""
    layouts = lay_out(given_parameters, bucket_count, owners=owners)
    found = [(member.name, member.count) for layout in layouts for member in layout.members]
    assert sorted(found) == sorted((p.name, p.count) for p in given_parameters)
    for layout in layouts:
        ends = [0] + [member.start + member.count for member in layout.members]
        assert all(member.start % BLOCK == 0 and member.start >= end
                   for member, end in zip(layout.members, ends, strict=False))
        assert ends[-1] <= layout.count and layout.count % BLOCK == 0
        assert all(cut.start % BLOCK == 0 and cut.stop % BLOCK == 0 for cut in segments(layout.count, owners))


@given(parameters, st.integers(1, 8 * BLOCK))
def test_a_bucket_has_one_kind_of_decay_and_its_size(given_parameters, bucket_count):
    """Decayed and undecayed do not mix; only a single large parameter may exceed the size."""
    decay = {p.name: p.decay for p in given_parameters}
    for layout in lay_out(given_parameters, bucket_count, owners=1):
        assert {decay[member.name] for member in layout.members} == {layout.undecayed > 0}
        assert layout.undecayed in (0, sum(-(-member.count // BLOCK) * BLOCK for member in layout.members))
        assert layout.count <= max(bucket_count, BLOCK) or len(layout.members) == 1


def test_the_last_parameter_leaves_first():
    """The backward pass produces it first."""
    names = [Parameter(name, BLOCK, True) for name in ("embedding", "block", "head")]
    assert [layout.members[0].name for layout in lay_out(names, BLOCK, owners=1)] == ["head", "block", "embedding"]
