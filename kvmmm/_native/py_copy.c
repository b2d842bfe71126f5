/* py_copy.c: CopyCore, what a MemoryManager is made of where copies are concerned. */
#include "py_copy.h"

#include <structmember.h>

PyTypeObject *py_copy_type;

/* CopyCore(max_addr, hva, length_bytes): hva and length of the arena's linear mapping. */
static int core_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    unsigned long long max_addr, hva, length;
    if (!PyArg_ParseTuple(args, "KKK", &max_addr, &hva, &length))
        return -1;
    if (self->frames.chunks || max_addr > 1ULL << 57) {
        PyErr_SetString(PyExc_ValueError, "initialised twice, or more addresses than x86-64 has");
        return -1;
    }
    self->inside = py_inside_share(self->inside);
    int err = kvmmm_frames_init(&self->frames, max_addr, hva, length);
    if (err || !self->inside) {
        PyErr_NoMemory();
        return -1;
    }
    self->max_addr = max_addr;
    self->release_bytes = 64 << 10;
    return 0;
}

static int core_clear(PyObject *op)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    self->walk = NULL;
    self->mirror = NULL;
    Py_CLEAR(self->walk_object);
    Py_CLEAR(self->mirror_object);
    return 0;
}

static int core_traverse(PyObject *op, visitproc visit, void *arg)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->walk_object);
    Py_VISIT(self->mirror_object);
    return 0;
}

static void core_dealloc(PyObject *op)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    core_clear(op);
    kvmmm_frames_release(&self->frames);
    py_inside_drop(self->inside);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

/* Wait until copies have left that may have found what cannot be found any more. */
static void drain(struct py_copy_core *self)
{
    if (kvmmm_section_is_busy(&self->section)) {
        Py_BEGIN_ALLOW_THREADS
        kvmmm_section_drain(&self->section);
        Py_END_ALLOW_THREADS
    }
}

/* ---- the frame table ------------------------------------------------------------------------------ */

/* A page-aligned range inside max_addr: 0, or -1 with ValueError set. */
static int check_pages(const struct py_copy_core *self, uint64_t start, uint64_t end)
{
    if (self->frames.chunks && start <= end && end <= self->max_addr && !((start | end) & 4095))
        return 0;
    PyErr_Format(PyExc_ValueError, "[%p, %p) is no range of whole pages here", (void *)start, (void *)end);
    return -1;
}

/* fill_frames(start, end, fo, bits) */
static PyObject *core_fill_frames(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    uint64_t number[4] = {0};
    for (Py_ssize_t i = 0; i < n && i < 4; i++)
        if (py_copy_number(args[i], &number[i]))
            return NULL;
    uint64_t start = number[0], end = number[1], fo = number[2];
    if (n != 4 || check_pages(self, start, end))
        return n == 4 ? NULL : PyErr_Format(PyExc_TypeError, "fill_frames() takes 4 arguments");
    if (fo & 4095 || fo >> 12 > self->frames.n_frames || (end - start) >> 12 > self->frames.n_frames - (fo >> 12) ||
        number[3] >> KVMMM_FRAME_BITS) {
        PyErr_SetString(PyExc_ValueError, "no frames of the arena, or no access bits");
        return NULL;
    }
    if (kvmmm_frames_fill(&self->frames, start, end, fo, (unsigned)number[3]))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *core_drain(PyObject *op, PyObject *ignored)
{
    drain((struct py_copy_core *)op);
    Py_RETURN_NONE;
}

/* forget(start, end): no copy uses a frame of [start, end) when it returns, in the mirror neither. */
static PyObject *core_forget(PyObject *op, PyObject *const *args, Py_ssize_t n)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    uint64_t start, end;
    if (n != 2)
        return PyErr_Format(PyExc_TypeError, "forget() takes 2 arguments");
    if (py_copy_number(args[0], &start) || py_copy_number(args[1], &end) || check_pages(self, start, end))
        return NULL;
    kvmmm_frames_clear(&self->frames, start, end);
    if (self->mirror_object) {
        PyObject *done = PyObject_CallMethod(self->mirror_object, "forget", "KK", (unsigned long long)start,
                                             (unsigned long long)end);
        if (!done)
            return NULL;
        Py_DECREF(done);
    }
    drain(self);
    Py_RETURN_NONE;
}

/* frames(start, end) -> [(start, end, fo, bits), ...] */
static PyObject *core_frames(PyObject *op, PyObject *args)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    unsigned long long from, to;
    if (!PyArg_ParseTuple(args, "KK", &from, &to) || check_pages(self, from, to))
        return NULL;
    PyObject *runs = PyList_New(0);
    uint64_t start = from, stop, fo;
    unsigned bits;
    while (runs && kvmmm_frames_run(&self->frames, &start, to, &stop, &fo, &bits)) {
        PyObject *run = Py_BuildValue("KKKI", (unsigned long long)start, (unsigned long long)stop,
                                      (unsigned long long)fo, bits);
        if (!run || PyList_Append(runs, run))
            Py_CLEAR(runs);
        Py_XDECREF(run);
        start = stop;
    }
    return runs;
}

/* ---- what it is given ------------------------------------------------------------------------------ */

static int set_walk(PyObject *op, PyObject *value, void *closure)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    struct kvmmm_walk *walk = NULL;
    if (value && value != Py_None && !(walk = py_walk_of(value)))
        return -1;
    PyObject *old = self->walk_object;
    self->walk = walk;
    self->walk_object = walk ? Py_NewRef(value) : NULL;
    drain(self);
    Py_XDECREF(old);
    return 0;
}

static int set_mirror(PyObject *op, PyObject *value, void *closure)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    struct kvmmm_mirror *mirror = NULL;
    if (value && value != Py_None && !(mirror = py_mirror_of(value)))
        return -1;
    PyObject *old = self->mirror_object;
    self->mirror = mirror;
    self->mirror_object = mirror ? Py_NewRef(value) : NULL;
    drain(self);
    Py_XDECREF(old);
    return 0;
}

static PyObject *get_walk(PyObject *op, void *closure)
{
    PyObject *walk = ((struct py_copy_core *)op)->walk_object;
    return Py_NewRef(walk ? walk : Py_None);
}

static PyObject *get_mirror(PyObject *op, void *closure)
{
    PyObject *mirror = ((struct py_copy_core *)op)->mirror_object;
    return Py_NewRef(mirror ? mirror : Py_None);
}

/* apply_policy(release_bytes, uses_mirror, promote_after) */
static PyObject *core_apply_policy(PyObject *op, PyObject *args)
{
    struct py_copy_core *self = (struct py_copy_core *)op;
    unsigned long long release_bytes;
    int uses_mirror;
    unsigned promote_after;
    if (!PyArg_ParseTuple(args, "KpI", &release_bytes, &uses_mirror, &promote_after))
        return NULL;
    self->release_bytes = release_bytes;
    self->uses_mirror = uses_mirror;
    self->promote_after = promote_after;
    Py_RETURN_NONE;
}

#define FAST(name) (PyCFunction)(void (*)(void))(name)
#define COPY(name, doc) {#name, FAST(py_copy_##name), METH_FASTCALL | METH_KEYWORDS, doc}

static PyMethodDef core_methods[] = {
    COPY(copy_in, "copy_in(addr, dst, *, opts=None, ignore_permissions=False): guest -> host."),
    COPY(copy_out, "copy_out(addr, src, *, opts=None, ignore_permissions=False): host -> guest."),
    {"write", FAST(py_copy_copy_out), METH_FASTCALL | METH_KEYWORDS, "The short name of copy_out."},
    COPY(read, "read(addr, length_bytes, *, opts=None, ignore_permissions=False) -> bytes."),
    COPY(zero_out, "zero_out(addr, length_bytes, *, opts=None, ignore_permissions=False)."),
    COPY(copy_in_vec, "copy_in_vec(ranges, dst, *, opts=None, ignore_permissions=False)."),
    COPY(copy_out_vec, "copy_out_vec(ranges, src, *, opts=None, ignore_permissions=False)."),
    COPY(copy_in_many, "copy_in_many([(addr, length_bytes), ...], ...) -> [bytes, ...]."),
    COPY(copy_out_many, "copy_out_many([(addr, src), ...], ...) -> bytes copied."),
    COPY(swap_uint32, "swap_uint32(addr, new, ...) -> what was there."),
    COPY(compare_and_swap_uint32, "compare_and_swap_uint32(addr, old, new, ...) -> what was there."),
    COPY(load_uint32, "load_uint32(addr, ...) -> what is there."),
    {"_move", py_copy_move, METH_VARARGS, NULL},
    {"_move_fresh", FAST(py_copy_move_fresh), METH_FASTCALL, NULL},
    {"_atomic", py_copy_atomic, METH_VARARGS, NULL},
    {"fill_frames", FAST(core_fill_frames), METH_FASTCALL, "fill_frames(start, end, fo, bits)."},
    {"forget", FAST(core_forget), METH_FASTCALL, "forget(start, end): copies use none of these frames any more."},
    {"frames", core_frames, METH_VARARGS, "frames(start, end): what the frame table holds."},
    {"drain", core_drain, METH_NOARGS, "Wait for copies in flight."},
    {"enter_copy", py_copy_enter, METH_NOARGS, "Enter the read section for a Reader or Writer."},
    {"leave_copy", py_copy_leave, METH_O, "Leave it."},
    {"apply_policy", core_apply_policy, METH_VARARGS, "apply_policy(release_bytes, uses_mirror, promote_after)."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef core_getset[] = {
    {"walk", get_walk, set_walk, "The address space's PageWalk, or None.", NULL},
    {"mirror", get_mirror, set_mirror, "The Mirror, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef core_members[] = {
    {"max_addr", T_ULONGLONG, offsetof(struct py_copy_core, max_addr), READONLY, "Exclusive end of addresses."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot core_slots[] = {
    {Py_tp_init, core_init},       {Py_tp_dealloc, core_dealloc}, {Py_tp_traverse, core_traverse},
    {Py_tp_clear, core_clear},     {Py_tp_methods, core_methods}, {Py_tp_getset, core_getset},
    {Py_tp_members, core_members}, {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "kvmmm._core.CopyCore",
    .basicsize = sizeof(struct py_copy_core),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = core_slots,
};

/* adopt(cls): CPython calls a method fast only where the object's type is the descriptor's own. So a
 * subclass gets descriptors of its own for the same functions. */
static PyObject *adopt(PyObject *module, PyObject *cls)
{
    if (!PyType_Check(cls) || !PyType_IsSubtype((PyTypeObject *)cls, py_copy_type))
        return PyErr_Format(PyExc_TypeError, "%R is no subclass of CopyCore", cls);
    for (PyMethodDef *def = core_methods; def->ml_name; def++) {
        PyObject *method = PyDescr_NewMethod((PyTypeObject *)cls, def);
        int rc = method ? PyObject_SetAttrString(cls, def->ml_name, method) : -1;
        Py_XDECREF(method);
        if (rc)
            return NULL;
    }
    return Py_NewRef(cls);
}

static PyMethodDef functions[] = {
    {"adopt", adopt, METH_O, "adopt(cls): have a subclass of CopyCore call its methods as fast as that does."},
    {NULL, NULL, 0, NULL},
};

int py_copy_register(PyObject *module)
{
    if (py_copy_names() || py_copy_vec_names())
        return -1;
    return py_add_type(module, &core_spec, &py_copy_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
