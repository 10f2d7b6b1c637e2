"""What did the throughput look like over time? The plots that the prototype's authors showed, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lab.arrivals import Arrivals

BIN_S = 0.1


class Period(NamedTuple):
    """From when until when, seconds of the wall clock, and what happened in it, by time."""

    began: float
    ended: float
    moments: Mapping[float, str]


def write_plot(path: Path, title: str, arrivals: Arrivals, ports: Mapping[str, int], period: Period) -> None:
    """One line per download, by name, and their sum where there are several."""
    from matplotlib.figure import Figure

    lines = {name: _rates(arrivals, port, period) for name, port in ports.items()}
    if len(lines) > 1:
        lines["together"] = [sum(rates) for rates in zip(*lines.values(), strict=True)]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rates in lines.items():
        style: dict[str, Any] = {"color": "0.7", "zorder": 1} if name == "together" else {}
        axes.plot([at * BIN_S for at in range(len(rates))], [each / 1e6 for each in rates], label=name, **style)
    for number, what in enumerate(dict.fromkeys(period.moments.values())):
        times = [at - period.began for at, kind in period.moments.items() if kind == what]
        axes.vlines(times, 0, 1, transform=axes.get_xaxis_transform(), color=f"C{number + len(ports)}", ls=":", label=what)
    axes.set(title=title, xlabel="seconds", ylabel="Mbit/s at the client", xlim=(0, period.ended - period.began))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _rates(arrivals: Arrivals, port: int, period: Period) -> list[float]:
    return arrivals.to(port).rates(period.began, period.ended, BIN_S)
