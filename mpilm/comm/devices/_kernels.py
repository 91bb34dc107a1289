"""The text of the kernels: C++ that NVRTC and hipRTC compile when they are first used. Text only, no GPU.

A sum over the parts of a node reads every part once and writes the result once, or to every part, in one pass. It is
generated for the number of parts and the order in which they are added. Additions are IEEE's, so the bits are those of
LocalSum on a host.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpilm.comm import order

TYPES = {"float32": "float", "float64": "double", "int64": "long long"}
VECTOR_BYTES = 16   # the widest load of a thread
THREADS = 256

SUM = """
struct __align__({vector_bytes}) Vector {{ {type} at[{lanes}]; }};

extern "C" __global__ void sum_parts({parameters}, unsigned long long count, unsigned long long head) {{
    // [0, head) is what comes before the first aligned address; vectors follow, and what is left after them
    const unsigned long long first = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    const unsigned long long vectors = (count - head) / {lanes};
    for (unsigned long long i = first; i < vectors; i += stride) {{
{load_vectors}
        Vector {results};
        #pragma unroll
        for (int lane = 0; lane < {lanes}; ++lane) {{
{add_lanes}
        }}
{store_vectors}
    }}
    for (unsigned long long i = first; i < count - vectors * {lanes}; i += stride) {{
        const unsigned long long at = i < head ? i : i + vectors * {lanes};
{add_scalars}
{store_scalars}
    }}
}}
"""

SQUARES = """
extern "C" __global__ void squares(const float* __restrict__ values, double* __restrict__ out) {{
    // A block of threads for each block of values, and always the same order: neither grid nor segment enter it.
    __shared__ double sums[{threads}];
    const float4* mine = reinterpret_cast<const float4*>(values + (unsigned long long)blockIdx.x * {block});
    double sum = 0.0;
    for (int i = threadIdx.x; i < {block} / 4; i += {threads}) {{
        const float4 v = mine[i];
        sum += (double)v.x * v.x + (double)v.y * v.y + (double)v.z * v.z + (double)v.w * v.w;
    }}
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = {threads} / 2; half > 0; half /= 2) {{
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }}
    if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}}
"""


def sum_parts(dtype: str, leaves: Sequence[range], *, first: int, size: int, outputs: Sequence[Sequence[int]]) -> str:
    """A kernel sum_parts(part 0, ..., part size-1, count, head).

    Args:
        dtype: A key of TYPES.
        leaves, first, size: As LocalSum.
        outputs: For every leaf, the parts that its sum is written to.
    """
    kind = TYPES[dtype]
    lanes = VECTOR_BYTES // {"float": 4}.get(kind, 8)
    used = [rank - first for leaf in leaves for rank in leaf]
    sums = [_sum(leaf, first) for leaf in leaves]
    stores = [(number, part) for number, parts in enumerate(outputs) for part in parts]
    return SUM.format(
        vector_bytes=VECTOR_BYTES, type=kind, lanes=lanes,
        parameters=", ".join(f"{kind}* __restrict__ p{part}" for part in range(size)),
        load_vectors=_lines(8, [f"const Vector v{part} = reinterpret_cast<const Vector*>(p{part} + head)[i];"
                                for part in used]),
        results=", ".join(f"r{number}" for number in range(len(leaves))),
        add_lanes=_lines(12, [f"r{number}.at[lane] = {text.format('v', '.at[lane]')};"
                              for number, text in enumerate(sums)]),
        store_vectors=_lines(8, [f"reinterpret_cast<Vector*>(p{part} + head)[i] = r{number};"
                                 for number, part in stores]),
        add_scalars=_lines(8, [f"const {kind} s{number} = {text.format('p', '[at]')};"
                               for number, text in enumerate(sums)]),
        store_scalars=_lines(8, [f"p{part}[at] = s{number};" for number, part in stores]))


def squares() -> str:
    """A kernel squares(values, out) for a grid of as many blocks as there are blocks of BLOCK values."""
    return SQUARES.format(threads=THREADS, block=order.BLOCK)


def _sum(leaf: range, first: int) -> str:
    """The additions of a leaf, with places for what stands before and after the number of a part.

    >>> _sum(range(4), 0).format("p", "[i]")
    '((p0[i] + p1[i]) + (p2[i] + p3[i]))'
    """
    terms = {rank: f"{{0}}{rank - first}{{1}}" for rank in leaf}
    for into, other in order.subtree(leaf.start, leaf.stop):
        terms[into] = f"({terms[into]} + {terms[other]})"
    return terms[leaf.start]


def _lines(indent: int, lines: Sequence[str]) -> str:
    return "\n".join(" " * indent + line for line in lines)
