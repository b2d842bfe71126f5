/* touch: first touches of untouched memory keep every byte. Expected: all right, status 0.
 *
 * Options: bytes=48M (how much), stride=4096 (from one touched word to the next), passes=1 (how
 * often), write=1 (0: read only, every word must be zero).
 * Memory appears under the guest while it runs: the first access to a missing window leaves to the
 * host, which finds the vma, allocates, installs a memslot, and lets the access finish.
 */
#include "kvmmm.h"

enum { BAR_STEPS = 40 };

/* `48 MiB`, or KiB where that says more. */
static const char *size(uint64_t bytes)
{
    static char text[32];

    kvmmm_format(text, sizeof text, bytes % (1 << 20) == 0 ? "%lu MiB" : "%lu KiB",
                 bytes % (1 << 20) == 0 ? bytes >> 20 : bytes >> 10);
    return text;
}

struct job {
    uint64_t start, bytes, stride, passes;
    bool write;
};

/* A word that depends on its address and on the pass, and is never zero. */
static inline uint64_t word_for(uint64_t addr, uint64_t pass)
{
    return (addr ^ pass << 56) * 0x9e3779b97f4a7c15 | 1;
}

/* Touch every stride-th word; the sum of what was found there before. */
static uint64_t touch(const struct job *job, uint64_t pass)
{
    uint64_t end = job->start + job->bytes;
    uint64_t step = job->bytes / BAR_STEPS, next = job->start, found = 0;

    for (uint64_t addr = job->start; addr < end; addr += job->stride) {
        volatile uint64_t *word = (volatile uint64_t *)addr;
        found += *word;
        if (job->write)
            *word = word_for(addr, pass);
        if (addr >= next) { /* the console ring: no exit, while the host is awake */
            console_write("#", 1);
            next += step;
        }
    }
    return found;
}

/* What touch must have found: the words of the pass before, or the zeros of fresh memory. */
static uint64_t expected(const struct job *job, uint64_t pass)
{
    uint64_t end = job->start + job->bytes, sum = 0;

    for (uint64_t addr = job->start; pass > 0 && job->write && addr < end; addr += job->stride)
        sum += word_for(addr, pass - 1);
    return sum;
}

/* Where a touched word is not what was last written, or its neighbour not zero; else 0. */
static uint64_t first_wrong(const struct job *job)
{
    uint64_t end = job->start + job->bytes;

    for (uint64_t addr = job->start; addr < end; addr += job->stride) {
        const volatile uint64_t *word = (const volatile uint64_t *)addr;
        if (word[0] != (job->write ? word_for(addr, job->passes - 1) : 0))
            return addr;
        if (job->stride >= 16 && word[1] != 0)
            return addr + 8;
    }
    return 0;
}

static bool take_options(struct job *job)
{
    struct kvmmm_range ram = kvmmm_ram();

    kvmmm_only_options("bytes stride passes write");
    job->bytes = kvmmm_option_number("bytes", 48UL << 20);
    job->stride = kvmmm_option_number("stride", KVMMM_PAGE_BYTES) & ~7UL;
    job->passes = kvmmm_option_number("passes", 1);
    job->write = kvmmm_option_number("write", 1) != 0;

    /* Whole windows, when that is possible: the numbers of --stats are round then. */
    job->start = (ram.start + KVMMM_WINDOW_BYTES - 1) & -KVMMM_WINDOW_BYTES;
    if (job->start + job->bytes > ram.end)
        job->start = ram.start;
    job->bytes &= ~7UL;
    if (job->stride == 0 || job->bytes < BAR_STEPS * 8 || job->passes == 0) {
        kprintf("touch: bytes=%lu stride=%lu passes=%lu leaves nothing to do\n", job->bytes,
                job->stride, job->passes);
        return false;
    }
    if (job->bytes > ram.end - ram.start) {
        kprintf("touch: %s is more than the %lu KiB of free RAM; give it more --memory\n",
                size(job->bytes), (ram.end - ram.start) >> 10);
        return false;
    }
    return true;
}

static int run(void *arg)
{
    struct job job;
    uint64_t words, started;
    bool right = true;

    (void)arg;
    if (!take_options(&job))
        return KVMMM_STATUS_USAGE;
    words = (job.bytes - 1) / job.stride + 1;
    kprintf("touch: a guest kernel, now in ring %u, %s one word every %lu bytes\n", kvmmm_cpl(),
            job.write ? "writes" : "reads", job.stride);
    kprintf("       of %s at 0x%lx that nobody has touched before\n", size(job.bytes), job.start);

    started = kvmmm_rdtsc();
    for (uint64_t pass = 0; pass < job.passes; pass++) {
        kprintf("  pass %lu  ", pass + 1);
        right &= touch(&job, pass) == expected(&job, pass);
        kprintf("  %lu words, %s\n", words,
                !right ? "NOT what was there before" : pass == 0 ? "all found zero" : "all kept");
    }
    uint64_t ticks = kvmmm_rdtsc() - started;

    uint64_t wrong = first_wrong(&job);
    if (wrong != 0)
        kprintf("touch: FAILED, wrong bytes at 0x%lx\n", wrong);
    if (wrong != 0 || !right)
        return KVMMM_STATUS_FAILED;
    kprintf("touch: read back %lu words: every byte is right\n", words);
    if (kvmmm_boot->tsc_hz >= 1000000)
        kprintf("touch: took %lu ms, demand paging included\n",
                ticks / (kvmmm_boot->tsc_hz / 1000));
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    return kvmmm_enter_ring3(run, NULL);
}
