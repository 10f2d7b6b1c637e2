"""What would the service table say to a packet for this serviceID, and why? Changes and counts nothing.

The answer is made for people: which prefixes cover the serviceID and which decides, what stands there by
priority, with which probability each target is drawn, who is passed over for what reason, and the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

from serval_core.names import ServiceID, format_address
from serval_core.rules import RuleType
from serval_core.selection import Target, TargetSet
from serval_core.service_entry import Entry, describe, target_snapshot


def explain(service_id: ServiceID, covering: Sequence[Entry], now: float | None = None) -> dict[str, object]:
    """Explain a resolution. `covering`: the entries that cover the serviceID, longest prefix first.

    With `now`, targets that are down say for how many seconds more ("down_for_s").
    """
    lookup = [
        {"prefix": str(entry.prefix), "bits": entry.prefix.bits, "decides": number == 0}
        for number, entry in enumerate(covering)
    ]
    known: dict[str, object] = {
        "service": service_id.text,
        "service_id": service_id.hex_text,
        "lookup": lookup,
    }
    if not covering:
        why = "no rule covers the service, and there is no default rule"
        return {**known, "prefix": None, "sets": [], "verdict": None, "targets": [], "why": why}
    entry = covering[0]
    used, even_marked = _used_set(entry)
    candidates = [] if used is None else list(used.candidates((), even_marked))
    verdict = candidates[0].type.name if candidates else None
    sets = [_set(each, candidates if each is used else [], each is used, now) for each in entry.sets]
    return {
        **known,
        "prefix": str(entry.prefix),
        "sets": sets,
        "verdict": verdict,
        "targets": [_goal(each) for each in candidates],
        "why": _why(entry, used, candidates, even_marked),
    }


def _used_set(entry: Entry) -> tuple[TargetSet | None, bool]:
    """The set that decides, and whether it does although all its targets are down (`ServiceTable.resolve`)."""
    skipped = False
    for target_set in entry.sets:
        candidates = target_set.candidates((), False)
        if candidates and not (skipped and candidates[0].type is RuleType.DROP):
            return target_set, False
        skipped = skipped or target_set.marked > 0
    return (entry.sets[0] if entry.sets else None), True


def _set(
    target_set: TargetSet, candidates: Sequence[Target], used: bool, now: float | None
) -> dict[str, object]:
    total = sum(each.weight for each in candidates)
    targets = []
    for target in target_set.targets:
        row = target_snapshot(target)
        chosen = target in candidates
        if chosen:
            row["probability"] = 1.0 if target_set.broadcast else target.weight / total
        else:
            row["probability"] = 0.0
        if target.mark is not None and now is not None:
            row["down_for_s"] = round(max(0.0, target.mark.until - now), 3)
        targets.append(row)
    return {
        "priority": target_set.priority,
        "broadcast": target_set.broadcast,
        "used": used,
        "targets": targets,
    }


def _goal(target: Target) -> str:
    if target.type is RuleType.FORWARD:
        return format_address(target.address)
    return f"listener {target.listener_id}" if target.type is RuleType.DEMUX else target.type.name


def _why(entry: Entry, used: TargetSet | None, candidates: Sequence[Target], even_marked: bool) -> str:
    if used is None or not candidates:
        return f"{entry.prefix} has no target"
    first = candidates[0]
    where = f"{entry.prefix} is the longest prefix that covers it"
    if first.type is RuleType.DROP:
        return f"{where}, and its DROP rule refuses the service"
    if first.type is RuleType.DELAY:
        return f"{where}, and its DELAY rule makes packets wait for a resolver"
    if even_marked:
        return f"{where}; all its targets are down, so they are used all the same"
    if used is not entry.sets[0]:
        return f"{where}; no target of higher priority than {used.priority} is alive"
    if used.broadcast:
        return f"{where}; everybody on {len(candidates)} network(s) is asked at once"
    if len(candidates) > 1:
        passed_over = len(used.targets) - len(candidates)
        others = f" ({passed_over} passed over, being down)" if passed_over else ""
        return f"{where}; one of {len(candidates)} targets is drawn by weight{others}"
    return f"{where}, with {describe(first)} at priority {used.priority}"
