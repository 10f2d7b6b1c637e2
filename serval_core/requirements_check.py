"""What does this machine lack for the stack to run, and what does the operator do about it?

`check_requirements` asks `kernel_probes` what works and turns the answers into findings with a remedy. The
`judge_...` functions hold the judgement: observed values in, finding out. Advice comes from `tuning_check`.
"""

from __future__ import annotations

import errno
import importlib
import ipaddress
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from serval_core import kernel_probes, tuning_check
from serval_core.errors import ServalError
from serval_core.findings import KERNEL_ADVISED, REBUILD, Finding, Plan, Severity, gist, grant
from serval_core.wire.sal import PROTOCOL_SAL

DATA_PLANE_DIRECTORY = Path(__file__).parent / "dataplane"
REQUIRED_EXTENSIONS = (
    "serval_core.dataplane.bpf_loader",
    "serval_core.dataplane.packet_socket",
    "serval_core.dataplane.tcp_repair",
)
# A route shorter than this, such as a default route, does not mean that somebody uses addresses of ours.
SHORTEST_CLAIM_BITS = 8


def check_requirements(plan: Plan | None = None) -> list[Finding]:
    """Probe this machine in the network namespace of the caller: required things first. Takes about a second.

    Leaves nothing behind. Findings that need a privilege the caller lacks are reported as not ok.
    """
    plan = plan or Plan()
    capabilities = kernel_probes.effective_capabilities()
    namespace = kernel_probes.probe_in_own_namespace()
    findings = [
        *judge_capabilities(capabilities),
        judge_extensions(import_errors(REQUIRED_EXTENSIONS)),
        judge_bpf_objects(DATA_PLANE_DIRECTORY / "bpf"),
        *_check_bpf(capabilities),
        judge_errno(
            "TCP_REPAIR",
            kernel_probes.try_tcp_repair(),
            "sockets that start in ESTABLISHED",
            "use a kernel with CONFIG_CHECKPOINT_RESTORE=y (Debian's have it)",
        ),
        judge_errno(
            f"raw socket, protocol {PROTOCOL_SAL}",
            kernel_probes.try_raw_socket(),
            "control packets of the SAL",
            "use a kernel with raw IPv4 sockets",
            capability="CAP_NET_RAW",
        ),
        *judge_namespace(namespace),
        *_check_virtual_network(),
        *tuning_check.check_tuning(plan),
    ]
    return sorted(findings, key=lambda finding: finding.severity is not Severity.REQUIRED)


def judge_errno(
    name: str, code: int, needed: str, remedy: str, *, capability: str = "CAP_NET_ADMIN"
) -> Finding:
    """A probe that must work. `remedy` is for a kernel that cannot; a missing privilege has its own."""
    if code == 0:
        return Finding(name, Severity.REQUIRED, True, "works", needed)
    if code in (errno.EPERM, errno.EACCES):
        remedy = grant(capability)
    return Finding(name, Severity.REQUIRED, False, os.strerror(code), needed, remedy)


def judge_capabilities(effective: Collection[str]) -> list[Finding]:
    """CAP_SYS_ADMIN includes what CAP_BPF allows."""
    have = frozenset(effective)
    needs = {
        "CAP_NET_ADMIN": ("devices, routes, filters, repaired sockets", have >= {"CAP_NET_ADMIN"}),
        "CAP_NET_RAW": ("raw and packet sockets", have >= {"CAP_NET_RAW"}),
        "CAP_BPF": ("loading BPF programs", bool(have & {"CAP_BPF", "CAP_SYS_ADMIN"})),
    }
    return [
        Finding(name, Severity.REQUIRED, ok, "there" if ok else "missing", needed, "" if ok else grant(name))
        for name, (needed, ok) in needs.items()
    ]


def judge_extensions(errors: dict[str, str]) -> Finding:
    """`errors`: those of `import_errors`."""
    found = "; ".join(f"{module}: {why}" for module, why in errors.items()) or "all can be imported"
    remedy = REBUILD if errors else ""
    return Finding("compiled extensions", Severity.REQUIRED, not errors, found, "data plane", remedy)


def judge_bpf_objects(directory: Path) -> Finding:
    """The package brings compiled programs; a source tree also has their sources: all must be compiled."""
    objects = {path.name.removesuffix(".o") for path in directory.glob("*.bpf.o")}
    missing = {path.name.removesuffix(".c") for path in directory.glob("*.bpf.c")} - objects
    ok = bool(objects) and not missing
    there = ", ".join(sorted(objects)) or f"none in {directory}"
    found = f"not compiled: {', '.join(sorted(missing))}" if missing else there
    remedy = "" if ok else REBUILD
    return Finding("compiled BPF programs", Severity.REQUIRED, ok, found, "data plane", remedy)


def _check_bpf(capabilities: Collection[str]) -> list[Finding]:
    library = kernel_probes.load_libbpf()
    if library is None:
        remedy = "apt-get install libbpf1"
        needed = "loads the BPF programs"
        return [Finding("libbpf", Severity.REQUIRED, False, "not installed", needed, remedy)]
    findings = [judge_libbpf(kernel_probes.libbpf_version(library))]
    if not findings[0].ok:
        return findings
    program = kernel_probes.try_bpf_program(library)
    return [
        *findings,
        judge_errno(
            "BPF programs",
            program,
            "traffic control programs can be loaded",
            "use a kernel with CONFIG_BPF_SYSCALL=y and CONFIG_NET_CLS_BPF=y (Debian's have both)",
            capability="CAP_BPF",
        ),
        judge_bpf_map(program, kernel_probes.try_bpf_map(library)),
        *([judge_verifier(_load_own_programs(), capabilities)] if program == 0 else []),
    ]


def judge_bpf_map(program: int, code: int) -> Finding:
    """`program`, `code`: errno of loading a program, of creating a map (locked memory before 5.11)."""
    name, needed = "BPF maps", f"a map of {kernel_probes.MAP_ENTRIES} flows"
    remedy = "ulimit -l unlimited (LimitMEMLOCK=infinity in the systemd unit)"
    if code == errno.EPERM and program == 0:
        return Finding(name, Severity.REQUIRED, False, os.strerror(code), needed, remedy)
    return judge_errno(name, code, needed, remedy, capability="CAP_BPF")


def judge_libbpf(version: str) -> Finding:
    """Before 1.0 its calls had other names and reported errors differently."""
    ok = version.partition(".")[0] not in ("", "0")
    remedy = "" if ok else "apt-get install libbpf1 (Debian 12 or newer)"
    return Finding("libbpf", Severity.REQUIRED, ok, version, "1.0 or newer", remedy)


def _load_own_programs() -> str:
    """Why our programs cannot be loaded; "" when they can."""
    try:
        from serval_core.dataplane.bpf_loader import BpfObject
        from serval_core.dataplane.layouts import CONFIGURATION, OBJECT_FILE

        BpfObject(str(OBJECT_FILE), bytes(CONFIGURATION.size)).close()
    except (ServalError, OSError, ImportError) as error:
        return str(error) or repr(error)
    return ""


def judge_verifier(error: str, capabilities: Collection[str]) -> Finding:
    """`error`: what the loader said, "" when the kernel accepted our programs.

    Without CAP_PERFMON the kernel is stricter about what programs may read.
    """
    remedy = KERNEL_ADVISED if error else ""
    if error and not {"CAP_PERFMON", "CAP_SYS_ADMIN"} & set(capabilities):
        remedy = grant("CAP_PERFMON")
    found = gist(error) or "accepted"
    return Finding("our BPF programs", Severity.REQUIRED, not error, found, "accepted by the kernel", remedy)


def judge_namespace(results: dict[str, int | str]) -> list[Finding]:
    """The answers of `kernel_probes.probe_in_own_namespace`."""
    if "crashed" in results:
        remedy = "report this as a defect, with the output of: serval-translator doctor"
        found = gist(str(results["crashed"]))
        return [Finding("probes in a namespace", Severity.REQUIRED, False, found, "to end normally", remedy)]
    if results["namespace"]:
        found = f"not tried: {os.strerror(int(results['namespace']))}"
        remedy = "run it once as root to have this tried: sudo serval-translator doctor"
        needed = "a network namespace to try devices and filters in"
        return [Finding("devices and filters", Severity.ADVICE, False, found, needed, remedy)]
    findings = [
        judge_errno(name, int(results[name]), needed, f"modprobe {module}, or use a kernel with {option}")
        for name, needed, module, option in (
            ("veth", "anchors of our sockets", "veth", "CONFIG_VETH"),
            ("clsact", "our filters", "sch_ingress", "CONFIG_NET_SCH_INGRESS"),
        )
        if results[name] != kernel_probes.NOT_TRIED
    ]
    if "data_plane" in results:
        findings.append(judge_data_plane(str(results["data_plane"])))
    return findings


def judge_data_plane(error: str) -> Finding:
    """`error`: the sentence with which the data plane refused to start, "" when it started and stopped."""
    found = gist(error) or "starts and stops"
    remedy = "see the findings above; if they are all in order, report this as a defect" if error else ""
    needed = "everything together, in a namespace of its own"
    return Finding("data plane", Severity.REQUIRED, not error, found, needed, remedy)


def _check_virtual_network() -> list[Finding]:
    try:
        from serval_core.dataplane.devices import OWN_DEVICES
        from serval_core.dataplane.kernel import DataPlaneSettings
    except ImportError:
        return []  # Reported under compiled extensions.
    settings = DataPlaneSettings()
    ours = [f"{settings.virtual_network}/16", f"{settings.virtual_address}/32"]
    routes = [route for route in kernel_probes.ipv4_routes() if route[2] not in OWN_DEVICES]
    return [judge_virtual_network(ours, routes)]


def judge_virtual_network(ours: Sequence[str], routes: Sequence[tuple[str, int, str]]) -> Finding:
    """Whether a route (destination, bits, interface) claims addresses that the stack uses internally."""
    networks = [ipaddress.IPv4Network(network) for network in ours]
    claims = [
        f"{destination}/{bits} on {interface}"
        for destination, bits, interface in routes
        if bits >= SHORTEST_CLAIM_BITS
        and any(network.overlaps(ipaddress.IPv4Network((destination, bits))) for network in networks)
    ]
    found = f"also used by {', '.join(claims)}" if claims else "free"
    remedy = "choose another /16 as virtual_network, or remove the route: ip route del ..." if claims else ""
    name = "virtual network"
    return Finding(name, Severity.ADVICE, not claims, found, f"{', '.join(ours)} unused", remedy)


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """Module -> why it cannot be imported, for those that cannot."""
    errors = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            errors[module] = str(error)
    return errors
