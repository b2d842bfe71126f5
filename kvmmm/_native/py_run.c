/* py_run.c: VcpuCore.run and once, the Python face of run.c.
 *
 * The loop stays in C: Python is called for the exits that need it, by the handlers set on the object,
 * and a handler's answer other than None ends the run and becomes its result. The GIL is released
 * around KVM_RUN only.
 */
#define _GNU_SOURCE 1
#include <stdarg.h>
#include <unistd.h>

#include "py.h"

/* An IN handler's answer goes to the guest; None reads as ones, like a port where nobody is. */
static int answer_in(struct kvm_run *run, PyObject *answer)
{
    uint64_t value = UINT64_MAX;
    if (answer != Py_None) {
        value = PyLong_AsUnsignedLongLongMask(answer);
        if (value == UINT64_MAX && PyErr_Occurred())
            return -1;
    }
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    for (uint32_t i = 0; i < run->io.count; i++)
        memcpy(data + i * run->io.size, &value, run->io.size);
    return 0;
}

static PyObject *call_value_handler(struct py_vcpu *self, PyObject *handler, PyObject *number)
{
    struct kvm_run *run = self->v->run;
    if (run->io.direction == KVM_EXIT_IO_IN) {
        PyObject *answer = PyObject_CallFunctionObjArgs(handler, number, Py_None, NULL);
        if (!answer)
            return NULL;
        int rc = answer_in(run, answer);
        Py_DECREF(answer);
        return rc ? NULL : Py_NewRef(Py_None);
    }
    PyObject *result = Py_NewRef(Py_None);
    uint32_t count = run->io.count, size_bytes = run->io.size;
    for (uint32_t i = 0; i < count && result == Py_None; i++) {
        uint32_t bits = 0;
        memcpy(&bits, (uint8_t *)run + run->io.data_offset + i * size_bytes, size_bytes);
        PyObject *value = PyLong_FromUnsignedLong(bits);
        Py_DECREF(result);
        if (!value)
            return NULL;
        result = PyObject_CallFunctionObjArgs(handler, number, value, NULL);
        Py_DECREF(value);
    }
    return result;
}

static PyObject *call_port_handler(struct py_vcpu *self)
{
    struct kvmmm_port *port = &self->v->ports[self->v->port_index];
    PyObject *exit = NULL, *handler = port->handler, *result;
    if (port->kind == KVMMM_PORT_KIND_VALUE && handler) {
        PyObject *number = Py_NewRef(self->port_numbers[self->v->port_index]);
        Py_INCREF(handler);
        result = call_value_handler(self, handler, number);
        Py_DECREF(handler);
        Py_DECREF(number);
        return result;
    }
    exit = py_io_exit_of(self);
    if (!exit || !handler)
        return exit; /* nobody to ask: the exit itself ends the run */
    Py_INCREF(handler);
    result = PyObject_CallFunctionObjArgs(handler, exit, NULL);
    Py_DECREF(handler);
    Py_DECREF(exit);
    return result;
}

static PyObject *call_or_return(PyObject *handler, PyObject *exit)
{
    if (!exit || !handler || handler == Py_None)
        return exit;
    Py_INCREF(handler); /* it may put another in its place */
    PyObject *result = PyObject_CallFunctionObjArgs(handler, exit, NULL);
    Py_DECREF(handler);
    Py_DECREF(exit);
    return result;
}

static PyObject *call_console_handler(struct py_vcpu *self)
{
    PyObject *handler = self->on_console;
    if (!handler || handler == Py_None)
        return Py_NewRef(Py_None);
    Py_INCREF(handler);
    PyObject *result = PyObject_CallNoArgs(handler);
    Py_DECREF(handler);
    return result;
}

/* An error which the layer above us defines and everybody above expects. */
static PyObject *raise_error(const char *name, PyObject *args)
{
    PyObject *errors = args ? PyImport_ImportModule("kvmmm.errors") : NULL;
    PyObject *type = errors ? PyObject_GetAttrString(errors, name) : NULL;
    PyObject *error = type ? PyObject_CallObject(type, args) : NULL;
    if (error)
        PyErr_SetObject(type, error);
    Py_XDECREF(error);
    Py_XDECREF(type);
    Py_XDECREF(errors);
    Py_XDECREF(args);
    return NULL;
}

PyObject *py_raise_ioctl_error(const char *ioctl, int err)
{
    return raise_error("IoctlError", Py_BuildValue("(ssi)", ioctl, "", err));
}

PyObject *py_raise_vcpu_error(const char *format, ...)
{
    va_list facts;
    va_start(facts, format);
    PyObject *text = PyUnicode_FromFormatV(format, facts);
    va_end(facts);
    return raise_error("VcpuError", text ? Py_BuildValue("(N)", text) : NULL);
}

static PyObject *serve_event(struct py_vcpu *self, int event)
{
    struct kvmmm_vcpu *v = self->v;
    switch (event) {
    case KVMMM_EV_IO:
        return call_port_handler(self);
    case KVMMM_EV_TRAP:
        return py_vcpu_serve_trap(self);
    case KVMMM_EV_SYSCALL:
        return py_vcpu_serve_syscall(self);
    case KVMMM_EV_MMIO:
        return call_or_return(self->on_mmio, py_mmio_exit_of(self));
    case KVMMM_EV_CONSOLE:
        kvmmm_vcpu_poll_console(v);
        return call_console_handler(self);
    case KVMMM_EV_STOPPED:
        return PyLong_FromLong(-(long)v->stop_reason);
    case KVMMM_EV_TICK:
        if (PyErr_CheckSignals())
            return NULL;
        return kvmmm_vcpu_console_tick(v) ? call_console_handler(self) : Py_NewRef(Py_None);
    case KVMMM_EV_COLD:
        return call_or_return(self->on_cold, PyLong_FromUnsignedLong(v->run->exit_reason));
    default:
        return py_raise_ioctl_error("KVM_RUN", -event);
    }
}

/* run(timeout_ns): until a handler answers something. once(timeout_ns): the next exit, unhandled by
 * Python. Both return IoExit, MmioExit, a handler's answer, an exit reason, or -enum kvmmm_stop. */
static PyObject *run_until(PyObject *op, PyObject *timeout, bool once)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    struct kvmmm_vcpu *v = py_vcpu_state(self);
    long long timeout_ns = PyLong_AsLongLong(timeout);
    if (!v || (timeout_ns == -1 && PyErr_Occurred()))
        return NULL;
    if (atomic_load(&v->tid)) {
        PyErr_SetString(PyExc_RuntimeError, "the vCPU is running already");
        return NULL;
    }
    self->handler_failed = false;
    int rc = kvmmm_vcpu_begin(v, timeout_ns);
    PyObject *result = rc ? py_raise_errno(-rc) : Py_NewRef(Py_None);
    while (result == Py_None) {
        int event;
        Py_BEGIN_ALLOW_THREADS
        event = kvmmm_vcpu_enter(v);
        Py_END_ALLOW_THREADS
        Py_DECREF(result);
        self->serving = event;
        if (once && (event == KVMMM_EV_IO || event == KVMMM_EV_TRAP || event == KVMMM_EV_SYSCALL))
            result = py_io_exit_of(self);
        else if (once && event == KVMMM_EV_MMIO)
            result = py_mmio_exit_of(self);
        else if (once && event == KVMMM_EV_COLD)
            result = PyLong_FromUnsignedLong(v->run->exit_reason);
        else
            result = serve_event(self, event);
        self->serving = 0;
        self->handler_failed = !result && event != KVMMM_EV_TICK && event > 0;
    }
    kvmmm_vcpu_end(v);
    return result;
}

PyObject *py_vcpu_run(PyObject *op, PyObject *timeout) { return run_until(op, timeout, false); }
PyObject *py_vcpu_once(PyObject *op, PyObject *timeout) { return run_until(op, timeout, true); }

/* Whether the access of the exit whose handler runs is still to be answered: it goes by kvm_run. */
static bool is_half_done(struct py_vcpu *self)
{
    return self->serving == KVMMM_EV_MMIO ||
           (self->serving == KVMMM_EV_IO && self->v->run->io.direction == KVM_EXIT_IO_IN);
}

/* complete_pending(): None when nothing is pending any more, else what nobody handles, or a handler's
 * answer. Within a handler (of an OUT, a trap, a system call), or while nothing runs. */
PyObject *py_vcpu_complete_pending(PyObject *op, PyObject *ignored)
{
    struct py_vcpu *self = (struct py_vcpu *)op;
    struct kvmmm_vcpu *v = py_vcpu_state(self);
    if (!v)
        return NULL;
    int here = gettid(), tid = atomic_load(&v->tid), serving = self->serving;
    if ((tid && tid != here) || is_half_done(self)) {
        PyErr_SetString(PyExc_RuntimeError, tid == here ? "the access at hand is not answered yet"
                                                        : "the vCPU is running already");
        return NULL;
    }
    atomic_store(&v->tid, here); /* nobody else may run it meanwhile */
    PyObject *result = Py_NewRef(Py_None);
    while (result == Py_None) {
        int event;
        Py_BEGIN_ALLOW_THREADS
        event = kvmmm_vcpu_complete(v);
        Py_END_ALLOW_THREADS
        if (!event)
            break;
        Py_DECREF(result);
        self->serving = event;
        result = serve_event(self, event);
    }
    self->serving = serving;
    atomic_store(&v->tid, tid);
    return result;
}
