/* user_mmap: what mmap and its kin promise holds, page by page. Expected: status 0.
 *
 * Options: pages, the size of each mapping in the first part; rounds, how many random operations the
 * second part does to at most SLOTS mappings, whose contents it knows at any time; seed.
 */
#include "user.h"

enum { PAGE = 4096, SLOTS = 24, SLOT_PAGES = 40, RW = PROT_READ | PROT_WRITE };
enum { ANON = MAP_PRIVATE | MAP_ANONYMOUS };

static uint64_t random_state;

static uint64_t next_random(uint64_t below)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
}

static uint64_t stamp(uint64_t tag, uint64_t page)
{
    return (tag << 32 | (page + 1)) * 0x9e3779b97f4a7c15UL;
}

/* First and last word of every page. */
static void fill(uint64_t addr, uint64_t n_pages, uint64_t tag, uint64_t first)
{
    for (uint64_t i = 0; i < n_pages; i++) {
        volatile uint64_t *page = (uint64_t *)(addr + i * PAGE);
        page[0] = stamp(tag, first + i);
        page[511] = ~page[0];
    }
}

static bool holds(uint64_t addr, uint64_t n_pages, uint64_t tag, uint64_t first)
{
    for (uint64_t i = 0; i < n_pages; i++) {
        const volatile uint64_t *page = (uint64_t *)(addr + i * PAGE);
        if (page[0] != stamp(tag, first + i) || page[511] != ~page[0])
            return false;
    }
    return true;
}

static bool is_zero(uint64_t addr, uint64_t n_pages)
{
    const volatile uint64_t *word = (uint64_t *)addr;

    for (uint64_t i = 0; i < n_pages * 512; i += 73)
        if (word[i] != 0)
            return false;
    return true;
}

/* Whether a page is mapped (then read-write), where touching it would tell too late. */
static bool is_mapped(uint64_t addr)
{
    return user_mprotect(addr, PAGE, RW) == 0;
}

static uint64_t map(uint64_t n_pages)
{
    long addr = user_mmap(0, n_pages * PAGE, RW, ANON, -1, 0);

    if (user_failed(addr)) {
        kprintf("mmap of %lu pages: %ld\n", n_pages, addr);
        kvmmm_exit(KVMMM_STATUS_FAILED);
    }
    return (uint64_t)addr;
}

static void check_holes(uint64_t n)
{
    uint64_t a = map(n);

    report(is_zero(a, n), "fresh memory is zero");
    fill(a, n, 1, 0);
    report(user_munmap(a + n / 4 * PAGE, n / 2 * PAGE) == 0, "the middle is unmapped");
    report(holds(a, n / 4, 1, 0), "the part below keeps its bytes");
    report(holds(a + n / 4 * 3 * PAGE, n / 4, 1, n / 4 * 3), "the part above as well");
    long again = user_mmap(a + n / 4 * PAGE, n / 2 * PAGE, RW, ANON, -1, 0);
    report(again == (long)(a + n / 4 * PAGE), "a hint into the hole is taken");
    report(is_zero((uint64_t)again, n / 2), "and is zero again");
    fill(a, n, 2, 0);
    report(user_mmap(a + PAGE, PAGE, RW, ANON | MAP_FIXED, -1, 0) == (long)(a + PAGE),
           "MAP_FIXED replaces one page");
    report(is_zero(a + PAGE, 1) && holds(a, 1, 2, 0) && holds(a + 2 * PAGE, n - 2, 2, 2),
           "only that page is zero");
    report(user_mmap(a + PAGE, PAGE, RW, ANON | MAP_FIXED_NOREPLACE, -1, 0) == -EEXIST,
           "MAP_FIXED_NOREPLACE does not");
    report(user_munmap(a, n * PAGE) == 0 && user_munmap(a, n * PAGE) == 0, "a hole may be unmapped");
}

static void check_protection(uint64_t n)
{
    uint64_t a = map(n);

    fill(a, n, 3, 0);
    report(user_mprotect(a, n * PAGE, PROT_READ) == 0 && holds(a, n, 3, 0), "read-only, all there");
    report(user_mprotect(a + PAGE, PAGE, PROT_NONE) == 0, "one page forbidden");
    report(holds(a, 1, 3, 0) && holds(a + 2 * PAGE, n - 2, 3, 2), "its neighbours are not");
    report(user_mprotect(a, n * PAGE, RW) == 0 && holds(a, n, 3, 0), "PROT_NONE keeps the bytes");
    fill(a, n, 4, 0);
    report(holds(a, n, 4, 0), "and writing works again");
    user_munmap(a + PAGE, PAGE);
    report(user_mprotect(a, n * PAGE, PROT_READ) == -ENOMEM && holds(a, 1, 4, 0),
           "over a hole it is ENOMEM");
    user_munmap(a, n * PAGE);
}

static void check_code(void)
{
    static const uint8_t code[] = {0xb8, 42, 0, 0, 0, 0xc3}; /* mov $42, %eax; ret */
    uint64_t a = map(1);

    memcpy((void *)a, code, sizeof code);
    report(user_mprotect(a, PAGE, PROT_READ | PROT_EXEC) == 0 && ((int (*)(void))a)() == 42,
           "what was written runs once it is executable");
    user_munmap(a, PAGE);
}

static void check_moves(uint64_t n)
{
    uint64_t a = map(2 * n);

    fill(a, n, 5, 0);
    report(user_munmap(a + n * PAGE, n * PAGE) == 0, "room behind a mapping");
    report(user_mremap(a, n * PAGE, 2 * n * PAGE, 0, 0) == (long)a, "it grows in place");
    report(holds(a, n, 5, 0) && is_zero(a + n * PAGE, n), "what is new is zero");
    report(user_mprotect(a + n * PAGE, n * PAGE, PROT_READ) == 0, "a neighbour in the way");
    report(user_mremap(a, n * PAGE, n * PAGE + PAGE, 0, 0) == -ENOMEM, "in place it cannot grow");
    long b = user_mremap(a, n * PAGE, 3 * n * PAGE, MREMAP_MAYMOVE, 0);
    report(!user_failed(b) && b != (long)a, "but elsewhere");
    report(holds((uint64_t)b, n, 5, 0) && is_zero((uint64_t)b + n * PAGE, 2 * n), "bytes moved");
    report(!is_mapped(a) && is_zero(a + n * PAGE, 1), "where it was, nothing is");
    report(user_mremap((uint64_t)b, 3 * n * PAGE, n / 2 * PAGE, 0, 0) == b, "it shrinks");
    report(holds((uint64_t)b, n / 2, 5, 0) && !is_mapped((uint64_t)b + n * PAGE), "the tail is gone");
    uint64_t c = map(n);
    fill(c, n, 6, 0);
    report(user_mremap((uint64_t)b, n / 2 * PAGE, n / 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, c) ==
               (long)c,
           "onto another");
    report(holds(c, n / 2, 5, 0) && holds(c + n / 2 * PAGE, n - n / 2, 6, n / 2),
           "which it replaces in part");
    user_munmap(c, n * PAGE);
    user_munmap(a + n * PAGE, n * PAGE);
}

static void check_heap(uint64_t n)
{
    uint64_t start = user_brk(0);
    uint64_t end = start + n * PAGE;

    report(user_brk(end) == end && is_zero((start + PAGE - 1) & -(uint64_t)PAGE, n - 1),
           "the heap grows, zeroed");
    fill(start, n, 7, 0);
    report(user_brk(start + PAGE) == start + PAGE, "it shrinks");
    report(holds(start, 1, 7, 0), "and keeps what is left");
    report(user_brk(end) == end, "it grows again");
    report(holds(start, 1, 7, 0) && is_zero(start + 2 * PAGE, n - 2), "zeroed again");
    report(user_brk(1) == end && user_brk(-(uint64_t)PAGE) == end, "impossible ends change nothing");
    user_brk(start);
}

static void check_advice(uint64_t n)
{
    uint64_t a = map(n);

    fill(a, n, 8, 0);
    report(user_madvise(a + PAGE, PAGE, MADV_DONTNEED) == 0, "one page is not needed");
    report(is_zero(a + PAGE, 1) && holds(a, 1, 8, 0) && holds(a + 2 * PAGE, n - 2, 8, 2),
           "it alone is zero");
    report(user_madvise(a, n * PAGE, MADV_WILLNEED) == 0, "advice without effect is taken");
    user_munmap(a, n * PAGE);
    long shared = user_mmap(0, n * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    report(!user_failed(shared) && is_zero((uint64_t)shared, n), "shared memory, populated");
    fill((uint64_t)shared, n, 9, 0);
    report(user_madvise((uint64_t)shared, n * PAGE, MADV_DONTNEED) == 0 &&
               holds((uint64_t)shared, n, 9, 0),
           "shared memory survives MADV_DONTNEED");
    user_munmap((uint64_t)shared, n * PAGE);
    long low = user_mmap(0, PAGE, RW, ANON | MAP_32BIT, -1, 0);
    report(low > 0 && low < 1L << 31, "MAP_32BIT stays below 2 GiB");
    user_munmap((uint64_t)low, PAGE);
}

/* ---- Random operations ------------------------------------------------------------------------ */

static struct slot {
    uint64_t addr, n_pages, tag, first; /* page i holds stamp(tag, first + i) */
} slots[SLOTS];
static uint64_t next_tag = 100;

static const char *refill(struct slot *slot)
{
    slot->tag = next_tag++;
    slot->first = 0;
    fill(slot->addr, slot->n_pages, slot->tag, 0);
    return "fill";
}

static const char *map_slot(struct slot *slot)
{
    slot->n_pages = 1 + next_random(SLOT_PAGES);
    slot->addr = map(slot->n_pages);
    if (!is_zero(slot->addr, slot->n_pages))
        return NULL;
    refill(slot);
    return "map";
}

static const char *cut(struct slot *slot, bool head)
{
    uint64_t n = 1 + next_random(slot->n_pages);

    if (user_munmap(head ? slot->addr : slot->addr + (slot->n_pages - n) * PAGE, n * PAGE) != 0)
        return NULL;
    slot->n_pages -= n;
    if (head) {
        slot->addr += n * PAGE;
        slot->first += n;
    }
    return "unmap";
}

static const char *protect(struct slot *slot)
{
    uint64_t at = next_random(slot->n_pages), n = 1 + next_random(slot->n_pages - at);

    if (user_mprotect(slot->addr + at * PAGE, n * PAGE, PROT_READ) != 0 ||
        !holds(slot->addr, slot->n_pages, slot->tag, slot->first) ||
        user_mprotect(slot->addr, slot->n_pages * PAGE, RW) != 0)
        return NULL;
    return refill(slot);
}

static const char *resize(struct slot *slot)
{
    uint64_t n = 1 + next_random(SLOT_PAGES);
    long addr = user_mremap(slot->addr, slot->n_pages * PAGE, n * PAGE, MREMAP_MAYMOVE, 0);

    if (user_failed(addr))
        return NULL;
    slot->addr = (uint64_t)addr;
    uint64_t kept = n < slot->n_pages ? n : slot->n_pages;
    if (!holds(slot->addr, kept, slot->tag, slot->first) ||
        !is_zero(slot->addr + kept * PAGE, n - kept))
        return NULL;
    slot->n_pages = n;
    return refill(slot);
}

static const char *forget(struct slot *slot)
{
    if (user_madvise(slot->addr, slot->n_pages * PAGE, MADV_DONTNEED) != 0 ||
        !is_zero(slot->addr, slot->n_pages))
        return NULL;
    return refill(slot);
}

static const char *one_operation(struct slot *slot)
{
    if (slot->n_pages == 0)
        return map_slot(slot);
    if (!holds(slot->addr, slot->n_pages, slot->tag, slot->first))
        return NULL;
    switch (next_random(6)) {
    case 0: return cut(slot, true);
    case 1: return cut(slot, false);
    case 2: return protect(slot);
    case 3: return resize(slot);
    case 4: return forget(slot);
    default: return refill(slot);
    }
}

static void torture(uint64_t rounds)
{
    bool all = true;

    for (uint64_t round = 0; round < rounds; round++) {
        struct slot *slot = &slots[next_random(SLOTS)];
        if (one_operation(slot) == NULL) {
            report(false, "round %lu, on %lu pages at 0x%lx", round, slot->n_pages, slot->addr);
            return;
        }
    }
    for (unsigned i = 0; i < SLOTS; i++)
        all &= holds(slots[i].addr, slots[i].n_pages, slots[i].tag, slots[i].first);
    report(all, "after %lu random operations every page holds what it should", rounds);
}

int main(void)
{
    kvmmm_only_options("pages rounds seed");
    uint64_t n = kvmmm_option_number("pages", 64);
    random_state = kvmmm_option_number("seed", 1) * 2 + 1;
    check_holes(n);
    check_protection(n);
    check_code();
    check_moves(n);
    check_heap(n);
    check_advice(n);
    torture(kvmmm_option_number("rounds", 400));
    return report_summary();
}
