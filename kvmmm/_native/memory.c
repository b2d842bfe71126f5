/* memory.c: mappings, holes, ioctls. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "core.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

static int map_aligned(int fd, size_t n_bytes, size_t align_bytes, int prot, uintptr_t *hva_ret)
{
    /* Reserve enough to find an aligned piece inside, map over it, give back the two ends. */
    size_t reserve = n_bytes + align_bytes;
    uint8_t *base = mmap(NULL, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return -errno;
    uintptr_t start = ((uintptr_t)base + align_bytes - 1) & ~(uintptr_t)(align_bytes - 1);
    void *mapped = mmap((void *)start, n_bytes, prot, MAP_SHARED | MAP_FIXED, fd, 0);
    if (mapped == MAP_FAILED) {
        int err = errno;
        munmap(base, reserve);
        return -err;
    }
    size_t head = start - (uintptr_t)base;
    if (head)
        munmap(base, head);
    munmap((void *)(start + n_bytes), reserve - head - n_bytes);
    *hva_ret = start;
    return 0;
}

int kvmmm_map_shared_aligned(int fd, size_t n_bytes, size_t align_bytes, uintptr_t *hva_ret)
{
    return map_aligned(fd, n_bytes, align_bytes, PROT_READ | PROT_WRITE, hva_ret);
}

int kvmmm_map_readonly_aligned(int fd, size_t n_bytes, size_t align_bytes, uintptr_t *hva_ret)
{
    return map_aligned(fd, n_bytes, align_bytes, PROT_READ, hva_ret);
}

int kvmmm_punch_hole(int fd, uint64_t offset, uint64_t n_bytes)
{
    int rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)n_bytes);
    return rc ? -errno : 0;
}

int kvmmm_drop_pages(uintptr_t hva, size_t n_bytes)
{
    if (!madvise((void *)hva, n_bytes, MADV_DONTNEED))
        return 0;
    /* Locked memory (mlockall) wants to be asked by another name, from Linux 5.18 on. */
    if (errno == EINVAL && !madvise((void *)hva, n_bytes, MADV_DONTNEED_LOCKED))
        return 0;
    return -errno;
}

int kvmmm_ioctl(int fd, unsigned long request, uintptr_t argument)
{
    int rc = ioctl(fd, request, argument);
    return rc < 0 ? -errno : rc;
}

int64_t kvmmm_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}
