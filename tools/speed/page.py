"""docs/speed.md: the tables that stand between its markers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.measure import markdown_table
from benchmarks.workloads import SHAPES, HeadMask, Workload
from tools.speed import rates
from tools.speed.comparison import falsifiers
from tools.speed.kernels import (
    GPUS,
    HEAD_DIMS,
    PACKAGES,
    Kernel,
    costs_of,
    heads_per_key_head,
    kernel,
    kernels,
)
from tools.speed.loops import waits
from tools.speed.prediction import LOSSES, Prediction
from tools.speed.whole import predict_whole

PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"

MASKS = ("DENSE", "SINK", "INTRA_IMAGE", "INTRA_IMAGE_SINK", "cut 32 %", "cut 36 %", "cut 41 %")
THOUSANDS = (36, 75, 150, 300)

Predict = Callable[[Workload, HeadMask, str, str], Prediction]


def inputs_table() -> str:
    """The rates of every GPU."""
    rows = []
    for gpu in ("a100", "l40s", "h100", "h200", "b200"):
        own = rates.rates_of(gpu)
        rows.append(
            (
                gpu.upper(),
                str(own.multiprocessors),
                f"{own.clock / 1e9:.2f}",
                str(own.tensor),
                f"{own.l2:.1f}",
                f"{own.memory:.1f}",
            )
        )
    per_cycle = ("tensor FLOPs per cycle", "bytes per cycle from L2", "bytes per cycle from memory")
    return markdown_table(("GPU", "multiprocessors", "clock, GHz", *per_cycle), rows)


def loops_table() -> str:
    """What blocks and programs of every kernel cost."""
    rows = []
    for gpu in GPUS:
        for head_dim in HEAD_DIMS:
            for package in PACKAGES:
                each = kernel(package, gpu, head_dim, sparse=True)
                rows.append((gpu.upper(), str(head_dim), package.capitalize(), *_costs(each, gpu)))
    header = ["GPU", "head dim", "kernel", "block, warps, stages", "products", "waits for copies"]
    header += ["full", "partial", "program", "at a time", "TFLOP/s", "of the data sheet's"]
    return markdown_table(tuple(header), rows)


def _costs(each: Kernel, gpu: str) -> tuple[str, ...]:
    costs = costs_of(each, gpu, heads_per_key_head(each.head_dim))
    own = rates.rates_of(gpu)
    chosen = each.chosen
    flops = 4 * chosen.block_q * chosen.block_kv * each.head_dim
    per_second = flops / costs.full * costs.speed * own.multiprocessors * own.clock
    peak = own.tensor * own.multiprocessors * own.clock
    return (
        f"{chosen.block_q} x {chosen.block_kv}, {chosen.num_warps}, {chosen.num_stages}",
        f"{each.full.flops / flops:.2g}",
        f"{waits(each.full, chosen.num_warps, own) / costs.full:.0%}",
        f"{costs.full:,.0f}",
        f"{costs.partial:,.0f}",
        f"{costs.program:,.0f}",
        f"{costs.speed:.2g}",
        f"{per_second / 1e12:.0f}",
        f"{per_second / peak:.0%}",
    )


def predictions_table(
    predict: Predict,
    image_tokens: int,
    gpu: str = "h200",
    thousands: Sequence[int] = THOUSANDS,
    masks: Sequence[str] = MASKS,
    shape: str = "qwen2.5-vl-7b",
) -> str:
    """Time, speed-up and losses for every mask, length and kernel on one GPU."""
    rows = []
    for count in thousands:
        workload = Workload(SHAPES[shape], 1024 * count, image_tokens)
        for package in PACKAGES:
            dense = 0.0
            for mask in workload.masks(masks):
                found = predict(workload, mask, package, gpu)
                dense = found.seconds if mask.is_dense else dense
                flops = workload.flops(workload.visible_pairs(mask))
                ideal, speedup = workload.dense_flops / flops, dense / found.seconds
                rows.append(
                    (
                        f"{count}K",
                        package.capitalize(),
                        mask.name,
                        f"{1e3 * found.seconds:.2f}",
                        f"{flops / found.seconds / 1e12:.0f}",
                        f"{speedup:.2f}",
                        f"{ideal:.2f}",
                        f"{speedup / ideal:.0%}",
                        *(f"{abs(part) / found.seconds:.1%}" for part in found[1:]),
                    )
                )
    header = ("tokens", "kernel", "heads", "ms", "TFLOP/s", "dense / this", "ideal", "of ideal")
    return markdown_table((*header, *LOSSES), rows)


def gpus_table(predict: Predict, image_tokens: int, gpus: Iterable[str]) -> str:
    """Speed-ups over own dense of the other GPUs."""
    rows = []
    for gpu in gpus:
        for package in PACKAGES:
            cells: dict[str, list[str]] = {}
            for count in THOUSANDS:
                workload = Workload(SHAPES["qwen2.5-vl-7b"], 1024 * count, image_tokens)
                dense = 0.0
                for name in MASKS:
                    (mask,) = workload.masks([name])
                    seconds = predict(workload, mask, package, gpu).seconds
                    dense = seconds if mask.is_dense else dense
                    cell = f"{1e3 * seconds:.2f} ({dense / seconds:.2f})"
                    cells.setdefault(name, []).append(cell)
            rows += [(gpu.upper(), package.capitalize(), *cell) for cell in cells.items()]
    flat = [(gpu, package, name, *cell) for gpu, package, name, cell in rows]
    return markdown_table(("GPU", "kernel", "heads", *(f"{each}K" for each in THOUSANDS)), flat)


def write_page(page: Path = PAGE) -> None:
    """Puts all tables between their markers."""
    from tools.speed.chunks import predict_chunks

    versions, _ = kernels()
    tables = {
        "inputs": inputs_table(),
        "loops": loops_table()
        + "\n\nCompiled with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "whole": predictions_table(predict_whole, 400),
        "chunks": predictions_table(predict_chunks, 1000),
        "falsifiers": falsifiers(),
        "gpus": gpus_table(predict_whole, 400, ("a100", "l40s", "b200")),
    }
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = with_table(text, name, table)
    page.write_text(text, encoding="utf-8")


def with_table(text: str, name: str, table: str) -> str:
    """The page with another table between the markers of this name.

    Raises:
      ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name}: generated -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"The page has no markers {begin.strip()} and {end}.")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n\n{end}{after}"
