"""How do we send more packets than any router forwards? The kernel sends one frame over and over (bpf(2), BPF_PROG_TEST_RUN).

    python -m bench.packet_source INTERFACE HEX

Runs until it is terminated. The frames leave in batches of 64, as a network card would deliver them, which
needs GRO (or XDP) at the other end of a veth. The program that is run writes each frame anew, since whoever
forwarded the last one may have changed it, and sends it through the interface. All on one CPU, the first.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator

_SYSCALL_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_TEST_RUN = 5, 10
_PROG_TYPE_XDP, _ATTACH_XDP = 6, 37
_LIVE_FRAMES = 2
_XDP_PASS, _XDP_TX = 2, 3
_BATCH = 64
_REPEAT_MAX = 0x7FFFFFFF
_LOAD = struct.Struct("<IIQQIIQIi16sII")
_TEST_RUN = struct.Struct("<IIIIQQIIIIQQIIII")
_CONTEXT = struct.Struct("<6I")  # struct xdp_md

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Send for ever."""
    interface, frame = sys.argv[1], bytes.fromhex(sys.argv[2])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    program = _load(b"".join(_instructions(frame)))
    print("ready", flush=True)
    while True:
        _send(program, frame, socket.if_nametoindex(interface))


def _instruction(code: int, registers: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhI", code, registers, offset, immediate)


def _instructions(frame: bytes) -> Iterator[bytes]:
    """Writes `frame` into the packet and answers XDP_TX. Registers are destination | source << 4."""
    padded = frame + bytes(-len(frame) % 4)
    assert len(padded) == len(frame), "a frame of the source has a multiple of 4 bytes"
    yield _instruction(0x61, 2 | 1 << 4, 0)  # r2 = data
    yield _instruction(0x61, 3 | 1 << 4, 4)  # r3 = data_end
    yield _instruction(0xBF, 4 | 2 << 4)  # r4 = r2
    yield _instruction(0x07, 4, 0, len(frame))  # r4 += length
    yield _instruction(0xB7, 0, 0, _XDP_PASS)  # r0 = PASS
    yield _instruction(0x2D, 4 | 3 << 4, len(frame) // 4 + 1)  # if r4 > r3 goto exit
    for offset in range(0, len(frame), 4):
        yield _instruction(0x62, 2, offset, struct.unpack_from("<I", frame, offset)[0])  # *(u32 *)r2 = word
    yield _instruction(0xB7, 0, 0, _XDP_TX)  # r0 = TX
    yield _instruction(0x95)  # exit


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(_SYSCALL_BPF[os.uname().machine], command, buffer, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _load(instructions: bytes) -> int:
    code, license_text = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(b"GPL")
    count = len(instructions) // 8
    where = ctypes.addressof(code), ctypes.addressof(license_text)
    return _bpf(
        _PROG_LOAD, _LOAD.pack(_PROG_TYPE_XDP, count, *where, 0, 0, 0, 0, 0, b"source", 0, _ATTACH_XDP)
    )


def _send(program: int, frame: bytes, interface_index: int) -> None:
    data = ctypes.create_string_buffer(frame, len(frame))
    context = ctypes.create_string_buffer(
        _CONTEXT.pack(0, len(frame), 0, interface_index, 0, 0), _CONTEXT.size
    )
    sizes = _CONTEXT.size, 0, ctypes.addressof(context), 0
    _bpf(
        _PROG_TEST_RUN,
        _TEST_RUN.pack(
            program,
            0,
            len(frame),
            0,
            ctypes.addressof(data),
            0,
            _REPEAT_MAX,
            0,
            *sizes,
            _LIVE_FRAMES,
            0,
            _BATCH,
            0,
        ),
    )


if __name__ == "__main__":
    main()
