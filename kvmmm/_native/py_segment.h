/* py_segment.h: what the py_segment_*.c files share: SegmentSet's object, and its arguments.
 *
 * Python runs inside merge, split and change, and may run wherever an object is allocated (the
 * collector) or dropped (finalizers). So: nobody calls it while the set is half changed, a value is
 * held before a tuple is made for it, and `busy` refuses a change while another one is under way.
 */
#ifndef KVMMM_PY_SEGMENT_H
#define KVMMM_PY_SEGMENT_H

#include "py.h"
#include "segment.h"

struct py_segment_set {
    PyObject_HEAD
    struct segment_set set; /* its values are references that it owns */
    PyObject *merge, *split; /* NULL for None */
    bool busy;               /* a change waits for a callback */
};

extern PyTypeObject *py_segment_set_type;
extern PyObject *py_segment_merge_equal; /* SegmentSet.merge_equal, which needs no call */

/* An int argument: an address, or a boundary, which may be 2^64 itself. */
enum py_boundary_where { BOUNDARY_BELOW, BOUNDARY_INSIDE, BOUNDARY_LIMIT, BOUNDARY_ABOVE };

/* Where it lies, with *addr set when inside [0, 2^64); -1 with an exception when it is no int. */
int py_boundary_of(PyObject *object, uint64_t *addr);

/* The part of [start, end) inside [0, 2^64): 1, or 0 when that is empty; -1 with an exception. */
int py_range_of(PyObject *start, PyObject *end, uint64_t *start_ret, uint64_t *last_ret);

/* 2^64 when last is the last address of all. */
PyObject *py_end_of(uint64_t last);

/* (start, end, value); takes no reference away. */
PyObject *py_segment_tuple(uint64_t start, uint64_t last, void *value);

/* TypeError unless there are so many arguments. */
bool py_has_arguments(const char *name, Py_ssize_t n, Py_ssize_t wanted);

/* Empties the set; then drops the values. */
void py_segment_empty(struct py_segment_set *self);

int py_segment_iterator_register(PyObject *module);

/* SegmentSet's methods of the same names. */
PyObject *py_segment_find(PyObject *op, PyObject *addr);
PyObject *py_segment_find_value(PyObject *op, PyObject *addr);
PyObject *py_segment_lower_bound(PyObject *op, PyObject *addr);
PyObject *py_segment_next_segment(PyObject *op, PyObject *addr);
PyObject *py_segment_prev_segment(PyObject *op, PyObject *addr);
PyObject *py_segment_find_gap(PyObject *op, PyObject *addr);
PyObject *py_segment_find_large_gap(PyObject *op, PyObject *const *args, Py_ssize_t n, PyObject *names);

PyObject *py_segment_iter(PyObject *op);
PyObject *py_segment_segments(PyObject *op, PyObject *const *args, Py_ssize_t n);
PyObject *py_segment_gaps(PyObject *op, PyObject *const *args, Py_ssize_t n);

PyObject *py_segment_insert(PyObject *op, PyObject *const *args, Py_ssize_t n);
PyObject *py_segment_remove(PyObject *op, PyObject *const *args, Py_ssize_t n);
PyObject *py_segment_isolate(PyObject *op, PyObject *const *args, Py_ssize_t n);
PyObject *py_segment_mutate(PyObject *op, PyObject *const *args, Py_ssize_t n);
PyObject *py_segment_merge_range(PyObject *op, PyObject *const *args, Py_ssize_t n);
PyObject *py_segment_clear(PyObject *op, PyObject *ignored);
PyObject *py_segment_move_fit(PyObject *op, PyObject *const *args, Py_ssize_t n);

/* The two callbacks, as segments see them (py_segment_callback.c). The set must be busy. */

/* What the segments [start, next_start) and the one at next_start become as one, or None for no; a
 * new reference. */
PyObject *py_segment_merged(struct py_segment_set *self, uint64_t start, uint64_t next_start,
                            PyObject *value, PyObject *next_value);

/* The values of [start, at) and [at, last]; new references. -1 with an exception. */
int py_segment_halves(struct py_segment_set *self, uint64_t start, uint64_t last, PyObject *value,
                      uint64_t at, PyObject **left, PyObject **right);

PyObject *py_segment_merge_equal_call(PyObject *type, PyObject *const *args, Py_ssize_t n);

/* A change begins: false with RuntimeError when one is under way. It ends with busy = false. */
bool py_segment_begin(struct py_segment_set *self);

#endif
