/* user_fork: after a fork each process has bytes of its own. Expected: status 0.
 *
 * Parent and children write different stamps to the same pages and find their own; what they share
 * on purpose, they share. Options: pages; children, one after another, each from what the one before
 * has left; depth, how many generations.
 */
#include "user.h"

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE };

/* In shared memory: what nobody may change behind anybody's back, but everybody sees. */
static volatile struct {
    uint64_t n_done, n_failed, n_forked;
} *shared;

static uint64_t pages, area;
static volatile uint64_t in_data = 1, in_bss;

static void fill(uint64_t stamp)
{
    for (uint64_t i = 0; i < pages; i++)
        *(volatile uint64_t *)(area + i * PAGE + i % 512 * 8) = stamp ^ i;
    in_data = stamp;
    in_bss = ~stamp;
}

static uint64_t count_wrong(uint64_t stamp)
{
    uint64_t n = in_data != stamp || in_bss != ~stamp;

    for (uint64_t i = 0; i < pages; i++)
        n += *(volatile uint64_t *)(area + i * PAGE + i % 512 * 8) != (stamp ^ i);
    return n;
}

static void verdict(const char *who, bool good, const char *what)
{
    if (!good)
        __atomic_fetch_add(&shared->n_failed, 1, __ATOMIC_SEQ_CST);
    kprintf("%s: %s (%ld): %s\n", good ? "PASS" : "FAIL", who, user_getpid(), what);
}

static void descend(uint64_t stamp, uint64_t depth);

static void __attribute__((noreturn)) be_child(uint64_t inherited, uint64_t depth)
{
    uint64_t own = (uint64_t)user_getpid() * 0x10001;

    verdict("child", count_wrong(inherited) == 0, "finds what its parent wrote before");
    fill(own);
    user_yield();
    verdict("child", count_wrong(own) == 0, "finds its own bytes after writing");
    if (depth > 1)
        descend(own, depth - 1);
    __atomic_fetch_add(&shared->n_done, 1, __ATOMIC_SEQ_CST);
    user_exit_group(9); /* nobody looks: the run's status is the first process's */
}

static void descend(uint64_t stamp, uint64_t depth)
{
    long pid = user_fork();

    if (pid == 0)
        be_child(stamp, depth);
    verdict("parent", pid > 0, "has a child");
    if (pid <= 0)
        return;
    __atomic_fetch_add(&shared->n_forked, 1, __ATOMIC_SEQ_CST);
    verdict("parent", count_wrong(stamp) == 0, "still finds what it wrote");
    fill(stamp * 3);
    user_yield();
    verdict("parent", count_wrong(stamp * 3) == 0, "finds its own bytes after writing");
}

int main(void)
{
    kvmmm_only_options("pages children depth");
    pages = kvmmm_option_number("pages", 1000);
    uint64_t children = kvmmm_option_number("children", 2), stamp = 0xabcdef;
    uint64_t depth = kvmmm_option_number("depth", 2);
    area = (uint64_t)user_mmap(0, pages * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    shared = (void *)user_mmap(0, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (user_failed((long)area) || user_failed((long)shared))
        return KVMMM_STATUS_FAILED;
    for (uint64_t i = 0; i < children; i++) {
        fill(stamp);
        descend(stamp, depth);
        stamp *= 5;
    }
    while (shared->n_done < children * depth && shared->n_failed == 0)
        user_yield();
    kprintf("fork: %lu children of %lu pages, %lu failures\n", shared->n_done, pages,
            shared->n_failed);
    return shared->n_failed > 0 ? KVMMM_STATUS_FAILED : KVMMM_STATUS_OK;
}
