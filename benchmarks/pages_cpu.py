"""The README's tables of a CPU: what stands in which cell, and the sentences that have figures."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pages_records import (
    absent,
    baseline,
    case_of,
    cases_of,
    mib,
    ours,
    paragraph,
    percent,
    ratio,
    setting,
    table,
    times,
    timing_of,
)

FIRST = 0  # the timing with the check of the first batch

FISHER = {
    "MLP 784-1024-1024-10": "MLP 784-1024-1024-10; 8 batches of 256",
    "ViT 32x32, d 192, 6 layers": "ViT 32x32, patch 4, d 192, 6 layers; 8 batches of 16",
    "ViT-Ti/16 224x224": "ViT 224x224, patch 16, d 192, 12 layers; 4 batches of 8",
    "GPT, d 512, 6 layers, T 128, tied head": "GPT d 512, 6 layers, V 8192, T 128; 2 batches of 8",
    "ResNet-18 32x32": "ResNet-18 32x32; 4 batches of 32",
}
FISHER_COLUMNS = {
    "BackPACK": "BackPACK",
    "opacus": "opacus",
    "`torch.func`": "torch.func",
    "one example at a time": "one-example loop",
}


class Plan(NamedTuple):
    """A table of ratios to our time."""

    columns: dict[str, dict[str, str]]  # title -> timing -> what stands before its figure
    memory: tuple[str, ...]  # timings: the first that a case has is set beside ours
    rows: dict[str, str]  # title -> case


EAGER = ("log_softmax, gather", "log_softmax, gather, sum", "kl_div of log_softmaxes")
RELEASED_LOSSES = ("released softmax, NLL", "released")
LOSSES = Plan(
    columns={
        "eager torch": dict.fromkeys(EAGER, ""),
        "`torch.compile`": {"torch.compile": ""},
        "released form": dict.fromkeys(RELEASED_LOSSES, ""),
    },
    memory=(*EAGER, *RELEASED_LOSSES),
    rows={
        "`token_logprobs` [512, 32000], forward and backward": "token_logprobs [512, 32000] float32",
        "the same, backward in place": "token_logprobs [512, 32000] float32, in-place backward",
        "the same, bfloat16, backward in place": "token_logprobs [512, 32000] bfloat16, in-place backward",
        "[128, 128256], backward in place": "token_logprobs [128, 128256] float32, in-place backward",
        "the same, bfloat16": "token_logprobs [128, 128256] bfloat16, in-place backward",
        "the same, bfloat16, softcap 30": "token_logprobs [128, 128256] bfloat16, softcap 30, in-place backward",
        "`token_statistics` [128, 128256]": "token_statistics [128, 128256] float32",
        "`token_kl` [128, 128256]": "token_kl [128, 128256] float32",
        "`flat_loss` 2 x [4, 65, 32000]": "flat_loss 2 x [4, 65, 32000] float32, released formulation",
    },
)

RELEASED_LOOPS = ("released loop", "argsort twice", "released loop, a copy a point")
OTHERS = {
    "one tensor": "one tensor of 1M",
    "a copy, dampen_, copied back": "a copy, and back",
    "numpy.percentile": "`numpy.percentile`",
    "torch.sort": "`torch.sort`",
    "one comparison an alpha": "one comparison an alpha",
    "torch.topk": "`torch.topk`",
}
SMALL_TENSORS = "dampen_ 400 x [2500] float32, small tensors"
DAMPENING = Plan(
    columns={
        "released form": dict.fromkeys(RELEASED_LOOPS, ""),
        "`torch.compile`": {"torch.compile": "", "torch.compile of one tensor": "joined to one tensor"},
        "others": OTHERS,
    },
    memory=(*RELEASED_LOOPS, *OTHERS),
    rows={
        "`dampen_`, 25 % selected, evenly": "dampen_ [64000000] float32, 0.25 selected",
        "0.1 % selected, evenly": "dampen_ [64000000] float32, 0.001 selected",
        "bfloat16 parameters, 25 % selected": "dampen_ [64000000] bfloat16, 0.25 selected",
        "400 tensors, all selected in 5 % of them": (
            "dampen_ 400 x [160000] float32, all selected in 5 % of the tensors"
        ),
        "400 tensors of 2500": SMALL_TENSORS,
        "`dampen_` and `undo_`, 400 tensors": (
            "undo_ 400 x [160000] float32, dampen_ and undo_, all selected in 5 % of the tensors"
        ),
        "`alpha_for_percentile`, 100M ratios": "alpha_for_percentile [100000000] float32",
        "`selection_curve`, 100 alphas": "selection_curve [64000000], 100 alphas float32",
        "`top_fraction_mask`, 16M scores": "top_fraction_mask [16000000] float32",
        "`sweep`, 100 settings of a ResNet-18": "sweep ResNet-18 width 64, 10x10 points float32",
    },
)

PRODUCTS = "three bare products"
LINEAR = {
    f"{prefix}{suffix}": f"{case} {dtype}"
    for prefix, case in {
        "`linear_flat_loss`": "linear_flat_loss 2 x [8, 129, 1024] x [50257, 1024]",
        "`linear_cross_entropy`": "linear_cross_entropy [2048, 1024] x [50257, 1024]",
    }.items()
    for suffix, dtype in {", float32": "float32", ", bfloat16": "bfloat16"}.items()
}
LINEAR_COLUMNS = {
    "ours": "ours",
    "chunks in plain torch": "chunked torch",
    "torch's `linear_cross_entropy`": "torch's",
    "all logits at once": "reference",
}
LINEAR_MEMORY = ("ours", "chunked torch", "torch's")


def fisher(record: dict[str, Any], link: str) -> str:
    """In units of one ordinary forward and backward, and what the check and the errors came to."""
    found = {title: case_of(record, f"diagonal_fisher {shape} float32") for title, shape in FISHER.items()}
    header = ["", "ours", *FISHER_COLUMNS, "memory, ours", "importance"]
    rows = [
        [
            f"{title}, batch {case['batch_size']}",
            times(ratio(ours(case), baseline(case))),
            *(_of_library(case, name) for name in FISHER_COLUMNS.values()),
            f"+{mib(_beyond_ordinary(case))} MiB",
            f"{mib(case['importance_bytes'])} MiB",
        ]
        for title, case in found.items()
    ]
    checks = [(c["timings"][FIRST]["ms"] - ours(c)["ms"]) * c["batches"] / baseline(c)["ms"] for c in found.values()]
    # A note tells that rounding alone exceeds the tolerance there, and what float64 gives.
    plain = max(c["timings"][FIRST]["error"] for c in found.values() if not c["timings"][FIRST]["note"])
    text = (
        f"Once a measurement, the check of the first batch comes on top, here at most {times(max(checks))} of the unit."
    )
    text += f" The largest error of a parameter, against single examples in float64, is {plain:.0e}"
    for title, case in found.items():
        if case["timings"][FIRST]["note"]:
            text += f"; of {title} {case['timings'][FIRST]['error']:.0e}, and {case['timings'][FIRST]['note']}"
            text += f" (single examples in float32: {timing_of(case, 'one-example loop')['error']:.0e})"
    return _block(table(header, rows), f"{text}.", setting(record, link))


def _of_library(case: dict[str, Any], start: str) -> str:
    timing = timing_of(case, start)
    if timing["failure"]:
        return "wrong" if timing["failure"].startswith("wrong") else "not installed" if absent(timing) else "fails"
    return times(ratio(timing, baseline(case))) + (", partial" if timing["missing"] else "")


def _beyond_ordinary(case: dict[str, Any]) -> int:
    """The larger of two batch sizes."""
    pairs = zip(case["timings"][FIRST]["peaks_bytes"], baseline(case)["peaks_bytes"], strict=True)
    return max(own - base for own, base in pairs)


def losses(record: dict[str, Any], link: str) -> str:
    return _block(_ratios(record, LOSSES, "eager"), setting(record, link))


def dampening(record: dict[str, Any], link: str) -> str:
    """With what a small tensor costs: what of the time of many does not go away where they are one."""
    case = case_of(record, SMALL_TENSORS)
    many = int(case["shape"].partition(" x ")[0])
    named = {timing["name"]: timing["ms"] for timing in case["timings"]}
    dispatcher = named["the operator alone"] - named["one tensor, the operator alone"]
    checks = named["ours"] - named["one tensor"] - dispatcher
    text = (
        f"A small tensor costs {1e3 * dispatcher / many:.1f} microseconds in torch's dispatcher and"
        f" {1e3 * checks / many:.1f} in our checks, whatever its size."
    )
    return _block(_ratios(record, DAMPENING, "rival"), text, setting(record, link))


def _ratios(record: dict[str, Any], plan: Plan, rival: str) -> str:
    header = ["", *plan.columns, f"extra memory, ours / {rival}", "of the ceiling"]
    rows = []
    for title, wanted in plan.rows.items():
        case = case_of(record, wanted)
        cells = [_others(case, names) for names in plan.columns.values()]
        rows.append([title, *cells, _memory(case, plan.memory), percent(ours(case)["share_of_ceiling"])])
    return table(header, rows)


def _others(case: dict[str, Any], names: Mapping[str, str]) -> str:
    """Their times over ours, each after its label."""
    cells = []
    for timing in case["timings"]:
        if timing["name"] in names and not absent(timing):
            figure = "fails" if timing["failure"] else times(ratio(timing, ours(case)))
            cells.append(f"{names[timing['name']]} {figure}".strip())
    return "; ".join(cells)


def _memory(case: dict[str, Any], names: tuple[str, ...]) -> str:
    weighed = {timing["name"]: timing["peak_bytes"] for timing in case["timings"]}
    sizes = [weighed["ours"], *(weighed[name] for name in names if weighed.get(name) is not None)]
    return " / ".join(mib(size) for size in sizes[:2]) + " MiB"


def linear_losses(record: dict[str, Any], link: str) -> str:
    """In units of the three products; memory beyond the gradients, in units of all logits."""
    rows = []
    for title, wanted in LINEAR.items():
        case = case_of(record, wanted)
        named = {timing["name"]: timing for timing in case["timings"]}
        cells = [times(ratio(named.get(name), named[PRODUCTS])) for name in LINEAR_COLUMNS.values()]
        shares = [_of_logits(case, named[name]) for name in LINEAR_MEMORY if name in named]
        rows.append([title, *cells, " / ".join(shares)])
    (twice,) = (case for case in cases_of(record) if case["operator"] == "linear_token_logprobs")
    speed = ratio(timing_of(twice, "torch.compile"), ours(twice))
    text = (
        "`linear_token_logprobs`, for losses of your own, computes the logits twice: it saves memory, not time"
        f" ({times(speed)} of `torch.compile`'s speed)."
    )
    header = ["", *LINEAR_COLUMNS, "memory, ours / chunks / torch's"]
    return _block(table(header, rows), text, setting(record, link))


def _of_logits(case: dict[str, Any], timing: dict[str, Any]) -> str:
    share = (timing["peak_bytes"] - case["result_bytes"]) / case["logits_bytes"]
    return f"{share * 100:.1f} %" if share < 0.1 else percent(share)


def _block(rows: str, *texts: str) -> str:
    return "\n\n".join([rows, *map(paragraph, texts)])


WRITERS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "fisher": fisher,
    "losses": losses,
    "linear losses": linear_losses,
    "dampening": dampening,
}
