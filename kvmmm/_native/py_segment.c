/* py_segment.c: the type SegmentSet. What it does is documented in _core.pyi. */
#include <stdio.h>

#include "py_segment.h"

PyTypeObject *py_segment_set_type;
PyObject *py_segment_merge_equal;

static PyObject *set_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"merge", "split", "block_max", NULL};
    PyObject *merge = Py_None, *split = Py_None;
    unsigned int block_max = SEGMENT_BLOCK_MAX;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO$I", names, &merge, &split, &block_max))
        return NULL;
    if (block_max < 2 || block_max > SEGMENT_BLOCK_MAX)
        return PyErr_Format(PyExc_ValueError, "block_max must be from 2 to %d", SEGMENT_BLOCK_MAX);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct py_segment_set *self = (struct py_segment_set *)alloc(type, 0);
    if (!self)
        return NULL;
    segment_set_init(&self->set, block_max);
    self->merge = merge == Py_None ? NULL : Py_NewRef(merge);
    self->split = split == Py_None ? NULL : Py_NewRef(split);
    return (PyObject *)self;
}

static int set_traverse(PyObject *op, visitproc visit, void *arg)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->merge);
    Py_VISIT(self->split);
    for (size_t block = 0; block < self->set.n_blocks; block++)
        for (uint32_t i = 0; i < self->set.blocks[block].n; i++)
            Py_VISIT((PyObject *)segment_values(&self->set.blocks[block])[i]);
    return 0;
}

static int set_tp_clear(PyObject *op)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    py_segment_empty(self);
    Py_CLEAR(self->merge);
    Py_CLEAR(self->split);
    return 0;
}

static void set_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    set_tp_clear(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static Py_ssize_t set_length(PyObject *op)
{
    return (Py_ssize_t)((struct py_segment_set *)op)->set.n_segments;
}

static PyObject *get_span_bytes(PyObject *op, void *closure)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    if (!set->span_bytes && set->n_segments)
        return py_end_of(UINT64_MAX);
    return PyLong_FromUnsignedLongLong(set->span_bytes);
}

static PyObject *get_block_count(PyObject *op, void *closure)
{
    return PyLong_FromSize_t(((struct py_segment_set *)op)->set.n_blocks);
}

/* "[0x1000, 0x2000)=value" */
static PyObject *piece_repr(struct segment s)
{
    char range[64];
    if (s.last == UINT64_MAX)
        snprintf(range, sizeof(range), "[0x%llx, 0x10000000000000000)", (unsigned long long)s.start);
    else
        snprintf(range, sizeof(range), "[0x%llx, 0x%llx)", (unsigned long long)s.start,
                 (unsigned long long)s.last + 1);
    PyObject *value = Py_NewRef((PyObject *)s.value); /* its repr may change the set */
    PyObject *text = PyUnicode_FromFormat("%s=%R", range, value);
    Py_DECREF(value);
    return text;
}

/* The pieces of the repr; found by address again and again, since a value's repr runs in between. */
static PyObject *piece_reprs(const struct segment_set *set)
{
    PyObject *pieces = PyList_New(0);
    uint64_t addr = 0;
    do {
        struct segment_position p = segment_locate(set, addr);
        if (!pieces || segment_is_end(set, p))
            break;
        struct segment s = segment_at(set, p);
        PyObject *piece = piece_repr(s);
        if (!piece || PyList_Append(pieces, piece))
            Py_CLEAR(pieces);
        Py_XDECREF(piece);
        addr = s.last + 1;
    } while (addr);
    return pieces;
}

static PyObject *set_repr(PyObject *op)
{
    int nested = Py_ReprEnter(op);
    if (nested)
        return nested < 0 ? NULL : PyUnicode_FromString("SegmentSet(...)");
    PyObject *comma = PyUnicode_FromString(", ");
    PyObject *pieces = comma ? piece_reprs(&((struct py_segment_set *)op)->set) : NULL;
    PyObject *joined = pieces ? PyUnicode_Join(comma, pieces) : NULL;
    PyObject *text = joined ? PyUnicode_FromFormat("SegmentSet(%U)", joined) : NULL;
    Py_XDECREF(comma);
    Py_XDECREF(pieces);
    Py_XDECREF(joined);
    Py_ReprLeave(op);
    return text;
}

static PyObject *set_check_invariants(PyObject *op, PyObject *ignored)
{
    const struct segment_set *set = &((struct py_segment_set *)op)->set;
    for (size_t block = 0; block < set->n_blocks; block++) {
        const char *wrong = segment_check_block(set, block);
        if (!wrong)
            continue;
        char first[32];
        snprintf(first, sizeof(first), "0x%llx", (unsigned long long)set->firsts[block]);
        return PyErr_Format(PyExc_AssertionError, "block at %s: %s", first, wrong);
    }
    if (!segment_check_counters(set))
        return PyErr_Format(PyExc_AssertionError, "the counters are wrong: %zu segments", set->n_segments);
    Py_RETURN_NONE;
}

static PyObject *set_class_getitem(PyObject *type, PyObject *item) { return Py_GenericAlias(type, item); }

#define FAST(name, flags) (PyCFunction)(void (*)(void))py_segment_##name, METH_FASTCALL | (flags)

static PyMethodDef set_methods[] = {
    {"find", py_segment_find, METH_O, "The segment that covers an address."},
    {"find_value", py_segment_find_value, METH_O, "The value of the segment that covers an address."},
    {"lower_bound", py_segment_lower_bound, METH_O, "The segment that covers an address, or the next."},
    {"next_segment", py_segment_next_segment, METH_O, "The first that starts at or after an address."},
    {"prev_segment", py_segment_prev_segment, METH_O, "The last that ends at or before an address."},
    {"find_gap", py_segment_find_gap, METH_O, "The largest range around an address without a segment."},
    {"find_large_gap", FAST(find_large_gap, METH_KEYWORDS), "Where an aligned range has no segment."},
    {"segments", FAST(segments, 0), "Iterate over the segments that overlap a range."},
    {"gaps", FAST(gaps, 0), "Iterate over the parts of a range that no segment covers."},
    {"insert", FAST(insert, 0), "Add a segment, merged with its neighbours."},
    {"remove", FAST(remove, 0), "Remove a range; return what went."},
    {"move_fit", FAST(move_fit, 0), "Move what fits, at the first place, into another set."},
    {"isolate", FAST(isolate, 0), "Cut the segments across two addresses."},
    {"mutate", FAST(mutate, 0), "Change the values in a range, then merge."},
    {"merge_range", FAST(merge_range, 0), "Merge the segments that meet in a range."},
    {"clear", py_segment_clear, METH_NOARGS, "Remove everything."},
    {"check_invariants", set_check_invariants, METH_NOARGS, "AssertionError when the set is damaged."},
    {"merge_equal", FAST(merge_equal_call, METH_STATIC), "A merge: neighbours with equal values."},
    {"__class_getitem__", set_class_getitem, METH_O | METH_CLASS, "SegmentSet[V]."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef set_getset[] = {
    {"span_bytes", get_span_bytes, NULL, "Sum of the segments' lengths.", NULL},
    {"block_count", get_block_count, NULL, "Blocks that the segments lie in.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot set_slots[] = {
    {Py_tp_new, set_new},           {Py_tp_dealloc, set_dealloc}, {Py_tp_traverse, set_traverse},
    {Py_tp_clear, set_tp_clear},    {Py_tp_repr, set_repr},       {Py_tp_iter, py_segment_iter},
    {Py_sq_length, set_length},     {Py_tp_methods, set_methods}, {Py_tp_getset, set_getset},
    {0, NULL},
};

static PyType_Spec set_spec = {
    .name = "kvmmm._core.SegmentSet",
    .basicsize = sizeof(struct py_segment_set),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = set_slots,
};

int py_segment_register(PyObject *module)
{
    if (py_segment_iterator_register(module) || py_add_type(module, &set_spec, &py_segment_set_type))
        return -1;
    py_segment_merge_equal = PyObject_GetAttrString((PyObject *)py_segment_set_type, "merge_equal");
    return py_segment_merge_equal ? 0 : -1;
}
