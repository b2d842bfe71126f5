/* py_segment_remove.c: SegmentSet's remove and clear. */
#include "py_segment.h"

/* A removal: segments [from, to), of which the first and the last may lose only a part. */
struct removal {
    uint64_t start, last;
    struct segment_position from, to, final; /* to follows final */
    struct segment first, end;               /* at from and at final */
    PyObject *left, *right;                  /* what stays of them; NULL when all goes */
    PyObject *first_value, *end_value;       /* of the pieces; end_value only when final != from */
};

static bool is_single(const struct removal *r)
{
    return r->from.block == r->final.block && r->from.index == r->final.index;
}

static void drop(struct removal *r)
{
    Py_CLEAR(r->left);
    Py_CLEAR(r->right);
    Py_CLEAR(r->first_value);
    Py_CLEAR(r->end_value);
}

/* Values of what stays and what goes, where a segment is cut. -1 with an exception. */
static int cut_values(struct py_segment_set *self, struct removal *r)
{
    if (r->first.start < r->start) {
        if (py_segment_halves(self, r->first.start, r->first.last, r->first.value, r->start, &r->left,
                              &r->first_value))
            return -1;
    } else {
        r->first_value = Py_NewRef((PyObject *)r->first.value);
    }
    PyObject **end_value = is_single(r) ? &r->first_value : &r->end_value;
    if (!*end_value)
        *end_value = Py_NewRef((PyObject *)r->end.value);
    if (r->end.last <= r->last)
        return 0;
    uint64_t start = r->end.start < r->start ? r->start : r->end.start;
    PyObject *middle;
    if (py_segment_halves(self, start, r->end.last, *end_value, r->last + 1, &middle, &r->right))
        return -1;
    Py_DECREF(*end_value);
    *end_value = middle;
    return 0;
}

/* The list that remove returns; the set stays as it is. */
static PyObject *make_pieces(const struct segment_set *set, const struct removal *r)
{
    PyObject *pieces = PyList_New(0);
    struct segment_position p = r->from;
    while (pieces) {
        struct segment s = segment_at(set, p);
        bool is_first = p.block == r->from.block && p.index == r->from.index;
        bool is_final = p.block == r->final.block && p.index == r->final.index;
        void *value = is_first ? r->first_value : is_final ? r->end_value : s.value;
        PyObject *piece = py_segment_tuple(s.start < r->start ? r->start : s.start,
                                           s.last > r->last ? r->last : s.last, value);
        if (!piece || PyList_Append(pieces, piece))
            Py_CLEAR(pieces);
        Py_XDECREF(piece);
        if (is_final)
            break;
        p = segment_next(set, p);
    }
    return pieces;
}

/* One segment that stays on both sides of what goes. -1: no memory, nothing changed. */
static int cut_out(struct segment_set *set, struct removal *r)
{
    struct segment_position p = {r->from.block, r->from.index + 1};
    if (segment_insert_at(set, &p, (struct segment){r->last + 1, r->first.last, Py_NewRef(r->right)})) {
        Py_DECREF(r->right);
        PyErr_NoMemory();
        return -1;
    }
    segment_prev(set, &p);
    segment_move_last(set, p, r->start - 1);
    PyObject *old = segment_swap_value(set, p, Py_NewRef(r->left));
    Py_DECREF(old);
    return 0;
}

/* Any other case. The pieces hold the values of all that goes whole. */
static void take_away(struct segment_set *set, struct removal *r, PyObject *pieces)
{
    PyObject *old_first = NULL, *old_end = NULL;
    Py_ssize_t begin = 0, stop = PyList_Size(pieces);
    if (r->left) {
        segment_move_last(set, r->from, r->start - 1);
        old_first = segment_swap_value(set, r->from, Py_NewRef(r->left));
        r->from = segment_next(set, r->from);
        begin++;
    }
    if (r->right) {
        segment_move_start(set, r->final, r->last + 1);
        old_end = segment_swap_value(set, r->final, Py_NewRef(r->right));
        r->to = r->final;
        stop--;
    }
    segment_delete(set, r->from, r->to);
    for (; begin < stop; begin++)
        Py_DECREF(PyTuple_GetItem(PyList_GetItem(pieces, begin), 2));
    Py_XDECREF(old_first);
    Py_XDECREF(old_end);
}

PyObject *py_segment_remove(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    struct segment_set *set = &self->set;
    struct removal r = {0};
    int some = py_has_arguments("remove", n, 2) ? py_range_of(args[0], args[1], &r.start, &r.last) : -1;
    if (some < 0)
        return NULL;
    if (some)
        r.from = segment_locate(set, r.start);
    if (!some || segment_is_end(set, r.from) || segment_at(set, r.from).start > r.last)
        return PyList_New(0);
    if (!py_segment_begin(self))
        return NULL;
    segment_floor(set, r.last, &r.final);
    r.to = segment_next(set, r.final);
    r.first = segment_at(set, r.from);
    r.end = segment_at(set, r.final);
    PyObject *pieces = cut_values(self, &r) ? NULL : make_pieces(set, &r);
    self->busy = false; /* no Python runs before the change is done */
    if (pieces && is_single(&r) && r.left && r.right) {
        if (cut_out(set, &r))
            Py_CLEAR(pieces);
    } else if (pieces) {
        take_away(set, &r, pieces);
    }
    drop(&r);
    return pieces;
}

void py_segment_empty(struct py_segment_set *self)
{
    struct segment_set old = self->set;
    segment_set_init(&self->set, old.block_max);
    self->set.version = old.version + 1;
    for (size_t block = 0; block < old.n_blocks; block++)
        for (uint32_t i = 0; i < old.blocks[block].n; i++)
            Py_DECREF((PyObject *)segment_values(&old.blocks[block])[i]);
    segment_set_free(&old);
}

PyObject *py_segment_clear(PyObject *op, PyObject *ignored)
{
    struct py_segment_set *self = (struct py_segment_set *)op;
    if (!py_segment_begin(self))
        return NULL;
    self->busy = false;
    py_segment_empty(self);
    Py_RETURN_NONE;
}
