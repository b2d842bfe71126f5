/* py.h: the Python types of the core, limited API 3.11. Only py_*.c and module.c include it. */
#ifndef KVMMM_PY_H
#define KVMMM_PY_H

#ifndef _CFFI_NO_LIMITED_API
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

/* A vCPU: file descriptor, kvm_run mapping, port table, handlers. Python subclasses it. */
struct py_vcpu {
    PyObject_HEAD
    struct kvmmm_vcpu *v; /* NULL once closed */
    PyObject *registers;
    PyObject *io_exit, *mmio_exit; /* reused while nobody else holds them */
    PyObject *on_mmio, *on_cold, *on_console;
    PyObject *on_fault, *on_trap, *on_syscall;
    PyObject *on_refused, *on_repeated;
    /* The last #PF, and how often it has come in a row: a sign that nobody makes progress. */
    uint64_t fault_rip, fault_addr, n_repeats, n_faults;
    PyObject *gate; /* keeps v->gate's memory, or NULL */
    int serving;    /* enum kvmmm_event whose handler runs, 0 outside of handlers */
    bool handler_failed; /* the last run ended by an exception of a handler's */
    PyObject *port_numbers[KVMMM_MAX_PORTS];
};

extern PyTypeObject *py_mapping_type, *py_registers_type, *py_io_exit_type, *py_mmio_exit_type,
    *py_vcpu_type, *py_gate_type;

int py_mapping_register(PyObject *module);
int py_exit_register(PyObject *module);
int py_registers_register(PyObject *module);
int py_vcpu_register(PyObject *module);
int py_gate_register(PyObject *module);
int py_segment_register(PyObject *module);
int py_mapper_register(PyObject *module);

/* The typed exit for what kvm_run holds now; a new reference. */
PyObject *py_io_exit_of(struct py_vcpu *vcpu);
PyObject *py_mmio_exit_of(struct py_vcpu *vcpu);
PyObject *py_registers_new(struct py_vcpu *vcpu);

/* Exits and registers point back to their vCPU without holding it. The vCPU says when that ends:
 * before it goes, and for an exit when the next one of its kind is made while somebody keeps it. */
void py_exit_orphan(PyObject *exit);
void py_registers_orphan(PyObject *registers);

/* The vCPU's C state, or NULL with ValueError set when it is closed (or the pointer was cleared). */
struct kvmmm_vcpu *py_vcpu_state(struct py_vcpu *vcpu);

/* OSError with that errno; NULL. */
PyObject *py_raise_errno(int err);

/* The gate inside a PauseGate. */
struct kvmmm_gate *py_gate_of(PyObject *gate);

/* kvmmm.errors.VcpuError with that text, or IoctlError; NULL. */
PyObject *py_raise_vcpu_error(const char *format, ...);
PyObject *py_raise_ioctl_error(const char *ioctl, int err);

/* What a handler answers, for an exit that a stub made (py_trap.c). */
PyObject *py_vcpu_serve_trap(struct py_vcpu *self);
PyObject *py_vcpu_serve_syscall(struct py_vcpu *self);

/* VcpuCore's methods of the same names: py_run.c, */
PyObject *py_vcpu_run(PyObject *op, PyObject *timeout);
PyObject *py_vcpu_once(PyObject *op, PyObject *timeout);
PyObject *py_vcpu_complete_pending(PyObject *op, PyObject *ignored);
/* py_control.c, */
PyObject *py_vcpu_set_root(PyObject *op, PyObject *gpa);
PyObject *py_vcpu_set_gate(PyObject *op, PyObject *gate);
PyObject *py_vcpu_set_tss_type(PyObject *op, PyObject *type);
PyObject *py_vcpu_set_trap_area(PyObject *op, PyObject *args);
PyObject *py_vcpu_set_syscall_stub(PyObject *op, PyObject *gva);
PyObject *py_vcpu_fetch_sregs(PyObject *op, PyObject *ignored);
PyObject *py_vcpu_sregs_written(PyObject *op, PyObject *with_root);
PyObject *py_vcpu_registers_replaced(PyObject *op, PyObject *with_general);
/* py_console.c. */
PyObject *py_vcpu_console_take(PyObject *op, PyObject *ignored);
PyObject *py_vcpu_set_console(PyObject *op, PyObject *args);
PyObject *py_vcpu_set_coalesced(PyObject *op, PyObject *page_object);

/* PyType_FromModuleAndSpec, kept in *slot and added to the module under its name. */
int py_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **slot);

#endif
