"""The cases of the timing model: the design's table, and the graphs of the papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.timing import AWS, LOCAL, Case, Place, name_of

Graph = dict[str, Sequence[str]]
SMALL = 100.0
MB = 1e6


def case(
    name: str,
    graph: Graph,
    outputs: Sequence[str],
    seconds: float | Mapping[str, float],
    size: float | Mapping[str, float] = SMALL,
    place: Place = AWS,
    *,
    blind: bool = True,
) -> Case:
    """A case whose tasks take the same if they are called the same."""
    return Case(name, graph, outputs, _by_name(seconds), _by_name(size), place, blind)


def _by_name(figures: float | Mapping[str, float]) -> Callable[[str], float]:
    if isinstance(figures, Mapping):
        return lambda key: figures[name_of(key)]
    return lambda key: figures


def independent(count: int) -> tuple[Graph, list[str]]:
    """A map without an end."""
    keys = [f"map-{i}" for i in range(count)]
    return dict.fromkeys(keys, ()), keys


def fork_joins(stages: int, width: int) -> tuple[Graph, list[str]]:
    """One to many to one, again and again."""
    graph: Graph = {"join-0": ()}
    for stage in range(1, stages + 1):
        forks = [f"fork-{stage}-{i}" for i in range(width)]
        graph.update(dict.fromkeys(forks, (f"join-{stage - 1}",)))
        graph[f"join-{stage}"] = forks
    return graph, [f"join-{stages}"]


def tree(leaves: int) -> tuple[Graph, list[str]]:
    """A binary reduction of tasks."""
    level = [f"leaf-{i}" for i in range(leaves)]
    graph: Graph = dict.fromkeys(level, ())
    depth = 0
    while len(level) > 1:
        depth += 1
        above = [f"add-{depth}-{i}" for i in range(len(level) // 2)]
        graph.update({key: level[2 * i : 2 * i + 2] for i, key in enumerate(above)})
        level = above + level[2 * len(above) :]
    graph["total-0"] = level
    return graph, ["total-0"]


def gemm(blocks: int) -> tuple[Graph, list[str]]:
    """Two matrices of random blocks, multiplied, and the product summed."""
    graph: Graph = {}
    sums = []
    for i in range(blocks):
        for j in range(blocks):
            products = []
            for k in range(blocks):
                graph.setdefault(f"random-x-{i}-{k}", ())
                graph.setdefault(f"random-y-{k}-{j}", ())
                graph[f"matmul-{i}-{j}-{k}"] = (f"random-x-{i}-{k}", f"random-y-{k}-{j}")
                products.append(f"matmul-{i}-{j}-{k}")
            graph[f"add-{i}-{j}"] = products
            graph[f"chunk-{i}-{j}"] = (f"add-{i}-{j}",)
            sums.append(f"chunk-{i}-{j}")
    graph["sum-0"] = sums
    return graph, ["sum-0"]


def tsqr(blocks: int) -> tuple[Graph, list[str]]:
    """QR of a tall matrix: a tree of small factors, and the large ones multiplied by it."""
    graph: Graph = {}
    for i in range(blocks):
        graph[f"random-{i}"] = ()
        graph[f"qr-{i}"] = (f"random-{i}",)
        graph[f"r-{i}"] = (f"qr-{i}",)
        graph[f"q-{i}"] = (f"qr-{i}",)
    graph["stack-0"] = [f"r-{i}" for i in range(blocks)]
    graph["inner-0"] = ("stack-0",)
    for i in range(blocks):
        graph[f"part-{i}"] = ("inner-0",)
        graph[f"dot-{i}"] = (f"q-{i}", f"part-{i}")
        graph[f"norm-{i}"] = (f"dot-{i}",)
    graph["total-0"] = [f"norm-{i}" for i in range(blocks)]
    return graph, ["total-0"]


def chain(length: int) -> tuple[Graph, list[str]]:
    """One after the other."""
    graph: Graph = {"link-0": ()}
    graph.update({f"link-{i}": (f"link-{i - 1}",) for i in range(1, length)})
    return graph, [f"link-{length - 1}"]


def rooted(width: int) -> tuple[Graph, list[str]]:
    """One to many to one."""
    return fork_joins(1, width)


GEMM_SECONDS = {"random": 0.002, "matmul": 0.005, "add": 0.004, "chunk": 0.001, "sum": 0.001}
GEMM_BYTES = {"random": 2 * MB, "matmul": 2 * MB, "add": 2 * MB, "chunk": SMALL, "sum": SMALL}
TSQR_SECONDS = {
    "random": 0.05, "qr": 0.3, "r": 1e-5, "q": 1e-5, "stack": 0.001, "inner": 0.05,
    "part": 1e-5, "dot": 0.1, "norm": 0.001, "total": 0.001,
}  # fmt: skip
TSQR_BYTES = {
    "random": 16 * MB, "qr": 16 * MB, "r": 0.3 * MB, "q": 16 * MB, "stack": 6 * MB,
    "inner": 6 * MB, "part": 0.3 * MB, "dot": 16 * MB, "norm": SMALL, "total": SMALL,
}  # fmt: skip

TABLE = [
    case("1,000 × 1 ms", *independent(1000), 0.001),
    case("1,000 × 60 ms", *independent(1000), 0.06),
    case("10 × fork-join of 100 × 60 ms", *fork_joins(10, 100), {"fork": 0.06, "join": 0.001}),
    case("10 × fork-join of 100 × 2 ms", *fork_joins(10, 100), {"fork": 0.002, "join": 0.001}),
    case("tree reduction 1,024, 100 ms", *tree(512), 0.1),
    case(
        "16 × 100 MB, tree, blind",
        *tree(16),
        0.03,
        {"leaf": 100 * MB, "add": 100 * MB, "total": SMALL},
    ),
    case(
        "16 × 400 MB, tree, blind",
        *tree(16),
        {"leaf": 0.25, "add": 0.003, "total": 0.003},
        {"leaf": 400 * MB, "add": 400 * MB, "total": SMALL},
    ),
    case("GEMM 8×8 blocks, 2 slots", *gemm(8), GEMM_SECONDS, GEMM_BYTES, LOCAL),
    case("GEMM 8×8 blocks, AWS", *gemm(8), GEMM_SECONDS, GEMM_BYTES),
    case("TSQR 20 blocks, AWS", *tsqr(20), TSQR_SECONDS, TSQR_BYTES),
    case("TSQR 20 blocks, 2 slots", *tsqr(20), TSQR_SECONDS, TSQR_BYTES, LOCAL),
    case("map of 10,000 × 1 s", *independent(10_000), 1.0),
    case("1 → 10,000 → 1, 100 ms", *rooted(10_000), {"fork": 0.1, "join": 0.001}),
    case("tree reduction 1,024, no-op", *tree(512), 1e-6),
    case("tree reduction 1,024, no-op, 2 slots", *tree(512), 1e-6, SMALL, LOCAL),
    case("tree reduction 1,024, 500 ms", *tree(512), 0.5),
    case("tree reduction 1,024, 1 ms, 2 slots", *tree(512), 0.001, SMALL, LOCAL),
    case("chain of 1,000 × 1 ms", *chain(1000), 0.001),
]
