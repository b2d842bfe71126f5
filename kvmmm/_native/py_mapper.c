/* py_mapper.c: PageMapper, what most faults need of an address space: entries in a table that is there.
 *
 * A fault is served right after an exit, with cold caches, where every line of Python costs three times
 * what it does otherwise. So the usual case is one call of this; all else is PageTableAddressSpace's.
 */
#include "py_copy.h"

#include "pagetable.h"

#include <structmember.h>

struct py_mapper {
    PyObject_HEAD
    struct kvmmm_pt *tables; /* of a PageTables object that outlives this */
    PyObject *bases;         /* dict: file -> gpa of its offset 0 */
    uint64_t flags[8];       /* of an entry, by access bits */
    /* The window whose frames are shot down by MADV_DONTNEED. */
    uint64_t low_gpa, high_gpa, hva_delta;
    bool drops;              /* false: nobody has ever loaded the tables, or shootdowns are off */
    PyObject *walk;          /* PageWalk over the same tables, or NULL */
    long long n_pages;       /* mapped since somebody took the number */
    long long n_dontneed, n_stale; /* shootdowns, and the pages of them */
};

static PyTypeObject *py_mapper_type;

/* PageMapper(tables_hva, bases, flags, gpa, length_bytes, hva, walk=None) */
static int mapper_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    struct py_mapper *self = (struct py_mapper *)op;
    Py_ssize_t tables, gpa, length, hva;
    PyObject *bases, *flags, *walk = NULL;
    if (!PyArg_ParseTuple(args, "nO!O!nnn|O", &tables, &PyDict_Type, &bases, &PyTuple_Type, &flags, &gpa,
                          &length, &hva, &walk) || (walk && !py_walk_of(walk)))
        return -1;
    if (PyTuple_Size(flags) != 8) {
        PyErr_SetString(PyExc_ValueError, "eight flags: one for each set of access bits");
        return -1;
    }
    for (int i = 0; i < 8; i++)
        self->flags[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(flags, i));
    if (PyErr_Occurred())
        return -1;
    PyObject *old = self->bases;
    self->bases = Py_NewRef(bases);
    Py_XDECREF(old);
    old = self->walk;
    self->walk = Py_XNewRef(walk);
    Py_XDECREF(old);
    self->tables = (struct kvmmm_pt *)tables;
    self->low_gpa = (uint64_t)gpa;
    self->high_gpa = (uint64_t)(gpa + length);
    self->hva_delta = (uint64_t)(hva - gpa);
    return 0;
}

/* The entries are gone: wait for copies that have found them, and have every CPU forget what leads to
 * these frames. The file keeps its bytes. */
static int shoot_down(struct py_mapper *self, const struct kvmmm_pt_stale *stale)
{
    int rc = 0;
    struct kvmmm_section *section = self->walk ? &py_walk_of(self->walk)->section : NULL;
    bool waits = section && kvmmm_section_is_busy(section);
    if (!waits && !self->drops)
        return 0;
    self->n_dontneed += self->drops;
    self->n_stale += self->drops ? stale->n_pages : 0;
    Py_BEGIN_ALLOW_THREADS
    if (waits)
        kvmmm_section_drain(section);
    for (uint32_t i = 0; self->drops && i < stale->n_runs && !rc; i++)
        rc = kvmmm_drop_pages(stale->runs[i].start + self->hva_delta, stale->runs[i].end - stale->runs[i].start);
    Py_END_ALLOW_THREADS
    return rc;
}

/* map(addr, length_bytes, file, fo, perms) -> bool */
static PyObject *mapper_map(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_mapper *self = (struct py_mapper *)op;
    if (n != 5 || !self->tables) {
        PyErr_SetString(PyExc_TypeError, "map() takes 5 arguments");
        return NULL;
    }
    PyObject *base = PyDict_GetItemWithError(self->bases, args[2]);
    if (!base)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False); /* the file needs a window first */
    uint64_t addr = PyLong_AsUnsignedLongLong(args[0]), n_bytes = PyLong_AsUnsignedLongLong(args[1]);
    uint64_t gpa = PyLong_AsUnsignedLongLong(base), fo = PyLong_AsUnsignedLongLong(args[3]);
    uint64_t perms = PyLong_AsUnsignedLongLong(args[4]);
    if (PyErr_Occurred())
        return NULL;
    struct kvmmm_pt_stale stale;
    for (int rc = 1; rc;) {
        rc = perms > 7 ? -1
                       : kvmmm_pt_map_leaves(self->tables, addr, n_bytes, gpa + fo, self->flags[perms],
                                             self->low_gpa, self->high_gpa, &stale);
        if (rc < 0)
            return Py_NewRef(Py_False);
        self->n_pages -= stale.n_pages;
        int err = rc ? shoot_down(self, &stale) : 0;
        if (err)
            return py_raise_errno(-err);
    }
    self->n_pages += (long long)(n_bytes >> 12);
    return Py_NewRef(Py_True);
}

static PyObject *mapper_take(PyObject *op, PyObject *ignored)
{
    struct py_mapper *self = (struct py_mapper *)op;
    long long n_pages = self->n_pages;
    self->n_pages = 0;
    return PyLong_FromLongLong(n_pages);
}

static int mapper_clear(PyObject *op)
{
    Py_CLEAR(((struct py_mapper *)op)->bases);
    Py_CLEAR(((struct py_mapper *)op)->walk);
    return 0;
}

static int mapper_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((struct py_mapper *)op)->bases);
    Py_VISIT(((struct py_mapper *)op)->walk);
    return 0;
}

static void mapper_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    mapper_clear(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyMethodDef mapper_methods[] = {
    {"map", (PyCFunction)(void (*)(void))mapper_map, METH_FASTCALL, "Map what is absent; whether that was all."},
    {"take_count", mapper_take, METH_NOARGS, "Pages mapped since the last call."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef mapper_members[] = {
    {"drops", T_BOOL, offsetof(struct py_mapper, drops), 0, "Whether what is replaced must be shot down."},
    {"n_dontneed", T_LONGLONG, offsetof(struct py_mapper, n_dontneed), 0, "Shootdowns so far."},
    {"n_stale_pages", T_LONGLONG, offsetof(struct py_mapper, n_stale), 0, "Pages shot down so far."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot mapper_slots[] = {
    {Py_tp_members, mapper_members},
    {Py_tp_init, mapper_init},         {Py_tp_dealloc, mapper_dealloc}, {Py_tp_traverse, mapper_traverse},
    {Py_tp_clear, mapper_clear},       {Py_tp_methods, mapper_methods}, {0, NULL},
};

static PyType_Spec mapper_spec = {
    .name = "kvmmm._core.PageMapper",
    .basicsize = sizeof(struct py_mapper),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = mapper_slots,
};

int py_mapper_register(PyObject *module) { return py_add_type(module, &mapper_spec, &py_mapper_type); }
