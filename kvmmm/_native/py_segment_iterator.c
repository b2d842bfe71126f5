/* py_segment_iterator.c: iteration over a SegmentSet's segments, or its gaps.
 *
 * An iterator knows the address from which to go on. It keeps a position as well, which is good as
 * long as the set has its version: a set that changes meanwhile gives odd answers, never bad memory.
 */
#include "py_segment.h"

struct py_segment_iterator {
    PyObject_HEAD
    struct py_segment_set *owner; /* NULL: exhausted */
    struct segment_position position;
    uint64_t version;
    uint64_t next, last; /* what is left: [next, last] */
    bool gaps;
};

static PyTypeObject *iterator_type;

/* From here on [next, last] is what is left; nothing when next is 0, behind 2^64 - 1. */
static void go_on(struct py_segment_iterator *self, uint64_t next)
{
    self->next = next;
    if (!next || next > self->last)
        Py_CLEAR(self->owner);
}

/* The first segment that ends behind `next`. False: none begins in what is left. */
static bool look(struct py_segment_iterator *self, struct segment *s)
{
    struct segment_set *set = &self->owner->set;
    if (self->version != set->version) {
        self->position = segment_locate(set, self->next);
        self->version = set->version;
    }
    if (segment_is_end(set, self->position))
        return false;
    *s = segment_at(set, self->position);
    return s->start <= self->last;
}

static PyObject *next_segment(struct py_segment_iterator *self)
{
    struct segment s;
    if (!look(self, &s)) {
        Py_CLEAR(self->owner);
        return NULL;
    }
    /* The iterator may hold the last reference on the set, and the set the last on the value. */
    PyObject *owner = Py_NewRef((PyObject *)self->owner);
    self->position = segment_next(&self->owner->set, self->position);
    go_on(self, s.last + 1);
    PyObject *tuple = py_segment_tuple(s.start, s.last, s.value);
    Py_DECREF(owner);
    return tuple;
}

static PyObject *next_gap(struct py_segment_iterator *self)
{
    struct segment s;
    while (self->owner) {
        uint64_t start = self->next, last = self->last;
        if (look(self, &s)) {
            self->position = segment_next(&self->owner->set, self->position);
            last = s.start - 1;
            go_on(self, s.last + 1);
            if (s.start <= start)
                continue;
        } else {
            Py_CLEAR(self->owner);
        }
        PyObject *end = py_end_of(last);
        return end ? Py_BuildValue("KN", (unsigned long long)start, end) : NULL;
    }
    return NULL;
}

static PyObject *iterator_next(PyObject *op)
{
    struct py_segment_iterator *self = (struct py_segment_iterator *)op;
    if (!self->owner)
        return NULL;
    return self->gaps ? next_gap(self) : next_segment(self);
}

static PyObject *iterator_self(PyObject *op) { return Py_NewRef(op); }

static PyObject *new_iterator(PyObject *owner, uint64_t start, uint64_t last, bool empty, bool gaps)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(iterator_type, Py_tp_alloc);
    struct py_segment_iterator *self = (struct py_segment_iterator *)alloc(iterator_type, 0);
    if (!self)
        return NULL;
    if (!empty)
        self->owner = (struct py_segment_set *)Py_NewRef(owner);
    self->version = ((struct py_segment_set *)owner)->set.version - 1; /* look for the position */
    self->next = start;
    self->last = last;
    self->gaps = gaps;
    return (PyObject *)self;
}

/* segments and gaps: (start=0, end=2^64). */
static PyObject *iterate(PyObject *op, const char *name, PyObject *const *args, Py_ssize_t n, bool gaps)
{
    uint64_t start = 0, last = UINT64_MAX;
    int some = 1;
    if (n > 2)
        return PyErr_Format(PyExc_TypeError, "%s() takes at most 2 arguments (%zd given)", name, n);
    if (n) {
        PyObject *end = n > 1 ? Py_NewRef(args[1]) : py_end_of(UINT64_MAX);
        if (!end)
            return NULL;
        some = py_range_of(args[0], end, &start, &last);
        Py_DECREF(end);
    }
    return some < 0 ? NULL : new_iterator(op, start, last, !some, gaps);
}

PyObject *py_segment_iter(PyObject *op) { return new_iterator(op, 0, UINT64_MAX, false, false); }

PyObject *py_segment_segments(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    return iterate(op, "segments", args, n, false);
}

PyObject *py_segment_gaps(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    return iterate(op, "gaps", args, n, true);
}

static int iterator_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT((PyObject *)((struct py_segment_iterator *)op)->owner);
    return 0;
}

static int iterator_clear(PyObject *op)
{
    Py_CLEAR(((struct py_segment_iterator *)op)->owner);
    return 0;
}

static void iterator_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    iterator_clear(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyType_Slot iterator_slots[] = {
    {Py_tp_dealloc, iterator_dealloc},   {Py_tp_iter, iterator_self},   {Py_tp_iternext, iterator_next},
    {Py_tp_traverse, iterator_traverse}, {Py_tp_clear, iterator_clear}, {0, NULL},
};

static PyType_Spec iterator_spec = {
    .name = "kvmmm._core.SegmentIterator",
    .basicsize = sizeof(struct py_segment_iterator),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = iterator_slots,
};

int py_segment_iterator_register(PyObject *module)
{
    return py_add_type(module, &iterator_spec, &iterator_type);
}
