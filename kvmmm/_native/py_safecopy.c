/* py_safecopy.c: the fault-safe copies on plain host addresses, as functions of the module. */
#include "py_copy.h"

/* Shorter than this a copy takes less time than giving the GIL away and getting it back. */
enum { RELEASE_BYTES = 64 << 10 };

/* Exactly n ints, each in [0, 2**64). */
static bool parse(PyObject *const *args, Py_ssize_t n_args, uint64_t *values, Py_ssize_t n)
{
    if (n_args != n) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", n, n_args);
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        values[i] = PyLong_AsUnsignedLongLong(args[i]);
        if (values[i] == UINT64_MAX && PyErr_Occurred())
            return false;
    }
    return true;
}

static PyObject *moved(size_t done, const struct kvmmm_fault *fault)
{
    return Py_BuildValue("KiK", (unsigned long long)done, fault->signal, (unsigned long long)fault->addr);
}

static PyObject *word(bool done, uint32_t old, const struct kvmmm_fault *fault)
{
    if (done)
        return Py_BuildValue("IiK", old, 0, 0ull);
    return Py_BuildValue("OiK", Py_None, fault->signal, (unsigned long long)fault->addr);
}

/* safe_copy(dst_hva, src_hva, n_bytes) -> (done, signal, fault_hva) */
static PyObject *safe_copy(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t v[3];
    if (!parse(args, n_args, v, 3))
        return NULL;
    struct kvmmm_fault fault = {0};
    size_t done;
    if (v[2] < RELEASE_BYTES) {
        done = kvmmm_copy((void *)v[0], (const void *)v[1], v[2], &fault);
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = kvmmm_copy((void *)v[0], (const void *)v[1], v[2], &fault);
        Py_END_ALLOW_THREADS
    }
    return moved(done, &fault);
}

/* safe_zero(dst_hva, n_bytes) -> (done, signal, fault_hva) */
static PyObject *safe_zero(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t v[2];
    if (!parse(args, n_args, v, 2))
        return NULL;
    struct kvmmm_fault fault = {0};
    size_t done;
    if (v[1] < RELEASE_BYTES) {
        done = kvmmm_zero((void *)v[0], v[1], &fault);
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = kvmmm_zero((void *)v[0], v[1], &fault);
        Py_END_ALLOW_THREADS
    }
    return moved(done, &fault);
}

/* safe_swap_uint32(hva, new) -> (old | None, signal, fault_hva) */
static PyObject *safe_swap_uint32(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t v[2];
    uint32_t old = 0;
    struct kvmmm_fault fault = {0};
    if (!parse(args, n_args, v, 2))
        return NULL;
    bool done = kvmmm_swap_u32((uint32_t *)v[0], (uint32_t)v[1], &old, &fault);
    return word(done, old, &fault);
}

/* safe_compare_and_swap_uint32(hva, old, new) -> (previous | None, signal, fault_hva) */
static PyObject *safe_compare_and_swap_uint32(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t v[3];
    uint32_t old = 0;
    struct kvmmm_fault fault = {0};
    if (!parse(args, n_args, v, 3))
        return NULL;
    bool done = kvmmm_cas_u32((uint32_t *)v[0], (uint32_t)v[1], (uint32_t)v[2], &old, &fault);
    return word(done, old, &fault);
}

/* safe_load_uint32(hva) -> (value | None, signal, fault_hva) */
static PyObject *safe_load_uint32(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t v[1];
    uint32_t value = 0;
    struct kvmmm_fault fault = {0};
    if (!parse(args, n_args, v, 1))
        return NULL;
    bool done = kvmmm_load_u32((const uint32_t *)v[0], &value, &fault);
    return word(done, value, &fault);
}

/* own_faults() -> None */
static PyObject *own_faults(PyObject *module, PyObject *ignored)
{
    int rc = kvmmm_safecopy_own();
    if (rc)
        return py_raise_errno(-rc);
    return Py_NewRef(Py_None);
}

/* tune_copies(avx2, stream_bytes) -> whether AVX2 is used */
static PyObject *tune_copies(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t v[2];
    if (!parse(args, n_args, v, 2))
        return NULL;
    return PyBool_FromLong(kvmmm_safecopy_tune(v[0], v[1]));
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef functions[] = {
    FAST(safe_copy), FAST(safe_zero), FAST(safe_swap_uint32), FAST(safe_compare_and_swap_uint32),
    FAST(safe_load_uint32), FAST(tune_copies),
    {"own_faults", own_faults, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

int py_safecopy_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
