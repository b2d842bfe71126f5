/* floor_copy.c: copies between the host's own addresses, without an address space in between. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"
#include "floor.h"

/* Through a pointer that the compiler cannot see through: it would put moves of a known size in place of
 * the library's memcpy, or leave out a copy that is made twice. */
static void *(*volatile libc_memcpy)(void *, const void *, size_t) = memcpy;

static inline void copy(uintptr_t guest, uintptr_t buffer, size_t n_bytes, bool is_out)
{
    if (is_out)
        libc_memcpy((void *)guest, (const void *)buffer, n_bytes);
    else
        libc_memcpy((void *)buffer, (const void *)guest, n_bytes);
}

int64_t kvmmm_floor_copy(const uint64_t *hvas, size_t n, uintptr_t buffer, size_t n_bytes, bool is_out)
{
    int64_t start_ns = kvmmm_now_ns();
    for (size_t i = 0; i < n; i++)
        copy(hvas[i], buffer, n_bytes, is_out);
    return kvmmm_now_ns() - start_ns;
}

int64_t kvmmm_floor_mirror(int fd, const uint64_t *offsets, size_t n, uintptr_t buffer, size_t n_bytes, bool is_out)
{
    /* Room for a run, and as much again that stays empty, so that no two become one mapping. */
    size_t window_bytes = n * 2 * n_bytes;
    void *window = mmap(NULL, window_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (window == MAP_FAILED)
        return -errno;
    int64_t start_ns = kvmmm_now_ns();
    for (size_t i = 0; i < n; i++) {
        void *at = (uint8_t *)window + i * 2 * n_bytes;
        if (mmap(at, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)offsets[i]) == MAP_FAILED ||
            madvise(at, n_bytes, MADV_POPULATE_READ)) {
            int error = errno;
            munmap(window, window_bytes);
            return -error;
        }
        copy((uintptr_t)at, buffer, n_bytes, is_out);
    }
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    munmap(window, window_bytes);
    return taken_ns;
}
