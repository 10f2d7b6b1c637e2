"""Are medians and ratios of pairs computed from the rounds as the report says, with failed rounds left out?"""

from __future__ import annotations

import json
from pathlib import Path

from bench.contenders import Direct, HAProxy, OneHopNative, TwoTranslators, TwoTranslatorsUdp
from bench.measures import IdleMemory, Requests, Throughput
from bench.report import pair_sentences, summarize, table, write_json, write_plot
from bench.run import QUICK, Results


def results() -> Results:
    found = Results(absent={"socat": "socat is not installed"}, failures=["one"], idle_busy_share=0.5)
    rounds: dict[str, list[float | None]] = {
        Direct.name: [10e9, 20e9, 40e9],
        HAProxy.name: [5e9, None, 10e9],
        TwoTranslators.name: [4e9, 10e9, 5e9],
    }
    for name, rates in rounds.items():
        for rate in rates:
            sample = None if rate is None else Throughput(rate, 2_000_000_000, cpu_s=3.0, stolen_s=0.25)
            found.add("throughput", name, sample)
    found.add("short_connections", HAProxy.name, Requests(1000.0, 0, 10, 20))
    found.add("short_connections", TwoTranslators.name, Requests(250.0, 3, 40, 80))
    found.add("latency", TwoTranslators.name, None)
    found.add("memory", Direct.name, IdleMemory(200, 1_000, 400_000))
    return found


def test_medians_and_ratios_of_the_same_round() -> None:
    summary = summarize(results())
    assert summary[Direct.name]["bits_per_s"] == 20e9
    assert summary[HAProxy.name]["bits_per_s"] == 7.5e9
    assert summary[TwoTranslators.name]["bits_per_s"] == 5e9
    # Rounds: 4/10, 10/20, 5/40 of direct; HAProxy has no second round to compare with.
    assert summary[TwoTranslators.name]["bits_per_s_to_direct"] == 0.4
    assert summary[TwoTranslators.name]["bits_per_s_to_haproxy"] == (4 / 5 + 5 / 10) / 2
    assert summary[TwoTranslators.name]["cpu_s_per_gb"] == 1.5
    assert summary[TwoTranslators.name]["short_connections_per_s_to_haproxy"] == 0.25
    assert summary[TwoTranslators.name]["short_connection_errors"] == 3
    assert "p50_us" not in summary[TwoTranslators.name]
    assert summary[Direct.name]["slab_bytes_per_1000_pairs"] == 2_000_000


def test_the_ratios_that_are_asked_for_are_of_pairs_too() -> None:
    found = results()
    for rate in (3e9, 5e9, 4e9):
        found.add("throughput", TwoTranslatorsUdp.name, Throughput(rate, 2_000_000_000, 3.0, 0.0))
    # The first reference took no CPU time beyond the idle machine's share, as it seems: no ratio.
    of_cpu = Results()
    for direct_cpu_s, hop_cpu_s in ((0.0, 1.0), (2.0, 1.0), (4.0, 3.0), (4.0, 8.0)):
        of_cpu.add("throughput", Direct.name, Throughput(1e9, 1_000_000_000, direct_cpu_s, 0.0))
        of_cpu.add("throughput", OneHopNative.name, Throughput(1e9, 1_000_000_000, hop_cpu_s, 0.0))
    rates, cpu = summarize(found), summarize(of_cpu)
    assert rates[TwoTranslatorsUdp.name]["bits_per_s_to_sal"] == 0.75
    assert cpu[OneHopNative.name]["cpu_s_per_gb_to_direct"] == 0.75
    assert pair_sentences(rates) == [
        "Gbit/s of 'two translators, udp' to that of 'two translators', median of pairs: 0.75"
    ]
    assert pair_sentences(cpu) == [
        "CPU-s/GB of 'one hop, native' to that of 'direct TCP', median of pairs: 0.75"
    ]
    assert pair_sentences(summarize(results())) == []


def test_the_table_has_a_row_for_each_contender_that_was_measured() -> None:
    assert table(summarize(results())).row_count == 3


def test_json_and_picture_hold_everything(tmp_path: Path) -> None:
    found = results()
    summary = summarize(found)
    write_json(tmp_path / "r.json", QUICK, {"kernel": "6"}, found, summary, {"service_table": {"prefixes": 9}})
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["machine"] == {"kernel": "6", "idle_busy_share": 0.5, "stolen_s": 2.0}
    assert document["samples"]["throughput"][HAProxy.name][1] is None
    assert document["samples"]["throughput"][HAProxy.name][2]["bits_per_s"] == 10e9
    assert document["absent"] == {"socat": "socat is not installed"}
    assert document["failures"] == ["one"]
    assert document["others"] == {"service_table": {"prefixes": 9}}
    assert document["summary"] == summary
    write_plot(tmp_path / "r.png", summary)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
