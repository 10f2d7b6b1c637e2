# cython: language_level=3
"""The C fields of the compiled splice engine."""

from translator.splice_direction cimport Pair, Worker
from translator.splice_system cimport Link, pthread_mutex_t


cdef class SpliceEngine:
    cdef Worker *workers
    cdef int worker_count
    cdef list threads
    cdef dict pairs                         # pair_id -> address of its Pair, until its completion is taken
    cdef pthread_mutex_t ended_mutex
    cdef Link ended                         # guarded by ended_mutex
    cdef int notification
    cdef bint stopped

    cdef void open_worker(self, int index) except *
    cdef Pair *find(self, object pair_id) except? NULL
    cdef int least_busy(self) noexcept
    cdef void wake_with(self, Worker *worker, Pair *pair) noexcept
    cdef void close_descriptors(self) noexcept
