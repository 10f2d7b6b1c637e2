"""What came out? Medians and ratios from the samples, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from bench.contenders import (
    CONTENDERS,
    Direct,
    HAProxy,
    OneHop,
    OneHopNative,
    OneHopUdp,
    TwoTranslators,
    TwoTranslatorsUdp,
)
from bench.measures import METHOD, Throughput
from bench.run import Plan, Results, Sample

REFERENCES = {"direct": Direct.name, "haproxy": HAProxy.name}
MISSING = "-"

Summary = dict[str, dict[str, float]]


def summarize(results: Results) -> Summary:
    """Per contender: medians of each figure and, for rates and `PAIRS`, the median ratios of pairs to the references."""
    summary: Summary = {kind.name: {} for kind in CONTENDERS}
    for measure, key, value in FIGURES:
        of_contender = results.samples.get(measure, {})
        for name, samples in of_contender.items():
            if found := [value(sample) for sample in samples if sample is not None]:
                summary[name][key] = statistics.median(found)
        if key in WITH_RATIO:
            for reference, reference_name in REFERENCES.items():
                _add_ratios(
                    summary, f"{key}_to_{reference}", of_contender, of_contender.get(reference_name), value
                )
        for pair in PAIRS:
            if pair.figure == key and pair.contender in of_contender:
                one = {pair.contender: of_contender[pair.contender]}
                _add_ratios(summary, pair.key, one, of_contender.get(pair.reference), value)
    return {name: figures for name, figures in summary.items() if figures}


def _add_ratios(
    summary: Summary,
    key: str,
    of_contender: dict[str, list[Sample | None]],
    reference: list[Sample | None] | None,
    value: Callable[[Any], float],
) -> None:
    """The median of value / value of the reference in the same round, where that is more than nothing."""
    for name, samples in of_contender.items():
        ratios = [
            value(a) / value(b)
            for a, b in zip(samples, reference or [], strict=False)
            if a is not None and b is not None and value(b) > 0
        ]
        if ratios:
            summary[name][key] = statistics.median(ratios)


# (measure, key in the summary, value of a sample)
FIGURES: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("throughput", "bits_per_s", lambda sample: sample.bits_per_s),
    ("throughput", "cpu_s_per_gb", lambda sample: sample.cpu_s_per_gb),
    ("shaped", "shaped_bits_per_s", lambda sample: sample.bits_per_s),
    ("shaped", "shaped_cpu_s_per_gb", lambda sample: sample.cpu_s_per_gb),
    ("short_connections", "short_connections_per_s", lambda sample: sample.per_s),
    ("short_connections", "short_connection_errors", lambda sample: sample.errors),
    ("latency", "p50_us", lambda sample: sample.p50_us),
    ("latency", "p99_us", lambda sample: sample.p99_us),
    ("memory", "pss_bytes_per_1000_pairs", lambda sample: sample.pss_bytes * 1000 / sample.pairs),
    ("memory", "slab_bytes_per_1000_pairs", lambda sample: sample.slab_bytes * 1000 / sample.pairs),
)
WITH_RATIO = frozenset({"bits_per_s", "shaped_bits_per_s", "short_connections_per_s"})


class Pair(NamedTuple):
    """A ratio of a figure that is wanted besides those of all contenders to `REFERENCES`."""

    figure: str
    contender: str
    reference: str
    word: str  # for the reference, in `key`

    @property
    def key(self) -> str:
        """Under which the contender's figures have it."""
        return f"{self.figure}_to_{self.word}"


PAIRS = (
    Pair("bits_per_s", TwoTranslatorsUdp.name, TwoTranslators.name, "sal"),
    Pair("bits_per_s", OneHopUdp.name, OneHop.name, "sal"),
    Pair("cpu_s_per_gb", OneHopNative.name, Direct.name, "direct"),
)

# (heading, key, format, factor)
COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("Gbit/s", "bits_per_s", ".2f", 1e-9),
    ("of direct", "bits_per_s_to_direct", ".2f", 1),
    ("of HAProxy", "bits_per_s_to_haproxy", ".2f", 1),
    ("CPU-s/GB", "cpu_s_per_gb", ".2f", 1),
    ("Mbit/s at 1 Gbit/s", "shaped_bits_per_s", ".1f", 1e-6),
    ("of direct", "shaped_bits_per_s_to_direct", ".4f", 1),
    ("short conn./s", "short_connections_per_s", ".0f", 1),
    ("of HAProxy", "short_connections_per_s_to_haproxy", ".2f", 1),
    ("errors", "short_connection_errors", ".0f", 1),
    ("p50 µs", "p50_us", ".0f", 1),
    ("p99 µs", "p99_us", ".0f", 1),
    ("PSS MB/1000 pairs", "pss_bytes_per_1000_pairs", ".1f", 1e-6),
    ("slab MB/1000 pairs", "slab_bytes_per_1000_pairs", ".1f", 1e-6),
)


def table(summary: Summary) -> Table:
    """One row per contender."""
    shown = Table("", title="Medians over rounds; ratios of pairs measured in the same round")
    for heading, *_ in COLUMNS:
        shown.add_column(heading, justify="right")
    for name, figures in summary.items():
        shown.add_row(
            name,
            *(
                format(figures[key] * factor, form) if key in figures else MISSING
                for _, key, form, factor in COLUMNS
            ),
        )
    return shown


def pair_sentences(summary: Summary) -> list[str]:
    """A line for each ratio of `PAIRS` that was measured."""
    headings = {key: heading for heading, key, *_ in COLUMNS}
    return [
        f"{headings[pair.figure]} of '{pair.contender}' to that of '{pair.reference}', median of pairs: "
        f"{summary[pair.contender][pair.key]:.2f}"
        for pair in PAIRS
        if pair.key in summary.get(pair.contender, {})
    ]


def write_json(
    path: Path,
    plan: Plan,
    machine: dict[str, object],
    results: Results,
    summary: Summary,
    others: Mapping[str, object],
) -> None:
    """Everything, raw samples included. `others`: figures that are not about contenders."""
    samples = {
        measure: {
            name: [sample and sample._asdict() for sample in taken] for name, taken in contenders.items()
        }
        for measure, contenders in results.samples.items()
    }
    document = {
        "plan": plan._asdict(),
        "machine": machine | {"idle_busy_share": results.idle_busy_share, "stolen_s": _stolen_s(results)},
        "method": METHOD,
        "absent": results.absent,
        "failures": results.failures,
        "summary": summary,
        "others": others,
        "samples": samples,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _stolen_s(results: Results) -> float:
    """CPU-seconds that the hypervisor gave to others during all streams."""
    contenders = [
        *results.samples.get("throughput", {}).values(),
        *results.samples.get("shaped", {}).values(),
    ]
    return sum(
        sample.stolen_s for samples in contenders for sample in samples if isinstance(sample, Throughput)
    )


def write_plot(path: Path, summary: Summary) -> None:
    """One bar chart per figure that matters."""
    from matplotlib.figure import Figure

    charts = [column for column in COLUMNS if column[0] not in ("of direct", "of HAProxy", "errors")]
    figure = Figure(figsize=(18, 7), layout="constrained")
    for axes, (heading, key, form, factor) in zip(figure.subplots(2, 4).flat, charts, strict=True):
        names = [name for name in summary if key in summary[name]]
        bars = axes.barh(names, [summary[name][key] * factor for name in names])
        axes.bar_label(bars, fmt=f"{{:{form}}}", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(heading)
    figure.savefig(path, dpi=110)
