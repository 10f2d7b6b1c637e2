def create_established(
    local_address: int,
    local_port: int,
    remote_address: int,
    remote_port: int,
    send_next: int,
    receive_next: int,
    mss_bytes: int,
    send_window_scale: int,
    receive_window_scale: int,
    sack: bool,
    timestamp: int | None,
    send_window_bytes: int,
    receive_window_bytes: int,
    congestion_control: bytes,
    peer_timeout_s: int = ...,
) -> int: ...
def take_down(fd: int) -> None: ...
def received(fd: int) -> int: ...
def shut_down(fd: int, how: int) -> None: ...
def state(fd: int) -> int: ...
