/* py_copy_bytes.c: copy_in, copy_out, read, zero_out: parse, and run. */
#define _GNU_SOURCE
#include "py_copy.h"

#include <unistd.h>

/* The options of a call that has @p n_wanted arguments, or -1 with TypeError set. */
static inline int options_of(PyObject *const *args, Py_ssize_t n, Py_ssize_t n_wanted, PyObject *names, const char *what)
{
    if (n != n_wanted) {
        PyErr_Format(PyExc_TypeError, "%s (%zd given)", what, n);
        return -1;
    }
    return names ? py_copy_options(args + n, names) : 0;
}

static inline PyObject *finish(struct py_copy *c, struct py_copy_buffer *b)
{
    int rc = py_copy_begin(c);
    if (!rc && (c->done || !py_copy_quickly(c)))
        rc = py_copy_run(c);
    if (b)
        py_copy_release(b);
    return rc ? NULL : PyLong_FromUnsignedLongLong(c->done);
}

/* The usual copy to or from bytes or a bytearray, as py_copy_quickly has it. Whether it was one; if not,
 * c->done may be some of it. */
static inline __attribute__((always_inline)) bool move_quickly(struct py_copy *c, PyObject *object)
{
    uint64_t max_addr = c->core->max_addr;
    return py_copy_plain(object, c->access, &c->host, &c->n_bytes) && !c->flags && c->addr <= max_addr && c->n_bytes <= max_addr - c->addr && py_copy_quickly(c);
}

PY_COPY_METHOD(copy_in)
{
    struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_READ};
    struct py_copy_buffer b;
    int flags = options_of(args, n, 2, names, "copy_in(addr, dst) takes 2 positional arguments");
    if (flags < 0 || py_copy_number(args[0], &c.addr))
        return NULL;
    c.flags = (unsigned)flags;
    if (move_quickly(&c, args[1]))
        return PyLong_FromUnsignedLongLong(c.done);
    if (py_copy_target(args[1], &b))
        return NULL;
    c.host = b.view.buf;
    c.n_bytes = (uint64_t)b.view.len;
    c.may_block = b.may_block;
    return finish(&c, &b);
}

PY_COPY_METHOD(copy_out)
{
    struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_WRITE};
    struct py_copy_buffer b;
    int flags = options_of(args, n, 2, names, "copy_out(addr, src) takes 2 positional arguments");
    if (flags < 0 || py_copy_number(args[0], &c.addr))
        return NULL;
    c.flags = (unsigned)flags;
    if (move_quickly(&c, args[1]))
        return PyLong_FromUnsignedLongLong(c.done);
    if (py_copy_source(args[1], &b))
        return NULL;
    c.host = b.view.buf;
    c.n_bytes = (uint64_t)b.view.len;
    c.may_block = b.may_block;
    return finish(&c, &b);
}

PY_COPY_METHOD(read)
{
    const struct py_copy_core *core = (struct py_copy_core *)self;
    uint64_t addr, n_bytes;
    int flags = options_of(args, n, 2, names, "read(addr, length_bytes) takes 2 positional arguments");
    if (flags < 0 || py_copy_number(args[0], &addr) || py_copy_number(args[1], &n_bytes))
        return NULL;
    struct py_copy c;
    bool is_inside = addr <= core->max_addr && n_bytes <= core->max_addr - addr;
    if (flags || !is_inside) {
        c = (struct py_copy){.core = (struct py_copy_core *)self, .addr = addr, .n_bytes = n_bytes,
                             .access = KVMMM_FRAME_READ, .flags = (unsigned)flags};
        if (py_copy_begin(&c))
            return NULL;
        flags = (int)c.flags;
    }
    if (n_bytes > PY_SSIZE_T_MAX)
        return PyErr_NoMemory();
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n_bytes);
    if (!bytes)
        return NULL;
    uint8_t *host = (uint8_t *)PyBytes_AsString(bytes);
    uint64_t done = py_copy_few(core, addr, host, n_bytes, KVMMM_FRAME_READ, (unsigned)flags);
    if (done && done == n_bytes)
        return bytes;
    c = (struct py_copy){.core = (struct py_copy_core *)self, .addr = addr, .n_bytes = n_bytes, .done = done,
                         .host = host, .access = KVMMM_FRAME_READ, .flags = (unsigned)flags};
    if (py_copy_run(&c))
        Py_CLEAR(bytes);
    return bytes;
}

PY_COPY_METHOD(zero_out)
{
    struct py_copy c = {.core = (struct py_copy_core *)self, .access = KVMMM_FRAME_WRITE};
    int flags = options_of(args, n, 2, names, "zero_out(addr, length_bytes) takes 2 positional arguments");
    if (flags < 0 || py_copy_number(args[0], &c.addr) || py_copy_number(args[1], &c.n_bytes))
        return NULL;
    c.flags = (unsigned)flags;
    return finish(&c, NULL);
}

/* _move(hva, host, n_bytes, access): bytes moved between a file's mapping and the host's buffer. In the slow
 * path: active_lock is held, so the mapping stays. The file may be cut short, and the buffer as well. */
PyObject *py_copy_move(PyObject *self, PyObject *args)
{
    unsigned long long hva, host, n_bytes;
    unsigned access;
    if (!PyArg_ParseTuple(args, "KKKI", &hva, &host, &n_bytes, &access))
        return NULL;
    struct kvmmm_fault fault = {0, 0};
    size_t done;
    kvmmm_safecopy_own();
    Py_BEGIN_ALLOW_THREADS
    if (access == KVMMM_FRAME_READ)
        done = kvmmm_copy((void *)host, (const void *)hva, n_bytes, &fault);
    else
        done = host ? kvmmm_copy((void *)hva, (const void *)host, n_bytes, &fault)
                    : kvmmm_zero((void *)hva, n_bytes, &fault);
    Py_END_ALLOW_THREADS
    bool is_host = fault.signal && host && fault.addr >= host && fault.addr - host < n_bytes;
    return Py_BuildValue("nO", (Py_ssize_t)done, is_host ? Py_True : Py_False);
}

static uint64_t move_fresh(int fd, uint64_t fo, uint8_t *host, uint64_t n_bytes, unsigned access)
{
    struct kvmmm_fault fault = {0, 0};
    if (access == KVMMM_FRAME_READ)
        return kvmmm_zero(host, n_bytes, &fault);
    uint64_t done = host ? 0 : n_bytes;
    for (ssize_t moved = 1; done < n_bytes && moved > 0; done += moved > 0 ? (uint64_t)moved : 0)
        moved = pwrite(fd, host + done, n_bytes - done, (off_t)(fo + done));
    return done;
}

/* _move_fresh(fd, fo, host, n_bytes, access): bytes moved between frames that nobody has touched and the
 * host's buffer. They are holes: what is read is zeros, and no memory is spent on it; what is written goes by
 * pwrite, which makes pages without a fault for each (bench copies/cold_64k). Fewer bytes: the usual way tells why. */
PyObject *py_copy_move_fresh(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    uint64_t number[5];
    if (n != 5)
        return PyErr_Format(PyExc_TypeError, "_move_fresh() takes 5 arguments");
    for (int i = 0; i < 5; i++)
        if (py_copy_number(args[i], &number[i]))
            return NULL;
    uint8_t *host = (uint8_t *)(uintptr_t)number[2];
    uint64_t done = 0;
    if (number[3] <= 4096) {
        done = move_fresh((int)number[0], number[1], host, number[3], (unsigned)number[4]);
    } else {
        Py_BEGIN_ALLOW_THREADS
        done = move_fresh((int)number[0], number[1], host, number[3], (unsigned)number[4]);
        Py_END_ALLOW_THREADS
    }
    return PyLong_FromUnsignedLongLong(done);
}
