/* py_exit.c: IoExit and MmioExit, the two exits on a hot path, as typed objects.
 *
 * One object of each kind is reused while nobody else holds it: making one costs more than an `if`.
 * All other exits are cold and decoded in Python (platform/kvm/exits.py).
 */
#include "py.h"

#include <structmember.h>

struct py_exit {
    PyObject_HEAD
    struct py_vcpu *vcpu; /* borrowed; the vCPU clears it when it goes */
    uint64_t n_enters;         /* the KVM_RUN that it is of; kvm_run holds that of the last one */
    unsigned long long address; /* port or gpa */
    unsigned int size_bytes;    /* of one access */
    unsigned int count;         /* of accesses: rep outs */
    char is_write;
};

PyTypeObject *py_io_exit_type, *py_mmio_exit_type;

/* Where kvm_run keeps this exit's bytes; NULL with ValueError when the vCPU has gone on. */
static uint8_t *data_of(struct py_exit *self)
{
    struct kvmmm_vcpu *v = self->vcpu ? self->vcpu->v : NULL;
    if (!v || self->n_enters != v->n_enters) {
        PyErr_SetString(PyExc_ValueError, "this exit is over: the vCPU has gone on since");
        return NULL;
    }
    if (Py_TYPE((PyObject *)self) == py_mmio_exit_type)
        return v->run->mmio.data;
    return (uint8_t *)v->run + v->run->io.data_offset;
}

static PyObject *exit_get_data(PyObject *op, void *closure)
{
    struct py_exit *self = (struct py_exit *)op;
    uint8_t *data = data_of(self);
    if (!data)
        return NULL;
    return PyBytes_FromStringAndSize((char *)data, (Py_ssize_t)self->size_bytes * self->count);
}

static PyObject *exit_get_value(PyObject *op, void *closure)
{
    struct py_exit *self = (struct py_exit *)op;
    uint8_t *data = data_of(self);
    if (!data)
        return NULL;
    uint64_t value = 0;
    memcpy(&value, data, self->size_bytes <= 8 ? self->size_bytes : 8);
    return PyLong_FromUnsignedLongLong(value);
}

static int exit_set_value(PyObject *op, PyObject *object, void *closure)
{
    struct py_exit *self = (struct py_exit *)op;
    uint8_t *data = data_of(self);
    if (!data)
        return -1;
    if (!object || self->is_write) {
        PyErr_SetString(PyExc_AttributeError, "only an IN or an MMIO read can be given a value");
        return -1;
    }
    uint64_t value = PyLong_AsUnsignedLongLongMask(object);
    if (value == UINT64_MAX && PyErr_Occurred())
        return -1;
    for (unsigned int i = 0; i < self->count; i++)
        memcpy(data + i * self->size_bytes, &value, self->size_bytes <= 8 ? self->size_bytes : 8);
    return 0;
}

static PyObject *mmio_complete(PyObject *op, PyObject *hva_object)
{
    struct py_exit *self = (struct py_exit *)op;
    uint8_t *data = data_of(self);
    if (!data)
        return NULL;
    uintptr_t hva = PyLong_AsSize_t(hva_object);
    if (hva == (uintptr_t)-1 && PyErr_Occurred())
        return NULL;
    /* Page by page is the caller's care; KVM splits what crosses one. */
    if (self->is_write)
        memcpy((void *)hva, data, self->size_bytes);
    else
        memcpy(data, (void *)hva, self->size_bytes);
    Py_RETURN_NONE;
}

static PyObject *io_repr(PyObject *op)
{
    struct py_exit *self = (struct py_exit *)op;
    return PyUnicode_FromFormat("IoExit(%s port 0x%x, %u byte(s) x %u)", self->is_write ? "out to" : "in from",
                                (int)self->address, self->size_bytes, self->count);
}

static PyObject *mmio_repr(PyObject *op)
{
    struct py_exit *self = (struct py_exit *)op;
    return PyUnicode_FromFormat("MmioExit(%s of %u byte(s) at gpa %p)", self->is_write ? "write" : "read",
                                self->size_bytes, (void *)self->address);
}

static void exit_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

#define FIELD(name, type, field, doc) {name, type, offsetof(struct py_exit, field), READONLY, doc}

static PyMemberDef io_members[] = {
    FIELD("port", T_ULONGLONG, address, "I/O port."),
    FIELD("size_bytes", T_UINT, size_bytes, "Bytes of one access: 1, 2 or 4."),
    FIELD("count", T_UINT, count, "Accesses: above 1 for rep ins and outs."),
    FIELD("is_write", T_BOOL, is_write, "Whether it is OUT."),
    {NULL, 0, 0, 0, NULL},
};

static PyMemberDef mmio_members[] = {
    FIELD("gpa", T_ULONGLONG, address, "Guest-physical address of the first byte."),
    FIELD("size_bytes", T_UINT, size_bytes, "Bytes of this fragment, at most 8."),
    FIELD("is_write", T_BOOL, is_write, "Whether it is a write."),
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef exit_getset[] = {
    {"data", exit_get_data, NULL, "The bytes as they stand in kvm_run.", NULL},
    {"value", exit_get_value, exit_set_value, "The same as a little-endian number; set it to answer a read.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef mmio_methods[] = {
    {"complete", mmio_complete, METH_O, "Perform the access by hand on the byte at this hva."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot io_slots[] = {
    {Py_tp_dealloc, exit_dealloc}, {Py_tp_members, io_members}, {Py_tp_getset, exit_getset},
    {Py_tp_repr, io_repr},         {0, NULL},
};

static PyType_Slot mmio_slots[] = {
    {Py_tp_dealloc, exit_dealloc}, {Py_tp_members, mmio_members}, {Py_tp_getset, exit_getset},
    {Py_tp_methods, mmio_methods}, {Py_tp_repr, mmio_repr},       {0, NULL},
};

static PyType_Spec io_spec = {
    .name = "kvmmm._core.IoExit",
    .basicsize = sizeof(struct py_exit),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = io_slots,
};

static PyType_Spec mmio_spec = {
    .name = "kvmmm._core.MmioExit",
    .basicsize = sizeof(struct py_exit),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = mmio_slots,
};

/* *slot's object when nobody else has it, else a new one that takes its place. Borrowed. */
static struct py_exit *fresh(PyObject **slot, PyTypeObject *type)
{
    if (*slot && Py_REFCNT(*slot) == 1)
        return (struct py_exit *)*slot;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *exit = alloc(type, 0);
    if (!exit)
        return NULL;
    if (*slot) {
        py_exit_orphan(*slot);
        Py_DECREF(*slot);
    }
    *slot = exit;
    return (struct py_exit *)exit;
}

PyObject *py_io_exit_of(struct py_vcpu *vcpu)
{
    struct py_exit *exit = fresh(&vcpu->io_exit, py_io_exit_type);
    if (!exit)
        return NULL;
    struct kvm_run *run = vcpu->v->run;
    exit->vcpu = vcpu;
    exit->n_enters = vcpu->v->n_enters;
    exit->address = run->io.port;
    exit->size_bytes = run->io.size;
    exit->count = run->io.count;
    exit->is_write = run->io.direction == KVM_EXIT_IO_OUT;
    if (!exit->is_write) /* unless somebody answers, as a port where nobody is */
        memset((uint8_t *)run + run->io.data_offset, 0xff, (size_t)exit->size_bytes * exit->count);
    return Py_NewRef((PyObject *)exit);
}

PyObject *py_mmio_exit_of(struct py_vcpu *vcpu)
{
    struct py_exit *exit = fresh(&vcpu->mmio_exit, py_mmio_exit_type);
    if (!exit)
        return NULL;
    struct kvm_run *run = vcpu->v->run;
    exit->vcpu = vcpu;
    exit->n_enters = vcpu->v->n_enters;
    exit->address = run->mmio.phys_addr;
    exit->size_bytes = run->mmio.len <= 8 ? run->mmio.len : 8;
    exit->count = 1;
    exit->is_write = run->mmio.is_write != 0;
    return Py_NewRef((PyObject *)exit);
}

void py_exit_orphan(PyObject *exit) { ((struct py_exit *)exit)->vcpu = NULL; }

int py_exit_register(PyObject *module)
{
    return py_add_type(module, &io_spec, &py_io_exit_type) ||
           py_add_type(module, &mmio_spec, &py_mmio_exit_type);
}
