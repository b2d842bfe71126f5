/* trees: a kernel with two page-table trees is forked midway. Expected: no check fails, status 0.
 *
 * One window of addresses leads to different frames in each tree; ring 3 asks for the other tree by
 * int3. At the `out` to FORK_PORT the host may fork the VM, and tell each side by rbx who it is:
 * from there on each writes stamps of its own, and must never see the other's.
 */
#include "kvmmm.h"

enum { BP = 3, UD = 6, ENTRIES = 512, MAX_PAGES = 512, FORK_PORT = 0xb0, N_TREES = 2 };
enum { PRESENT = 1, WRITABLE = 2, USER = 4, ACCESSED = 32, DIRTY = 64 };
#define TABLE_FLAGS (PRESENT | WRITABLE | USER | ACCESSED)
#define WINDOW 0x8000000000UL /* slot 1 of the root: the boot tables use slot 0 alone */

static uint64_t roots[N_TREES];
static volatile uint64_t n_undefined;
static uint64_t n_pages, n_rounds;

static void handle(struct kvmmm_trap_frame *frame)
{
    if (frame->vector == BP && frame->rdi < N_TREES) {
        asm volatile("mov %0, %%cr3" : : "r"(roots[frame->rdi]) : "memory");
        return;
    }
    if (frame->vector == UD) {
        n_undefined = n_undefined + 1;
        frame->rip += 2; /* past ud2 */
        return;
    }
    kprintf("FAIL: exception %lu, error code 0x%lx, at 0x%lx, cr2 0x%lx\n", frame->vector, frame->error,
            frame->rip, frame->cr2);
    kvmmm_exit(KVMMM_STATUS_FAILED);
}

/* Page 0 of `free` becomes the next table; all of it is written, so it is there before a CPU walks it. */
static uint64_t *take_table(uint64_t *free)
{
    uint64_t *table = (uint64_t *)*free;
    memset(table, 0, KVMMM_PAGE_BYTES);
    *free += KVMMM_PAGE_BYTES;
    return table;
}

static uint64_t plant_tree(uint64_t *free)
{
    uint64_t boot_root, *root = take_table(free), *upper = take_table(free), *middle = take_table(free);
    uint64_t *lower = take_table(free);

    asm volatile("mov %%cr3, %0" : "=r"(boot_root));
    memcpy(root, (void *)boot_root, KVMMM_PAGE_BYTES);
    root[1] = (uint64_t)upper | TABLE_FLAGS;
    upper[0] = (uint64_t)middle | TABLE_FLAGS;
    middle[0] = (uint64_t)lower | TABLE_FLAGS;
    for (uint64_t i = 0; i < n_pages; i++)
        lower[i] = (uint64_t)take_table(free) | TABLE_FLAGS | DIRTY; /* a page of data, this time */
    return (uint64_t)root;
}

static void climb(uint64_t tree) { asm volatile("int3" : : "D"(tree) : "memory"); }

static uint64_t stamp_of(uint64_t side, uint64_t tree, uint64_t page, uint64_t round)
{
    return (side + 1) << 56 | tree << 48 | page << 16 | round;
}

static void write_stamps(uint64_t side, uint64_t round)
{
    for (uint64_t tree = 0; tree < N_TREES; tree++) {
        climb(tree);
        for (uint64_t i = 0; i < n_pages; i++) {
            volatile uint64_t *page = (uint64_t *)(WINDOW + i * KVMMM_PAGE_BYTES);
            page[0] = page[ENTRIES - 1] = stamp_of(side, tree, i, round);
        }
    }
}

static bool stamps_are(uint64_t side, uint64_t round)
{
    bool right = true;
    for (uint64_t tree = 0; tree < N_TREES; tree++) {
        climb(tree);
        for (uint64_t i = 0; i < n_pages; i++) {
            volatile uint64_t *page = (uint64_t *)(WINDOW + i * KVMMM_PAGE_BYTES);
            uint64_t wanted = stamp_of(side, tree, i, round);
            right = right && page[0] == wanted && page[ENTRIES - 1] == wanted;
        }
    }
    return right;
}

/* Hold 64 bytes in vector registers over an exception, or over the fork; which side it then is. */
static bool vectors_survive(bool at_fork, uint64_t *side)
{
    static uint8_t before[64] __attribute__((aligned(32))), after[64] __attribute__((aligned(32)));
    uint64_t who = *side;
    for (int i = 0; i < 64; i++)
        before[i] = (uint8_t)(i * 7 + 3 + who);
    if ((kvmmm_boot->cpu_features & KVMMM_CPU_AVX) == 0) {
        if (at_fork)
            asm volatile("outb %%al, %1" : "+b"(who) : "i"(FORK_PORT) : "memory");
        *side = who;
        return true;
    }
    if (at_fork)
        asm volatile("vmovdqa (%1), %%ymm6; vmovdqa 32(%1), %%ymm15\n"
                     "outb %%al, %3\n"
                     "vmovdqa %%ymm6, (%2); vmovdqa %%ymm15, 32(%2); vzeroupper"
                     : "+b"(who) : "r"(before), "r"(after), "i"(FORK_PORT) : "memory");
    else
        asm volatile("vmovdqa (%0), %%ymm6; vmovdqa 32(%0), %%ymm15\n"
                     "ud2\n"
                     "vmovdqa %%ymm6, (%1); vmovdqa %%ymm15, 32(%1); vzeroupper"
                     : : "r"(before), "r"(after) : "memory");
    *side = who;
    return memcmp(before, after, sizeof before) == 0;
}

static int run(void *arg)
{
    uint64_t side = 0;
    bool stamps = true, vectors = true;

    (void)arg;
    write_stamps(0, 0);
    report(stamps_are(0, 0), "each tree keeps its own pages");
    report(vectors_survive(true, &side), "vector registers survive the fork");
    kprintf("trees: side %lu\n", side);
    report(stamps_are(0, 0), "every byte is there after the fork");
    for (uint64_t round = 1; round <= n_rounds; round++) {
        uint64_t same = side;
        write_stamps(side, round);
        vectors = vectors && vectors_survive(false, &same);
        stamps = stamps && stamps_are(side, round);
    }
    report(stamps, "nobody else writes here");
    report(vectors, "vector registers survive exceptions");
    report(n_undefined == n_rounds || !(kvmmm_boot->cpu_features & KVMMM_CPU_AVX),
           "every exception came, and none of the other side's");
    return report_summary();
}

int main(const struct kvmmm_boot_info *boot)
{
    struct kvmmm_range ram = kvmmm_ram();
    uint64_t free = ram.start;

    (void)boot;
    kvmmm_only_options("pages rounds");
    n_pages = kvmmm_option_number("pages", 64);
    n_rounds = kvmmm_option_number("rounds", 20);
    if (n_pages > MAX_PAGES || free + (n_pages + 4) * N_TREES * KVMMM_PAGE_BYTES > ram.end) {
        kprintf("trees: pages=%lu is too many\n", n_pages);
        kvmmm_exit(KVMMM_STATUS_USAGE);
    }
    for (int tree = 0; tree < N_TREES; tree++)
        roots[tree] = plant_tree(&free);
    kvmmm_set_trap_handler(handle);
    return kvmmm_enter_ring3(run, NULL);
}
