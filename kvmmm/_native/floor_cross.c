/* floor_cross.c: the same copies by one mechanism or another, called from C: where the crossover is seen
 * without Python around it.
 *
 * It is CopyCore's own code that is timed: what its methods do once they have parsed their arguments, with the
 * policy that uses the mirror or the one that does not. Not here: to release the GIL, which is the same for
 * all; and who serves a miss of the mirror is C as well, with the calls that Python would make.
 *
 * Two operations are what they could be rather than what they are: a Reader or Writer is memory, its blocks and
 * the buffer in between are there beforehand. What kvmmm does is timed from Python.
 */
#define _GNU_SOURCE
#include "py_copy.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core.h"
#include "floor.h"

enum { PAGE = 4096, IOVECS = 1024, POPULATE_LEAST = 4 * PAGE /* as kvmmm.platform.mirror */ };

struct kvmmm_cross_block {
    uint8_t *hva;
    size_t n_bytes;
};

static inline uint64_t page_down(uint64_t addr) { return addr & -(uint64_t)PAGE; }
static inline uint64_t page_up(uint64_t addr) { return (addr + PAGE - 1) & -(uint64_t)PAGE; }

/* ---- one operation ---------------------------------------------------------------------------------- */

/* Mirror what is left of a copy, in whole segments, as asio.py does for it. */
static int serve(struct kvmmm_cross *x, struct py_copy *c)
{
    struct kvmmm_mirror *m = c->core->mirror;
    if (x->mechanism != KVMMM_CROSS_MIRROR)
        return -EFAULT;
    uint64_t low = page_down(c->addr + c->done), high = page_up(c->addr + c->n_bytes);
    for (uint64_t at = low; at < high;) {
        uint64_t index = (at - x->start) / x->segment_bytes;
        uint64_t start = x->start + index * x->segment_bytes, end = start + x->segment_bytes;
        if (at < x->start || index >= x->n_segments)
            return -EFAULT;
        kvmmm_mirror_forget(m, start, end);
        int rc = kvmmm_mirror_place(m, start, end, x->fd, x->offsets[index], true);
        if (rc)
            return rc;
        kvmmm_mirror_admit(m, start, end, true);
        x->n_maps++;
        uint64_t from = low > start ? low : start, to = high < end ? high : end;
        if (to - from >= POPULATE_LEAST && (rc = kvmmm_mirror_populate(m, from, to)))
            return rc;
        at = end;
    }
    return 0;
}

/* Where the mirror has nothing, there is no going on without it. */
static inline void force(const struct kvmmm_cross *x, struct py_copy *c)
{
    if (x->mechanism == KVMMM_CROSS_MIRROR)
        c->flags = PY_COPY_MIRROR;
}

/* As py_copy_bytes.c and py_copy_run.c. */
static int move(struct kvmmm_cross *x, struct py_copy *c)
{
    struct kvmmm_fault fault = {0, 0};
    uint64_t n;
    if (py_copy_quickly(c))
        return 0;
    force(x, c);
    while (c->done < c->n_bytes) {
        uintptr_t hva = py_copy_find(c, c->n_bytes - c->done, &n);
        if (!hva) {
            int rc = serve(x, c);
            if (rc)
                return rc;
            continue;
        }
        uint8_t *host = c->host ? c->host + c->done : NULL;
        size_t moved = c->access == KVMMM_FRAME_READ ? kvmmm_copy(host, (const void *)hva, n, &fault)
                       : host                        ? kvmmm_copy((void *)hva, host, n, &fault)
                                                     : kvmmm_zero((void *)hva, n, &fault);
        c->done += moved;
        if (moved < n)
            return -EFAULT;
    }
    return 0;
}

/* As py_copy_atomic.c. */
static int change_word(struct kvmmm_cross *x, struct py_copy *c)
{
    struct kvmmm_fault fault = {0, 0};
    uint32_t old;
    uint64_t n;
    uintptr_t hva;
    force(x, c);
    while (!(hva = py_copy_find(c, 4, &n))) {
        int rc = serve(x, c);
        if (rc)
            return rc;
    }
    bool is_done = x->operation == KVMMM_CROSS_SWAP
                       ? kvmmm_swap_u32((uint32_t *)hva, (uint32_t)c->addr, &old, &fault)
                       : kvmmm_cas_u32((uint32_t *)hva, 0, (uint32_t)c->addr, &old, &fault);
    return is_done ? 0 : -EFAULT;
}

/* A Reader or Writer may be called once only, and by then nothing may fail. So internal mappings first find
 * all blocks; through the address space the bytes go by way of a buffer. */
static int stream(struct kvmmm_cross *x, struct py_copy *c)
{
    struct kvmmm_fault fault = {0, 0};
    bool is_out = c->access == KVMMM_FRAME_WRITE;
    uint8_t *host = c->host;
    if (x->mechanism != KVMMM_CROSS_INTERNAL) {
        c->host = (uint8_t *)x->scratch;
        if (is_out)
            kvmmm_copy(c->host, host, c->n_bytes, &fault);
        int rc = move(x, c);
        if (!rc && !is_out)
            kvmmm_copy(host, c->host, c->n_bytes, &fault);
        return rc;
    }
    struct kvmmm_cross_block *blocks = (struct kvmmm_cross_block *)x->blocks;
    size_t n_blocks = 0;
    for (uint64_t n; c->done < c->n_bytes; c->done += n) {
        uintptr_t hva = py_copy_find(c, c->n_bytes - c->done, &n);
        if (!hva || n_blocks == x->n_blocks)
            return -EFAULT;
        blocks[n_blocks++] = (struct kvmmm_cross_block){(uint8_t *)hva, n};
    }
    for (size_t i = 0; i < n_blocks; host += blocks[i++].n_bytes) {
        size_t n = blocks[i].n_bytes;
        if ((is_out ? kvmmm_copy(blocks[i].hva, host, n, &fault) : kvmmm_copy(host, blocks[i].hva, n, &fault)) < n)
            return -EFAULT;
    }
    return 0;
}

/* ---- how others do it ------------------------------------------------------------------------------- */

static int by_process_vm(struct kvmmm_cross *x, struct py_copy *c)
{
    struct iovec remote[IOVECS];
    while (c->done < c->n_bytes) {
        struct iovec local = {c->host + c->done, 0};
        size_t n_pieces = 0;
        for (uint64_t n; n_pieces < IOVECS && c->done < c->n_bytes; c->done += n) {
            uintptr_t hva = py_copy_find(c, c->n_bytes - c->done, &n);
            if (!hva)
                return -EFAULT;
            remote[n_pieces++] = (struct iovec){(void *)hva, n};
            local.iov_len += n;
        }
        ssize_t moved = c->access == KVMMM_FRAME_READ ? process_vm_readv(x->pid, &local, 1, remote, n_pieces, 0)
                                                      : process_vm_writev(x->pid, &local, 1, remote, n_pieces, 0);
        if (moved < 0 || (size_t)moved != local.iov_len)
            return moved < 0 ? -errno : -EFAULT;
    }
    return 0;
}

static int by_file(struct kvmmm_cross *x, struct py_copy *c)
{
    for (uint64_t n; c->done < c->n_bytes; c->done += n) {
        uintptr_t hva = py_copy_find(c, c->n_bytes - c->done, &n);
        if (!hva)
            return -EFAULT;
        uint8_t *host = c->host + c->done;
        off_t fo = (off_t)(hva - c->core->frames.base);
        ssize_t moved = c->access == KVMMM_FRAME_READ ? pread(x->fd, host, n, fo) : pwrite(x->fd, host, n, fo);
        if (moved < 0 || (uint64_t)moved != n)
            return moved < 0 ? -errno : -EFAULT;
    }
    return 0;
}

/* ---- a sample --------------------------------------------------------------------------------------- */

static bool reads(unsigned operation) { return operation == KVMMM_CROSS_IN || operation == KVMMM_CROSS_IN_TO; }

static int do_one(struct kvmmm_cross *x, struct py_copy *c)
{
    if (x->mechanism == KVMMM_CROSS_PROCESS_VM)
        return by_process_vm(x, c);
    if (x->mechanism == KVMMM_CROSS_FILE)
        return by_file(x, c);
    if (x->operation == KVMMM_CROSS_SWAP || x->operation == KVMMM_CROSS_CAS)
        return change_word(x, c);
    return x->operation == KVMMM_CROSS_IN_TO || x->operation == KVMMM_CROSS_OUT_FROM ? stream(x, c) : move(x, c);
}

static uint64_t n_faults(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) ? 0 : (uint64_t)(usage.ru_minflt + usage.ru_majflt);
}

/* The operations; 0 or -errno. */
static int run_all(struct kvmmm_cross *x, struct py_copy_core *core)
{
    bool is_word = x->operation == KVMMM_CROSS_SWAP || x->operation == KVMMM_CROSS_CAS;
    unsigned access = reads(x->operation) ? KVMMM_FRAME_READ
                      : is_word           ? KVMMM_FRAME_READ | KVMMM_FRAME_WRITE
                                          : KVMMM_FRAME_WRITE;
    unsigned flags = x->mechanism == KVMMM_CROSS_WALK ? PY_COPY_WALK : PY_COPY_AUTO;
    int64_t owed_ns = 0, cost_ns = x->plant_ns;
    for (uint64_t i = 0; i < x->n; i++) {
        struct py_copy c = {.core = core, .addr = x->addrs[i], .n_bytes = x->n_bytes, .access = access,
                            .host = x->operation == KVMMM_CROSS_ZERO ? NULL : (uint8_t *)x->hosts[i],
                            .flags = flags};
        int rc = do_one(x, &c);
        if (rc)
            return rc;
        if (x->plants) {
            /* What one turn is too long, the next is shorter. */
            int64_t from_ns = kvmmm_now_ns(), now_ns = from_ns;
            for (owed_ns += cost_ns; now_ns - from_ns < owed_ns;)
                now_ns = kvmmm_now_ns();
            owed_ns -= now_ns - from_ns;
        }
    }
    return 0;
}

int64_t kvmmm_cross_run(struct kvmmm_cross *x)
{
    struct py_copy_core *core = (struct py_copy_core *)x->core, none = {0};
    if (!core)
        core = &none; /* no operations: what the clock takes */
    if ((x->mechanism == KVMMM_CROSS_WALK && !core->walk) || (x->mechanism == KVMMM_CROSS_MIRROR && !core->mirror))
        return -ENXIO;
    bool used_mirror = core->uses_mirror;
    core->uses_mirror = x->mechanism == KVMMM_CROSS_MIRROR;
    x->n_maps = 0;
    uint64_t faults = n_faults();
    int64_t start_ns = kvmmm_now_ns();
    int rc = run_all(x, core);
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    x->n_faults = n_faults() - faults;
    core->uses_mirror = used_mirror;
    return rc ? rc : taken_ns;
}

/* ---- places ----------------------------------------------------------------------------------------- */

static inline uint64_t next_random(uint64_t *state) /* splitmix64 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void kvmmm_cross_places(struct kvmmm_cross *x, const struct kvmmm_cross_where *w)
{
    uint64_t shared = w->shared_seed, own = w->own_seed, room = page_up(x->n_bytes) + PAGE;
    uint64_t n_pages = (w->span_bytes - room) / PAGE + 1, first = 0;
    if (w->hot_bytes) {
        uint64_t n_hot = w->hot_bytes / PAGE + 1;
        first = n_pages > n_hot ? next_random(&shared) % (n_pages - n_hot) : 0;
        n_pages = n_pages < n_hot ? n_pages : n_hot;
    }
    for (uint64_t i = 0; i < x->n; i++) {
        uint64_t at = next_random(&shared) % (PAGE / 8) * 8, host_at = next_random(&shared) % (PAGE / 8) * 8;
        x->addrs[i] = x->start + (first + next_random(&own) % n_pages) * PAGE + at;
        x->hosts[i] = w->buffer + host_at;
    }
}

/* ---- states ----------------------------------------------------------------------------------------- */

int64_t kvmmm_cross_present(int pagemap_fd, uintptr_t hva, uint64_t n_bytes)
{
    uint64_t entries[512], low = page_down(hva), n_pages = (page_up(hva + n_bytes) - low) / PAGE;
    int64_t n_present = 0;
    for (uint64_t done = 0; done < n_pages;) {
        uint64_t n = n_pages - done < 512 ? n_pages - done : 512;
        ssize_t got = pread(pagemap_fd, entries, n * 8, (off_t)((low / PAGE + done) * 8));
        if (got != (ssize_t)(n * 8))
            return got < 0 ? -errno : -EIO;
        for (uint64_t i = 0; i < n; i++)
            n_present += entries[i] >> 63;
        done += n;
    }
    return n_present;
}

int64_t kvmmm_cross_linear(uintptr_t core, unsigned action, int pagemap_fd, uint64_t addr, uint64_t n_bytes)
{
    uint64_t low = page_down(addr), high = page_up(addr + n_bytes), n;
    int64_t sum = 0;
    for (; low < high; low += n) {
        uintptr_t hva = kvmmm_frames_find(&((struct py_copy_core *)core)->frames, low, high - low,
                                          KVMMM_FRAME_READ, &n);
        if (!hva)
            return -EFAULT;
        int64_t rc = action == KVMMM_CROSS_COUNT ? kvmmm_cross_present(pagemap_fd, hva, n)
                     : madvise((void *)hva, n, action == KVMMM_CROSS_DROP ? MADV_DONTNEED : MADV_POPULATE_READ)
                         ? -errno
                         : 0;
        if (rc < 0)
            return rc;
        sum += rc;
    }
    return sum;
}

int64_t kvmmm_cross_canary(uint64_t n_adds)
{
    uint64_t sum = 1, left = n_adds / 8;
    int64_t start_ns = kvmmm_now_ns();
    while (left--)
        __asm__ volatile("add %0, %0\n\tadd %0, %0\n\tadd %0, %0\n\tadd %0, %0\n\t"
                         "add %0, %0\n\tadd %0, %0\n\tadd %0, %0\n\tadd %0, %0"
                         : "+r"(sum));
    return kvmmm_now_ns() - start_ns;
}
