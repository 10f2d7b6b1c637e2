# cython: language_level=3
"""How do BPF programs get into the kernel? A thin wrapper of libbpf: load, attach to tc, read and write maps, ring buffer, test run.

Recipe: `BpfObject(path, config)` loads and verifies everything; `link_tcx()` or `attach_tc()` per interface and direction; `close()`
gives up our references (what is attached stays attached until the link is closed, or until `detach_tc()`). Map keys and values are `bytes` of exactly the declared size.
Every failure raises `KernelRefused` with the kernel's own words from the verifier log in the hint.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EEXIST, EINVAL, ENOENT, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strncpy
from posix.unistd cimport close as close_fd

from serval_core.errors import KernelRefused, OurMistake

cdef extern from "<stdarg.h>":
    ctypedef struct va_list:
        pass

cdef extern from "<stdio.h>":
    int vsnprintf(char *text, size_t size, const char *format, va_list arguments) nogil

cdef extern from "bpf/libbpf.h" nogil:
    cdef struct bpf_object:
        pass
    cdef struct bpf_map:
        pass
    cdef struct bpf_program:
        pass
    cdef struct ring_buffer:
        pass
    cdef struct ring_buffer_opts:
        size_t sz
    cdef struct bpf_object_open_opts:
        size_t sz
    cdef enum libbpf_print_level:
        LIBBPF_WARN
        LIBBPF_INFO
        LIBBPF_DEBUG
    cdef enum bpf_tc_attach_point:
        BPF_TC_INGRESS
        BPF_TC_EGRESS
    cdef struct bpf_tc_hook:
        size_t sz
        int ifindex
        bpf_tc_attach_point attach_point
        uint32_t parent
    cdef struct bpf_tc_opts:
        size_t sz
        int prog_fd
        uint32_t flags
        uint32_t prog_id
        uint32_t handle
        uint32_t priority
    enum: BPF_TC_F_REPLACE
    ctypedef int (*libbpf_print_fn_t)(libbpf_print_level level, const char *format, va_list arguments)
    ctypedef int (*ring_buffer_sample_fn)(void *context, void *data, size_t size)
    libbpf_print_fn_t libbpf_set_print(libbpf_print_fn_t function)
    bpf_object *bpf_object__open_file(const char *path, const bpf_object_open_opts *options)
    int bpf_object__load(bpf_object *object)
    void bpf_object__close(bpf_object *object)
    bpf_map *bpf_object__find_map_by_name(const bpf_object *object, const char *name)
    bpf_program *bpf_object__find_program_by_name(const bpf_object *object, const char *name)
    int bpf_program__fd(const bpf_program *program)
    int bpf_map__fd(const bpf_map *map)
    uint32_t bpf_map__key_size(const bpf_map *map)
    uint32_t bpf_map__value_size(const bpf_map *map)
    int bpf_map__set_initial_value(bpf_map *map, const void *data, size_t size)
    int bpf_map__set_max_entries(bpf_map *map, uint32_t entries)
    int bpf_tc_hook_create(bpf_tc_hook *hook)
    int bpf_tc_hook_destroy(bpf_tc_hook *hook)
    int bpf_tc_attach(const bpf_tc_hook *hook, bpf_tc_opts *options)
    int bpf_tc_detach(const bpf_tc_hook *hook, const bpf_tc_opts *options)
    int bpf_tc_query(const bpf_tc_hook *hook, bpf_tc_opts *options)
    ring_buffer *ring_buffer__new(int map_fd, ring_buffer_sample_fn callback, void *context, const ring_buffer_opts *options)
    void ring_buffer__free(ring_buffer *ring)
    int ring_buffer__consume(ring_buffer *ring)
    int ring_buffer__epoll_fd(const ring_buffer *ring)
    int libbpf_num_possible_cpus()

cdef extern from "bpf/bpf.h" nogil:
    cdef struct bpf_test_run_opts:
        size_t sz
        const void *data_in
        void *data_out
        uint32_t data_size_in
        uint32_t data_size_out
        const void *ctx_in
        void *ctx_out
        uint32_t ctx_size_in
        uint32_t ctx_size_out
        uint32_t retval
        int repeat
        uint32_t duration
    cdef enum bpf_attach_type:
        pass
    cdef struct bpf_link_create_opts:
        pass
    int bpf_link_create(int program_fd, int target_fd, bpf_attach_type attach_type, const bpf_link_create_opts *options)
    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags)
    int bpf_map_lookup_elem(int fd, const void *key, void *value)
    int bpf_map_delete_elem(int fd, const void *key)
    int bpf_map_get_next_key(int fd, const void *key, void *next_key)
    int bpf_prog_test_run_opts(int fd, bpf_test_run_opts *options)

# enum bpf_attach_type of Linux 6.6; older headers do not have them.
DEF BPF_TCX_INGRESS = 46
DEF BPF_TCX_EGRESS = 47
DEF LOG_BYTES = 65536
cdef char last_words[LOG_BYTES]
cdef size_t last_words_length = 0


cdef int keep_last_words(libbpf_print_level level, const char *format, va_list arguments) noexcept nogil:
    """libbpf's messages go into a buffer that the next error quotes, not to stderr."""
    global last_words_length
    cdef int written
    if level == LIBBPF_DEBUG:
        return 0
    if last_words_length > LOG_BYTES - 2048:
        last_words_length = 0
    written = vsnprintf(last_words + last_words_length, LOG_BYTES - last_words_length, format, arguments)
    if written > 0:
        last_words_length = min(last_words_length + <size_t>written, <size_t>(LOG_BYTES - 1))
    return 0


libbpf_set_print(keep_last_words)


cdef str take_last_words():
    global last_words_length
    text = last_words[:last_words_length].decode(errors="replace").strip()
    last_words_length = 0
    return text[-2000:]


cdef object refused(str call, int error, str hint):
    words = take_last_words()
    return KernelRefused(call, error, f"{hint} libbpf says: {words}" if words else hint)


cdef int append_sample(void *context, void *data, size_t size) noexcept with gil:
    (<list>context).append(PyBytes_FromStringAndSize(<char *>data, size))
    return 0


def possible_cpus() -> int:
    """How many values a per-CPU map holds for each key."""
    return libbpf_num_possible_cpus()


cdef class Map:
    """One map of a loaded object. Keys and values are bytes; the object owns the fd."""

    cdef readonly int fd
    cdef readonly uint32_t key_bytes
    cdef readonly uint32_t value_bytes
    cdef readonly str name
    cdef uint32_t read_bytes

    def update(self, bytes key, bytes value) -> None:
        """Insert or replace."""
        if len(key) != self.key_bytes or len(value) != self.value_bytes:
            raise OurMistake(f"map {self.name}: key {len(key)} or value {len(value)} bytes long")
        if bpf_map_update_elem(self.fd, PyBytes_AS_STRING(key), PyBytes_AS_STRING(value), 0):
            raise refused(f"bpf(MAP_UPDATE_ELEM {self.name})", errno, "The map may be full: see MANAGEMENT.md, limits.")

    def get(self, bytes key) -> bytes | None:
        """The value, or None. For per-CPU maps: the values of all possible CPUs, each padded to 8 bytes."""
        cdef bytes value = PyBytes_FromStringAndSize(NULL, self.read_bytes)
        if len(key) != self.key_bytes:
            raise OurMistake(f"map {self.name}: key {len(key)} bytes long")
        if bpf_map_lookup_elem(self.fd, PyBytes_AS_STRING(key), PyBytes_AS_STRING(value)):
            if errno == ENOENT:
                return None
            raise refused(f"bpf(MAP_LOOKUP_ELEM {self.name})", errno, "")
        return value

    def delete(self, bytes key) -> bool:
        """Remove; False if it was not there."""
        if len(key) != self.key_bytes:
            raise OurMistake(f"map {self.name}: key {len(key)} bytes long")
        if bpf_map_delete_elem(self.fd, PyBytes_AS_STRING(key)):
            if errno == ENOENT:
                return False
            raise refused(f"bpf(MAP_DELETE_ELEM {self.name})", errno, "")
        return True

    def keys(self) -> list[bytes]:
        """All keys at this moment."""
        cdef bytes following = PyBytes_FromStringAndSize(NULL, self.key_bytes)
        found = []
        cdef char *previous = NULL
        while bpf_map_get_next_key(self.fd, previous, PyBytes_AS_STRING(following)) == 0:
            found.append(following)
            previous = PyBytes_AS_STRING(following)
            following = PyBytes_FromStringAndSize(NULL, self.key_bytes)
        return found


cdef class RingBuffer:
    """Consumer of a BPF ring buffer. `fd` becomes readable when samples wait."""

    cdef ring_buffer *ring
    cdef list samples

    def __dealloc__(self):
        ring_buffer__free(self.ring)

    @property
    def fd(self) -> int:
        return ring_buffer__epoll_fd(self.ring)

    def take(self) -> list[bytes]:
        """All samples that wait, oldest first."""
        ring_buffer__consume(self.ring)
        taken = self.samples[:]
        self.samples.clear()
        return taken


cdef class BpfObject:
    """A loaded BPF object file; owns the fds of its programs and maps.

    `config` becomes the content of the `.rodata.config` section: constants the verifier knows. `max_entries` resizes maps by name.
    """

    cdef bpf_object *object
    cdef readonly str path

    def __cinit__(self, str path, bytes config=b"", max_entries=None):
        cdef bpf_map *map
        cdef int error
        self.path = path
        take_last_words()
        self.object = bpf_object__open_file(path.encode(), NULL)
        if self.object is NULL:
            raise refused(f"open {path}", errno, "Build the BPF programs: pip install . (needs clang and libbpf-dev).")
        if config:
            map = bpf_object__find_map_by_name(self.object, b".rodata.config")
            if map is NULL or bpf_map__set_initial_value(map, PyBytes_AS_STRING(config), len(config)):
                raise OurMistake(f"{path}: .rodata.config does not hold {len(config)} bytes")
        for name, entries in (max_entries or {}).items():
            map = bpf_object__find_map_by_name(self.object, name.encode())
            if map is NULL or bpf_map__set_max_entries(map, entries):
                raise OurMistake(f"{path}: map {name} cannot hold {entries} entries")
        error = bpf_object__load(self.object)
        if error:
            raise refused(f"load {path}", -error, "Needs CAP_BPF and CAP_NET_ADMIN (or root) and a kernel with BPF.")

    def __dealloc__(self):
        bpf_object__close(self.object)

    def close(self) -> None:
        """Give up the fds now; attached programs stay attached."""
        bpf_object__close(self.object)
        self.object = NULL

    def map(self, str name) -> Map:
        cdef bpf_map *found = bpf_object__find_map_by_name(self.object, name.encode())
        if found is NULL:
            raise OurMistake(f"{self.path} has no map {name}")
        cdef Map result = Map.__new__(Map)
        result.fd = bpf_map__fd(found)
        result.key_bytes = bpf_map__key_size(found)
        result.value_bytes = bpf_map__value_size(found)
        # Room for the values of all CPUs, should this be a per-CPU map.
        result.read_bytes = result.value_bytes
        result.name = name
        return result

    def per_cpu_map(self, str name) -> Map:
        """Like `map`; `get` returns the values of all possible CPUs."""
        cdef Map result = self.map(name)
        result.read_bytes = (result.value_bytes + 7) // 8 * 8 * <uint32_t>libbpf_num_possible_cpus()
        return result

    def ring_buffer(self, str name) -> RingBuffer:
        cdef RingBuffer result = RingBuffer.__new__(RingBuffer)
        result.samples = []
        result.ring = ring_buffer__new(self.map(name).fd, append_sample, <void *>result.samples, NULL)
        if result.ring is NULL:
            raise refused(f"ring_buffer__new({name})", errno, "")
        return result

    def program_fd(self, str name) -> int:
        cdef bpf_program *found = bpf_object__find_program_by_name(self.object, name.encode())
        if found is NULL:
            raise OurMistake(f"{self.path} has no program {name}")
        return bpf_program__fd(found)

    def test_run(self, str program, bytes packet, uint32_t mark=0, uint32_t segments=0) -> tuple[int, bytes, int]:
        """Run a tc program once on `packet` (PROG_TEST_RUN): its return value, the packet and the mark afterwards.

        The program is told that the packet is a superpacket of that many segments.
        """
        cdef char output[65536]
        cdef bpf_test_run_opts options
        cdef char context[192]
        memset(&options, 0, sizeof(options))
        memset(context, 0, sizeof(context))
        # struct __sk_buff (linux/bpf.h): byte offsets of mark and gso_segs.
        memcpy(context + 8, &mark, 4)
        memcpy(context + 164, &segments, 4)
        options.sz = sizeof(options)
        options.data_in = PyBytes_AS_STRING(packet)
        options.data_size_in = len(packet)
        options.data_out = output
        options.data_size_out = sizeof(output)
        options.ctx_in = context
        options.ctx_size_in = sizeof(context)
        options.ctx_out = context
        options.ctx_size_out = sizeof(context)
        options.repeat = 1
        if bpf_prog_test_run_opts(self.program_fd(program), &options):
            raise refused(f"bpf(PROG_TEST_RUN {program})", errno, "")
        memcpy(&mark, context + 8, 4)
        return options.retval, output[:options.data_size_out], mark


cdef void name_hook(bpf_tc_hook *hook, int interface_index, bint egress):
    memset(hook, 0, sizeof(hook[0]))
    hook.sz = sizeof(hook[0])
    hook.ifindex = interface_index
    hook.attach_point = BPF_TC_EGRESS if egress else BPF_TC_INGRESS


def attach_tc(int interface_index, bint egress, int program_fd, uint32_t priority, uint32_t handle) -> bool:
    """Attach to clsact of the interface, creating the qdisc if needed; replaces what has this priority and handle.

    Returns True if the qdisc was created by this call (then whoever called should remove it again).
    """
    cdef bpf_tc_hook hook
    cdef bpf_tc_opts options
    cdef int error
    name_hook(&hook, interface_index, egress)
    error = bpf_tc_hook_create(&hook)
    if error and error != -EEXIST:
        raise refused(f"create clsact on interface {interface_index}", -error,
                      "Needs CAP_NET_ADMIN and a kernel with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF.")
    created = error == 0
    memset(&options, 0, sizeof(options))
    options.sz = sizeof(options)
    options.prog_fd = program_fd
    options.flags = BPF_TC_F_REPLACE
    options.handle = handle
    options.priority = priority
    error = bpf_tc_attach(&hook, &options)
    if error:
        raise refused(f"attach to tc of interface {interface_index}", -error, "Needs CAP_NET_ADMIN and CONFIG_NET_CLS_BPF.")
    take_last_words()
    return created


def link_tcx(int interface_index, bint egress, int program_fd) -> int | None:
    """Have a tc program run on an interface behind those that run there already, before all filters of clsact.

    Returns the fd of the link: closing it, or the end of the process, takes the program off. None if the kernel has no tcx
    (before Linux 6.6).
    """
    cdef int where = BPF_TCX_EGRESS if egress else BPF_TCX_INGRESS
    cdef int link = bpf_link_create(program_fd, interface_index, <bpf_attach_type>where, NULL)
    if link >= 0:
        return link
    if errno == EINVAL:
        return None
    raise refused(f"attach to tcx of interface {interface_index}", errno, "Needs CAP_NET_ADMIN and CAP_BPF.")


def detach_tc(int interface_index, bint egress, uint32_t priority, uint32_t handle) -> bool:
    """Remove the filter with this priority and handle; False if there was none (or no such interface)."""
    cdef bpf_tc_hook hook
    cdef bpf_tc_opts options
    cdef int error
    name_hook(&hook, interface_index, egress)
    memset(&options, 0, sizeof(options))
    options.sz = sizeof(options)
    options.handle = handle
    options.priority = priority
    error = bpf_tc_detach(&hook, &options)
    take_last_words()
    return error == 0


def remove_clsact(int interface_index) -> bool:
    """Remove the clsact qdisc with everything attached to it; False if there was none."""
    cdef bpf_tc_hook hook
    cdef int error
    name_hook(&hook, interface_index, False)
    # Both directions at once make libbpf remove the qdisc itself.
    hook.attach_point = <bpf_tc_attach_point>(<int>BPF_TC_INGRESS | <int>BPF_TC_EGRESS)
    error = bpf_tc_hook_destroy(&hook)
    take_last_words()
    return error == 0
