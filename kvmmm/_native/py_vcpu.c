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
    v->gate = &v->own_gate;
    v->tss_type = 11; /* busy, as VMX wants it */
    v->sregs_asked = UINT64_MAX;
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
    Py_CLEAR(self->on_fault);
    Py_CLEAR(self->on_trap);
    Py_CLEAR(self->on_syscall);
    Py_CLEAR(self->on_refused);
    Py_CLEAR(self->on_repeated);
    if (self->v)
        self->v->gate = &self->v->own_gate;
    Py_CLEAR(self->gate);
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
    Py_VISIT(self->on_fault);
    Py_VISIT(self->on_trap);
    Py_VISIT(self->on_syscall);
    Py_VISIT(self->on_refused);
    Py_VISIT(self->on_repeated);
    Py_VISIT(self->gate);
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
    while (self->v && self->v->n_pins) { /* a pause is looking whether it has left: it has */
        Py_BEGIN_ALLOW_THREADS
        usleep(100);
        Py_END_ALLOW_THREADS
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
    return PyBool_FromLong(v && atomic_load(&v->where) == KVMMM_INSIDE);
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
    {"complete_pending", py_vcpu_complete_pending, METH_NOARGS,
     "Complete what the last exit left pending, with the handlers, without running the guest."},
    {"set_root", py_vcpu_set_root, METH_O, "Have CR3 be this guest-physical address; any thread."},
    {"set_gate", py_vcpu_set_gate, METH_O, "Belong to a PauseGate."},
    {"set_tss_type", py_vcpu_set_tss_type, METH_O, "The type that TR is loaded with."},
    {"set_trap_area", py_vcpu_set_trap_area, METH_VARARGS,
     "Where the exception stubs lie (gva), and the top of the ring-0 stack (hva)."},
    {"set_syscall_stub", py_vcpu_set_syscall_stub, METH_O, "Where the SYSCALL stub lies (gva)."},
    {"fetch_sregs", py_vcpu_fetch_sregs, METH_NOARGS, "Bring kvm_run's special registers up to date."},
    {"sregs_written", py_vcpu_sregs_written, METH_O,
     "kvm_run's special registers were written: load them at the next run."},
    {"registers_replaced", py_vcpu_registers_replaced, METH_O,
     "KVM's registers were set by ioctl: bring kvm_run's up to date."},
    {"stop", vcpu_stop, METH_NOARGS, "Ask the vCPU to stop, from any thread."},
    {"console_take", py_vcpu_console_take, METH_NOARGS, "What the guest printed since the last call."},
    {"set_console", py_vcpu_set_console, METH_VARARGS, "Where the shared console ring lies."},
    {"set_coalesced", py_vcpu_set_coalesced, METH_O, "Page of kvm_run's mapping with KVM's ring."},
    {"statistics", vcpu_statistics, METH_NOARGS, "Counts and times so far, as a dict."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef vcpu_members[] = {
    {"regs", T_OBJECT_EX, offsetof(struct py_vcpu, registers), READONLY, "General registers."},
    {"on_mmio", T_OBJECT, offsetof(struct py_vcpu, on_mmio), 0, "handler(MmioExit)."},
    {"on_cold", T_OBJECT, offsetof(struct py_vcpu, on_cold), 0, "handler(exit_reason)."},
    {"on_console", T_OBJECT, offsetof(struct py_vcpu, on_console), 0, "handler(): drain it."},
    {"on_fault", T_OBJECT, offsetof(struct py_vcpu, on_fault), 0, "handler(addr, access): #PF."},
    {"on_refused", T_OBJECT, offsetof(struct py_vcpu, on_refused), 0, "handler(error, addr): on_fault raised an OSError."},
    {"on_repeated", T_OBJECT, offsetof(struct py_vcpu, on_repeated), 0,
     "handler(addr, access): instead of on_fault, when the same #PF came 64 times in a row."},
    {"n_faults", T_ULONGLONG, offsetof(struct py_vcpu, n_faults), READONLY, "#PFs so far."},
    {"on_trap", T_OBJECT, offsetof(struct py_vcpu, on_trap), 0, "handler(vector, error_code)."},
    {"on_syscall", T_OBJECT, offsetof(struct py_vcpu, on_syscall), 0, "handler(number); rax."},
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
