/* py_trap.c: on_fault, on_trap and on_syscall, called with what trap.c decoded.
 *
 * Registers are those of the interrupted program when Python is called, so None just goes on with it.
 */
#include "py.h"

enum { VECTOR_PF = 14, PF_WRITE = 1 << 1, PF_RESERVED = 1 << 3, PF_FETCH = 1 << 4 };
enum { MAX_REPEATS = 64 };
enum { READ = 1, WRITE = 2, EXECUTE = 4 }; /* kvmmm/hostarch/access.py */

static PyObject *call_with(PyObject *handler, PyObject *one, PyObject *two)
{
    PyObject *result = one && two ? PyObject_CallFunctionObjArgs(handler, one, two, NULL) : NULL;
    Py_XDECREF(one);
    Py_XDECREF(two);
    return result;
}

/* The port's own handler is asked about what is no exception of the program's; it decides, or nobody. */
static PyObject *serve_strange_trap(struct py_vcpu *self, const struct kvmmm_trap *trap)
{
    PyObject *handler = self->v->ports[self->v->port_index].handler;
    if (!handler)
        return py_raise_vcpu_error(
            "an exception came from where none can be served: vector %d, error code %p, cs %p, rip %p, cr2 %p; "
            "the exception stubs or the ring-0 stack are not what set_trap_area was told",
            (int)trap->vector, (void *)trap->error_code, (void *)trap->cs, (void *)trap->rip, (void *)trap->cr2);
    PyObject *exit = py_io_exit_of(self);
    if (!exit)
        return NULL;
    Py_INCREF(handler);
    PyObject *result = PyObject_CallFunctionObjArgs(handler, exit, NULL);
    Py_DECREF(handler);
    Py_DECREF(exit);
    return result;
}

/* on_fault raised: on_refused(exception, addr) says what becomes of it, if there is one. */
static PyObject *refuse(struct py_vcpu *self)
{
    PyObject *handler = self->on_refused, *type, *value, *traceback;
    if (!handler || handler == Py_None || !PyErr_ExceptionMatches(PyExc_OSError))
        return NULL;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    Py_INCREF(handler);
    PyObject *result = call_with(handler, value, PyLong_FromUnsignedLongLong(self->fault_addr));
    Py_DECREF(handler);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return result;
}

/* Whose turn it is to serve a #PF: on_fault's, or on_repeated's once the same came so often in a row. */
static PyObject *fault_handler(struct py_vcpu *self, const struct kvmmm_trap *trap)
{
    self->n_faults++;
    if (trap->cr2 != self->fault_addr || trap->rip != self->fault_rip) {
        self->fault_addr = trap->cr2;
        self->fault_rip = trap->rip;
        self->n_repeats = 0;
    } else if (++self->n_repeats % MAX_REPEATS == 0 && self->on_repeated && self->on_repeated != Py_None) {
        return self->on_repeated;
    }
    return self->on_fault;
}

PyObject *py_vcpu_serve_trap(struct py_vcpu *self)
{
    struct kvmmm_trap trap;
    if (!kvmmm_vcpu_read_trap(self->v, &trap))
        return serve_strange_trap(self, &trap);
    /* A reserved bit in a table is no missing page: nothing that the mm does would help. In the upper
     * half it may be how a KVM forbids what it keeps to itself (PML4[256]). */
    bool is_fault = trap.vector == VECTOR_PF && (!(trap.error_code & PF_RESERVED) || trap.cr2 >> 63);
    PyObject *handler = is_fault ? self->on_fault : self->on_trap;
    if (!handler || handler == Py_None)
        return py_io_exit_of(self); /* nobody to ask: the exit itself ends the run, undecoded */
    int rc = kvmmm_vcpu_leave_trap(self->v, &trap);
    if (rc)
        return py_raise_ioctl_error("KVM_GET_SREGS", -rc);
    PyObject *result;
    if (is_fault)
        handler = fault_handler(self, &trap);
    Py_INCREF(handler);
    if (is_fault) {
        long access = trap.error_code & PF_WRITE ? WRITE : trap.error_code & PF_FETCH ? EXECUTE : READ;
        result = call_with(handler, PyLong_FromUnsignedLongLong(trap.cr2), PyLong_FromLong(access));
        if (!result)
            result = refuse(self);
    } else {
        result = call_with(handler, PyLong_FromUnsignedLongLong(trap.vector),
                           PyLong_FromUnsignedLongLong(trap.error_code));
    }
    Py_DECREF(handler);
    return result;
}

/* An int goes to rax: -2^63 to 2^64 - 1. */
static PyObject *take_answer(struct kvm_run *run, PyObject *answer)
{
    int overflow;
    uint64_t bits = (uint64_t)PyLong_AsLongLongAndOverflow(answer, &overflow);
    if (overflow)
        bits = PyLong_AsUnsignedLongLong(answer);
    Py_DECREF(answer);
    if (overflow && PyErr_Occurred())
        return NULL;
    run->s.regs.regs.rax = bits;
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    return Py_NewRef(Py_None);
}

PyObject *py_vcpu_serve_syscall(struct py_vcpu *self)
{
    PyObject *handler = self->on_syscall;
    if (!handler || handler == Py_None)
        return py_io_exit_of(self);
    int rc = kvmmm_vcpu_leave_syscall(self->v);
    if (rc)
        return py_raise_ioctl_error("KVM_GET_SREGS", -rc);
    PyObject *number = PyLong_FromUnsignedLongLong(self->v->run->s.regs.regs.rax);
    if (!number)
        return NULL;
    Py_INCREF(handler);
    PyObject *answer = PyObject_CallFunctionObjArgs(handler, number, NULL);
    Py_DECREF(handler);
    Py_DECREF(number);
    return answer && PyLong_Check(answer) ? take_answer(self->v->run, answer) : answer;
}
