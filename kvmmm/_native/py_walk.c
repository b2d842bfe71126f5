/* py_walk.c: PageWalk, a walk of page tables for copies: the tables, and the section that guards them. */
#include "py_copy.h"

struct py_walk {
    PyObject_HEAD
    struct kvmmm_walk walk;
    PyObject *owner; /* of the struct kvmmm_pt, or NULL; a cffi object: no cycle leads through it */
};

static PyTypeObject *py_walk_type;

struct kvmmm_walk *py_walk_of(PyObject *walk)
{
    if (PyObject_TypeCheck(walk, py_walk_type))
        return &((struct py_walk *)walk)->walk;
    PyErr_Format(PyExc_TypeError, "%R is not a PageWalk", walk);
    return NULL;
}

/* PageWalk(tables_hva, gpa, length_bytes, hva, owner=None) */
static int walk_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    struct py_walk *self = (struct py_walk *)op;
    Py_ssize_t tables, gpa, length, hva;
    PyObject *owner = NULL;
    if (!PyArg_ParseTuple(args, "nnnn|O", &tables, &gpa, &length, &hva, &owner))
        return -1;
    if (!tables || gpa < 0 || length < 0 || ((gpa | length) & 4095) || self->walk.tables || self->owner) {
        PyErr_SetString(PyExc_ValueError, "a walk takes tables once, and a window of whole pages");
        return -1;
    }
    self->owner = Py_XNewRef(owner);
    self->walk.low_gpa = (uint64_t)gpa;
    self->walk.high_gpa = (uint64_t)gpa + (uint64_t)length;
    self->walk.hva_delta = (uint64_t)hva - (uint64_t)gpa;
    self->walk.tables = (const struct kvmmm_pt *)tables;
    return 0;
}

/* find(addr, n_bytes, access) -> (hva, n_bytes) or None */
static PyObject *walk_find(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_walk *self = (struct py_walk *)op;
    if (n != 3) {
        PyErr_SetString(PyExc_TypeError, "find() takes 3 arguments");
        return NULL;
    }
    uint64_t addr = PyLong_AsUnsignedLongLong(args[0]), n_bytes = PyLong_AsUnsignedLongLong(args[1]), n_found;
    unsigned long access = PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    uintptr_t hva;
    unsigned phase = kvmmm_section_enter(&self->walk.section);
    Py_BEGIN_ALLOW_THREADS
    hva = kvmmm_walk_find(&self->walk, addr, n_bytes, (unsigned)access, &n_found);
    kvmmm_section_leave(&self->walk.section, phase);
    Py_END_ALLOW_THREADS
    return hva ? Py_BuildValue("KK", (unsigned long long)hva, (unsigned long long)n_found) : Py_NewRef(Py_None);
}

static PyObject *walk_drain(PyObject *op, PyObject *ignored)
{
    struct kvmmm_section *section = &((struct py_walk *)op)->walk.section;
    if (kvmmm_section_is_busy(section)) {
        Py_BEGIN_ALLOW_THREADS
        kvmmm_section_drain(section);
        Py_END_ALLOW_THREADS
    }
    return Py_NewRef(Py_None);
}

static PyObject *walk_close(PyObject *op, PyObject *ignored)
{
    __atomic_store_n(&((struct py_walk *)op)->walk.tables, NULL, __ATOMIC_RELEASE);
    return walk_drain(op, NULL);
}

static void walk_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    Py_XDECREF(((struct py_walk *)op)->owner);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyMethodDef walk_methods[] = {
    {"find", (PyCFunction)(void (*)(void))walk_find, METH_FASTCALL, "Where it is: (hva, n_bytes), or None."},
    {"drain", walk_drain, METH_NOARGS, "Wait for walks that began before."},
    {"close", walk_close, METH_NOARGS, "Find nothing any more, and wait for walks that do."},
    {NULL, NULL, 0, NULL},
};

static PyObject *walk_get_n_inside(PyObject *op, void *ignored)
{
    struct kvmmm_section *section = &((struct py_walk *)op)->walk.section;
    return PyLong_FromUnsignedLong(atomic_load(&section->n_inside[0]) + atomic_load(&section->n_inside[1]));
}

static PyGetSetDef walk_getset[] = {
    {"n_inside", walk_get_n_inside, NULL, "Walks under way without the GIL.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot walk_slots[] = {
    {Py_tp_init, walk_init},       {Py_tp_dealloc, walk_dealloc}, {Py_tp_methods, walk_methods},
    {Py_tp_getset, walk_getset}, {0, NULL},
};

static PyType_Spec walk_spec = {
    .name = "kvmmm._core.PageWalk",
    .basicsize = sizeof(struct py_walk),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = walk_slots,
};

int py_walk_register(PyObject *module) { return py_add_type(module, &walk_spec, &py_walk_type); }
