/* py_segment_change.c: SegmentSet's insert, isolate, mutate and merge_range.
 *
 * Every change asks its callbacks first and then happens at once, so that one that raises leaves
 * the set as it was, and one that looks at the set sees it as it was.
 */
#include "py_segment.h"

/* RangeError, which the layer above us defines. */
static PyObject *raise_range(PyObject *start, PyObject *end, const char *why)
{
    PyObject *errors = PyImport_ImportModule("kvmmm.errors");
    PyObject *type = errors ? PyObject_GetAttrString(errors, "RangeError") : NULL;
    PyObject *error = type ? PyObject_CallFunction(type, "OOs", start, end, why) : NULL;
    if (error)
        PyErr_SetObject(type, error);
    Py_XDECREF(error);
    Py_XDECREF(type);
    Py_XDECREF(errors);
    return NULL;
}

/* What an insertion finds: its place, the segments around it, and which of them it joins. */
struct insertion {
    uint64_t start, last;
    struct segment_position place, prev, next;
    struct segment before, after;
    bool has_prev, has_next, joins_prev, joins_next;
    PyObject *value; /* of the whole; a reference */
};

static void find_place(const struct segment_set *set, struct insertion *in)
{
    in->place = in->next = in->prev = segment_place(set, in->start);
    if (in->place.index) {
        in->has_prev = true;
        in->prev.index--;
        in->before = segment_at(set, in->prev);
        in->next = segment_next(set, in->prev);
    }
    in->has_next = !segment_is_end(set, in->next);
    if (in->has_next)
        in->after = segment_at(set, in->next);
}

/* Asks merge about both sides. -1 with an exception. */
static int join(struct py_segment_set *self, struct insertion *in)
{
    uint64_t start = in->start;
    if (in->has_prev && in->before.last + 1 == start) {
        PyObject *merged = py_segment_merged(self, in->before.start, start, in->before.value, in->value);
        if (!merged)
            return -1;
        in->joins_prev = merged != Py_None;
        if (in->joins_prev)
            start = in->before.start;
        PyObject *unused = in->joins_prev ? in->value : merged;
        in->value = in->joins_prev ? merged : in->value;
        Py_DECREF(unused);
    }
    if (in->has_next && in->last + 1 == in->after.start) {
        PyObject *merged = py_segment_merged(self, start, in->after.start, in->value, in->after.value);
        if (!merged)
            return -1;
        in->joins_next = merged != Py_None;
        PyObject *unused = in->joins_next ? in->value : merged;
        in->value = in->joins_next ? merged : in->value;
        Py_DECREF(unused);
    }
    return 0;
}

/* Takes the reference on in->value. False: no memory. */
static bool put(struct segment_set *set, struct insertion *in)
{
    PyObject *old = NULL, *old_next = NULL;
    if (in->joins_prev) {
        uint64_t last = in->joins_next ? in->after.last : in->last;
        if (in->joins_next) {
            old_next = in->after.value;
            segment_delete(set, in->next, segment_next(set, in->next));
            segment_floor(set, in->before.start, &in->prev);
        }
        segment_move_last(set, in->prev, last);
        old = segment_swap_value(set, in->prev, in->value);
    } else if (in->joins_next) {
        segment_move_start(set, in->next, in->start);
        old = segment_swap_value(set, in->next, in->value);
    } else if (segment_insert_at(set, &in->place, (struct segment){in->start, in->last, in->value})) {
        Py_DECREF(in->value);
        PyErr_NoMemory();
        return false;
    }
    Py_XDECREF(old);
    Py_XDECREF(old_next);
    return true;
}

PyObject *py_segment_insert(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    struct insertion in = {0};
    uint64_t end;
    if (!py_has_arguments("insert", n, 3))
        return NULL;
    int start_where = py_boundary_of(args[0], &in.start);
    int end_where = start_where < 0 ? -1 : py_boundary_of(args[1], &end);
    if (end_where < 0)
        return NULL;
    bool reaches = end_where == BOUNDARY_LIMIT || (end_where == BOUNDARY_INSIDE && end > in.start);
    if (start_where != BOUNDARY_INSIDE || !reaches)
        return raise_range(args[0], args[1], "a segment must be inside 64 bits and not empty");
    if (args[2] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "a segment's value must not be None");
        return NULL;
    }
    if (!py_segment_begin(self))
        return NULL;
    in.last = end_where == BOUNDARY_LIMIT ? UINT64_MAX : end - 1;
    in.value = Py_NewRef(args[2]);
    find_place(&self->set, &in);
    bool overlaps = (in.has_prev && in.before.last >= in.start) || (in.has_next && in.after.start <= in.last);
    int rc = !overlaps && self->merge ? join(self, &in) : 0;
    self->busy = false;
    if (overlaps || rc) {
        Py_DECREF(in.value);
        return rc ? NULL : raise_range(args[0], args[1], "overlaps a segment that is there already");
    }
    return put(&self->set, &in) ? Py_NewRef(Py_None) : NULL;
}

/* Cuts the segment across `at`, if there is one. The set is busy. -1 with an exception. */
static int cut_at(struct py_segment_set *self, uint64_t at)
{
    struct segment_set *set = &self->set;
    struct segment_position p;
    PyObject *left, *right;
    if (!segment_floor(set, at, &p))
        return 0;
    struct segment s = segment_at(set, p);
    if (s.start == at || s.last < at)
        return 0;
    if (py_segment_halves(self, s.start, s.last, s.value, at, &left, &right))
        return -1;
    p.index++;
    if (segment_insert_at(set, &p, (struct segment){at, s.last, right})) {
        Py_DECREF(left);
        Py_DECREF(right);
        PyErr_NoMemory();
        return -1;
    }
    segment_prev(set, &p);
    segment_move_last(set, p, at - 1);
    Py_DECREF((PyObject *)segment_swap_value(set, p, left));
    return 0;
}

static int isolate(struct py_segment_set *self, PyObject *start_object, PyObject *end_object)
{
    uint64_t start, end;
    int start_where = py_boundary_of(start_object, &start);
    int end_where = start_where < 0 ? -1 : py_boundary_of(end_object, &end);
    if (end_where < 0 || (start_where == BOUNDARY_INSIDE && cut_at(self, start)))
        return -1;
    return end_where == BOUNDARY_INSIDE ? cut_at(self, end) : 0;
}

PyObject *py_segment_isolate(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    if (!py_has_arguments("isolate", n, 2) || !py_segment_begin(self))
        return NULL;
    int rc = isolate(self, args[0], args[1]);
    self->busy = false;
    return rc ? NULL : Py_NewRef(Py_None);
}

/* Merges the segment at *p with its successor: 1, or 0 for no; -1 with an exception. */
static int merge_next(struct py_segment_set *self, struct segment_position *p)
{
    struct segment_set *set = &self->set;
    struct segment_position next = segment_next(set, *p);
    if (segment_is_end(set, next))
        return 0;
    struct segment s = segment_at(set, *p), t = segment_at(set, next);
    if (s.last + 1 != t.start)
        return 0;
    PyObject *merged = py_segment_merged(self, s.start, t.start, s.value, t.value);
    if (!merged || merged == Py_None) {
        Py_XDECREF(merged);
        return merged ? 0 : -1;
    }
    segment_delete(set, next, segment_next(set, next));
    segment_floor(set, s.start, p);
    segment_move_last(set, *p, t.last);
    segment_swap_value(set, *p, merged);
    Py_DECREF((PyObject *)s.value);
    Py_DECREF((PyObject *)t.value);
    return 1;
}

/* Asks merge about every boundary in [start, end]. The set is busy. -1 with an exception. */
static int merge_boundaries(struct py_segment_set *self, PyObject *start_object, PyObject *end_object)
{
    struct segment_set *set = &self->set;
    uint64_t start, end;
    int start_where = py_boundary_of(start_object, &start);
    int end_where = start_where < 0 ? -1 : py_boundary_of(end_object, &end);
    if (end_where < 0)
        return -1;
    if (!self->merge || end_where == BOUNDARY_BELOW || start_where >= BOUNDARY_LIMIT)
        return 0;
    if (end_where >= BOUNDARY_LIMIT)
        end = UINT64_MAX;
    if (start_where == BOUNDARY_BELOW)
        start = 0;
    struct segment_position p = segment_locate(set, start ? start - 1 : 0);
    while (!segment_is_end(set, p)) {
        if (segment_at(set, p).last >= end)
            return 0;
        int merged = merge_next(self, &p);
        if (merged < 0)
            return -1;
        if (!merged)
            p = segment_next(set, p);
    }
    return 0;
}

PyObject *py_segment_merge_range(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    if (!py_has_arguments("merge_range", n, 2) || !py_segment_begin(self))
        return NULL;
    int rc = merge_boundaries(self, args[0], args[1]);
    self->busy = false;
    return rc ? NULL : Py_NewRef(Py_None);
}

/* What change makes of one segment's value; a new reference. */
static PyObject *changed_value(PyObject *change, struct segment s)
{
    PyObject *start = PyLong_FromUnsignedLongLong(s.start), *end = py_end_of(s.last);
    PyObject *value = NULL;
    if (start && end)
        value = PyObject_CallFunctionObjArgs(change, start, end, (PyObject *)s.value, NULL);
    Py_XDECREF(start);
    Py_XDECREF(end);
    if (value != Py_None)
        return value;
    Py_DECREF(value);
    PyErr_SetString(PyExc_TypeError, "change must return a value that is not None");
    return NULL;
}

/* The new values of the segments from p up to `last`, in a list; NULL with an exception. */
static PyObject *changed_values(struct py_segment_set *self, struct segment_position p, uint64_t last,
                                PyObject *change)
{
    struct segment_set *set = &self->set;
    PyObject *values = PyList_New(0);
    for (; values && !segment_is_end(set, p); p = segment_next(set, p)) {
        struct segment s = segment_at(set, p);
        if (s.start > last)
            break;
        PyObject *value = changed_value(change, s);
        if (!value || PyList_Append(values, value))
            Py_CLEAR(values);
        Py_XDECREF(value);
    }
    return values;
}

/* Changes the values of all or none. Returns the old ones, for later. */
static PyObject *change_values(struct py_segment_set *self, PyObject *const *args)
{
    uint64_t start, last;
    int some = py_range_of(args[0], args[1], &start, &last);
    if (some <= 0)
        return some ? NULL : PyList_New(0);
    struct segment_position p = segment_locate(&self->set, start);
    PyObject *values = changed_values(self, p, last, args[2]);
    for (Py_ssize_t i = 0; values && i < PyList_Size(values); i++) {
        PyObject *value = Py_NewRef(PyList_GetItem(values, i));
        /* The list drops its reference on the new one, the set keeps the other. */
        PyList_SetItem(values, i, segment_swap_value(&self->set, p, value));
        p = segment_next(&self->set, p);
    }
    return values;
}

PyObject *py_segment_mutate(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    PyObject *type, *value, *traceback;
    if (!py_has_arguments("mutate", n, 3) || !py_segment_begin(self))
        return NULL;
    PyObject *old_values = isolate(self, args[0], args[1]) ? NULL : change_values(self, args);
    PyErr_Fetch(&type, &value, &traceback);
    int rc = merge_boundaries(self, args[0], args[1]);
    self->busy = false;
    if (type) /* the first exception is the one to tell */
        PyErr_Restore(type, value, traceback);
    Py_XDECREF(old_values);
    return type || rc ? NULL : Py_NewRef(Py_None);
}
