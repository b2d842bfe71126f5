/* py_vcpu.c: VcpuCore, a vCPU as a Python object: its life, its ports, its figures. It runs in py_run.c. */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "py.h"

#include <structmember.h>

PyTypeObject *py_vcpu_type;

struct kvmmm_vcpu *py_vcpu_state(struct py_vcpu *vcpu)
{
    if (!vcpu || !vcpu->v) {
        PyErr_SetString(PyExc_ValueError, "the vCPU is closed");
        return NULL;
    }
    return vcpu->v;
}

static struct kvmmm_vcpu *state_of(PyObject *op) { return py_vcpu_state((struct py_vcpu *)op); }

PyObject *py_raise_errno(int err)
{
    errno = err;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *vcpu_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

/* VcpuCore(fd, run_bytes): takes the descriptor over, unless it raises. */
static int vcpu_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    int fd;
    Py_ssize_t run_bytes;
    if (self->v) {
        PyErr_SetString(PyExc_ValueError, "already initialised");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "in", &fd, &run_bytes))
        return -1;
    if (!self->registers)
        self->registers = py_registers_new(self);
    struct kvmmm_vcpu *v = self->registers ? calloc(1, sizeof *v) : NULL;
    if (!v) {
        PyErr_NoMemory();
        return -1;
    }
    v->run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (v->run == MAP_FAILED) {
        int err = errno;
        free(v);
        py_raise_errno(err);
        return -1;
    }
    v->fd = fd;
    v->run_bytes = (size_t)run_bytes;
    v->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    self->v = v;
    return 0;
}

static void drop_exit(PyObject **slot)
{
    if (*slot)
        py_exit_orphan(*slot);
    Py_CLEAR(*slot);
}

static int vcpu_clear(PyObject *op)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    Py_CLEAR(self->on_mmio);
    Py_CLEAR(self->on_cold);
    Py_CLEAR(self->on_console);
    for (uint32_t i = 0; self->v && i < self->v->n_ports; i++) {
        PyObject *handler = self->v->ports[i].handler;
        self->v->ports[i].handler = NULL;
        self->v->ports[i].kind = 0;
        Py_CLEAR(self->port_numbers[i]);
        Py_XDECREF(handler);
    }
    return 0;
}

static int vcpu_traverse(PyObject *op, visitproc visit, void *arg)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->on_mmio);
    Py_VISIT(self->on_cold);
    Py_VISIT(self->on_console);
    for (uint32_t i = 0; self->v && i < self->v->n_ports; i++)
        Py_VISIT((PyObject *)self->v->ports[i].handler);
    return 0;
}

/* The mapping before the descriptor; the VM's descriptor is the caller's, and goes after ours. */
static void release(struct py_vcpu *self)
{
    vcpu_clear((PyObject *)self);
    drop_exit(&self->io_exit);
    drop_exit(&self->mmio_exit);
    if (self->registers) /* kept, so that who asks for one hears that the vCPU is closed */
        py_registers_orphan(self->registers);
    if (!self->v)
        return;
    munmap(self->v->run, self->v->run_bytes);
    close(self->v->fd);
    free(self->v);
    self->v = NULL;
}

static void vcpu_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    release((struct py_vcpu *)op);
    Py_CLEAR(((struct py_vcpu *)op)->registers);
    freefunc free_op = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_op(op);
    Py_DECREF(type);
}

static PyObject *vcpu_close(PyObject *op, PyObject *ignored)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    if (self->v && atomic_load(&self->v->tid)) {
        PyErr_SetString(PyExc_RuntimeError, "the vCPU is running: stop it first");
        return NULL;
    }
    release(self);
    Py_RETURN_NONE;
}

/* ---- Ports ------------------------------------------------------------------------------------ */

/* set_port(port, kind, handler): the last word for a port counts. */
static PyObject *vcpu_set_port(PyObject *op, PyObject *args)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    int port;
    unsigned short kind;
    PyObject *handler;
    if (!PyArg_ParseTuple(args, "iHO", &port, &kind, &handler) || !state_of(op))
        return NULL;
    if (port < 0 || port > UINT16_MAX)
        return PyErr_Format(PyExc_ValueError, "%d is no port: they have 16 bits", port);
    struct kvmmm_vcpu *v = self->v;
    uint32_t i = 0;
    while (i < v->n_ports && v->ports[i].port != port)
        i++;
    if (i == KVMMM_MAX_PORTS)
        return PyErr_Format(PyExc_ValueError, "no more than %d ports can have handlers", KVMMM_MAX_PORTS);
    PyObject *number = PyLong_FromLong(port);
    if (!number)
        return NULL;
    PyObject *old_number = self->port_numbers[i], *old_handler = v->ports[i].handler;
    self->port_numbers[i] = number;
    v->ports[i] = (struct kvmmm_port){(uint16_t)port, kind, handler == Py_None ? NULL : Py_NewRef(handler)};
    if (i == v->n_ports)
        v->n_ports++;
    Py_XDECREF(old_number);
    Py_XDECREF(old_handler);
    Py_RETURN_NONE;
}

/* ---- Running ---------------------------------------------------------------------------------- */

static PyObject *vcpu_stop(PyObject *op, PyObject *ignored)
{
    struct kvmmm_vcpu *v = state_of(op);
    if (!v)
        return NULL;
    kvmmm_vcpu_stop(v);
    Py_RETURN_NONE;
}

static PyObject *vcpu_console_take(PyObject *op, PyObject *ignored)
{
    struct kvmmm_vcpu *v = state_of(op);
    if (!v)
        return NULL;
    int64_t pending = kvmmm_console_pending(&v->console);
    if (pending == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    PyObject *bytes = pending > 0 ? PyBytes_FromStringAndSize(NULL, pending) : NULL;
    if (pending > 0 && !bytes)
        return NULL;
    int64_t n = pending < 0 ? pending
                            : kvmmm_console_take(&v->console, (uint8_t *)PyBytes_AsString(bytes), pending);
    if (n < 0) {
        Py_XDECREF(bytes);
        return py_raise_errno((int)-n);
    }
    if (n == pending)
        return bytes;
    /* Between the two calls the guest may have taken its head back (several vCPUs, a wild write). */
    PyObject *fewer = PyBytes_FromStringAndSize(PyBytes_AsString(bytes), n);
    Py_DECREF(bytes);
    return fewer;
}

/* set_console(shared_hva, ring_hva, ring_bytes) */
static PyObject *vcpu_set_console(PyObject *op, PyObject *args)
{
    struct kvmmm_vcpu *v = state_of(op);
    Py_ssize_t shared, ring;
    unsigned int ring_bytes;
    if (!v || !PyArg_ParseTuple(args, "nnI", &shared, &ring, &ring_bytes))
        return NULL;
    v->console.shared = (struct kvmmm_console *)shared;
    v->console.ring = (const uint8_t *)ring;
    v->console.ring_bytes = ring_bytes;
    Py_RETURN_NONE;
}

/* set_coalesced(page): the ring that KVM keeps for the VM, that many pages into our mapping. */
static PyObject *vcpu_set_coalesced(PyObject *op, PyObject *page_object)
{
    struct kvmmm_vcpu *v = state_of(op);
    size_t offset = PyLong_AsSize_t(page_object) * 4096;
    if (!v || PyErr_Occurred())
        return NULL;
    if (offset + 4096 > v->run_bytes)
        return py_raise_errno(EINVAL);
    v->console.coalesced_max = (4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio);
    v->console.coalesced = (struct kvm_coalesced_mmio_ring *)((uint8_t *)v->run + offset);
    kvmmm_vcpu_poll_console(v);
    Py_RETURN_NONE;
}

/* ---- Facts ------------------------------------------------------------------------------------ */

static PyObject *vcpu_statistics(PyObject *op, PyObject *ignored)
{
    struct kvmmm_vcpu *v = state_of(op);
    if (!v)
        return NULL;
    PyObject *exits = PyDict_New();
    for (long i = 0; exits && i < KVMMM_N_REASONS; i++) {
        PyObject *key, *value;
        if (!v->exits[i])
            continue;
        key = PyLong_FromLong(i);
        value = PyLong_FromUnsignedLongLong(v->exits[i]);
        if (!key || !value || PyDict_SetItem(exits, key, value))
            Py_CLEAR(exits);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    if (!exits)
        return NULL;
    return Py_BuildValue("{s:N,s:K,s:K,s:K,s:K,s:K,s:K}", "exits", exits, "ignored_ports",
                         (unsigned long long)v->n_ignored_ports, "interrupted",
                         (unsigned long long)v->n_interrupted, "coalesced_bytes",
                         (unsigned long long)v->console.n_coalesced, "legacy_bytes",
                         (unsigned long long)v->console.n_legacy_total, "guest_ns",
                         (unsigned long long)v->guest_ns, "handler_ns",
                         (unsigned long long)v->handler_ns);
}

static PyObject *get_run_hva(PyObject *op, void *closure)
{
    struct kvmmm_vcpu *v = state_of(op);
    return v ? PyLong_FromSize_t((size_t)v->run) : NULL;
}

static PyObject *get_fd(PyObject *op, void *closure)
{
    struct kvmmm_vcpu *v = state_of(op);
    return v ? PyLong_FromLong(v->fd) : NULL;
}

static PyObject *get_thread_id(PyObject *op, void *closure)
{
    struct kvmmm_vcpu *v = ((struct py_vcpu *)op)->v;
    return PyLong_FromLong(v ? atomic_load(&v->tid) : 0);
}

/* For handlers that wait for something: whether the run should end now. */
static PyObject *get_is_stopping(PyObject *op, void *closure)
{
    struct kvmmm_vcpu *v = ((struct py_vcpu *)op)->v;
    return PyBool_FromLong(v && (atomic_load(&v->stop) ||
                                 (v->deadline_ns && kvmmm_now_ns() >= v->deadline_ns)));
}

static PyObject *get_in_guest(PyObject *op, void *closure)
{
    struct kvmmm_vcpu *v = ((struct py_vcpu *)op)->v;
    return PyBool_FromLong(v && atomic_load(&v->in_guest));
}

static PyObject *get_timed(PyObject *op, void *closure)
{
    struct kvmmm_vcpu *v = state_of(op);
    return v ? PyBool_FromLong(v->timed) : NULL;
}

static int set_timed(PyObject *op, PyObject *value, void *closure)
{
    struct kvmmm_vcpu *v = state_of(op);
    if (!v)
        return -1;
    v->timed = value && PyObject_IsTrue(value) == 1;
    return 0;
}

static PyMethodDef vcpu_methods[] = {
    {"close", vcpu_close, METH_NOARGS, "Unmap kvm_run and close the descriptor; idempotent."},
    {"set_port", vcpu_set_port, METH_VARARGS, "Give a port a kind and a handler."},
    {"run", py_vcpu_run, METH_O, "Run until a handler answers; timeout in ns, 0 for none."},
    {"once", py_vcpu_once, METH_O, "Run until the next exit; timeout in ns, 0 for none."},
    {"stop", vcpu_stop, METH_NOARGS, "Ask the vCPU to stop, from any thread."},
    {"console_take", vcpu_console_take, METH_NOARGS, "What the guest printed since the last call."},
    {"set_console", vcpu_set_console, METH_VARARGS, "Where the shared console ring lies."},
    {"set_coalesced", vcpu_set_coalesced, METH_O, "Page of kvm_run's mapping with KVM's ring."},
    {"statistics", vcpu_statistics, METH_NOARGS, "Counts and times so far, as a dict."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef vcpu_members[] = {
    {"regs", T_OBJECT_EX, offsetof(struct py_vcpu, registers), READONLY, "General registers."},
    {"on_mmio", T_OBJECT, offsetof(struct py_vcpu, on_mmio), 0, "handler(MmioExit)."},
    {"on_cold", T_OBJECT, offsetof(struct py_vcpu, on_cold), 0, "handler(exit_reason)."},
    {"on_console", T_OBJECT, offsetof(struct py_vcpu, on_console), 0, "handler(): drain it."},
    {"handler_failed", T_BOOL, offsetof(struct py_vcpu, handler_failed), READONLY,
     "Whether the last run ended by an exception of a handler, with its access half done."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef vcpu_getset[] = {
    {"run_hva", get_run_hva, NULL, "Host address of struct kvm_run.", NULL},
    {"fd", get_fd, NULL, "The vCPU's file descriptor.", NULL},
    {"thread_id", get_thread_id, NULL, "Thread that runs it now; 0 for none.", NULL},
    {"is_stopping", get_is_stopping, NULL, "Whether a stop or the deadline has come.", NULL},
    {"in_guest", get_in_guest, NULL, "Whether it is inside KVM_RUN.", NULL},
    {"timed", get_timed, set_timed, "Whether time in guest and handlers is measured.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot vcpu_slots[] = {
    {Py_tp_new, vcpu_new},           {Py_tp_init, vcpu_init},       {Py_tp_dealloc, vcpu_dealloc},
    {Py_tp_traverse, vcpu_traverse}, {Py_tp_clear, vcpu_clear},     {Py_tp_methods, vcpu_methods},
    {Py_tp_members, vcpu_members},   {Py_tp_getset, vcpu_getset},   {0, NULL},
};

static PyType_Spec vcpu_spec = {
    .name = "kvmmm._core.VcpuCore",
    .basicsize = sizeof(struct py_vcpu),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = vcpu_slots,
};

int py_vcpu_register(PyObject *module) { return py_add_type(module, &vcpu_spec, &py_vcpu_type); }
