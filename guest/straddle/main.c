/* straddle: accesses over edges of untouched memory are exact. Expected: no check fails, status 0.
 *
 * Ring 3. Loads, stores, read-modify-write, string, SSE, AVX and x87 instructions, push and call on
 * an untouched stack, code in untouched pages. Options: only=scalar|string|sse|avx|stack|code,
 * splitlock=0 (leave out locked instructions across cache lines, for hosts that punish them),
 * flags=0 (compare no flags: QEMU's TCG loses PF when it steps over an atomic instruction).
 *
 * The host makes memory present in windows of 2 MiB and more, so each check takes windows of its
 * own: two, from the top of RAM downwards, so that no window grows over the next check's. That
 * wants --memory 1200M (sparse: little of it is ever allocated); with less, the last checks run on
 * untouched pages of present windows, and the summary says how many.
 */
#include "straddle.h"

enum { PAGE_EDGE_STEP = 2 * 4096, PAGE_EDGE_WINDOWS = 4, MIN_WINDOWS = 8 };

uint8_t pattern[128];
uint64_t flags_mask = ~0ULL;

static uint64_t window_floor, window_top, page_top, page_floor;
static unsigned n_short;

static void prepare(void)
{
    struct kvmmm_range ram = kvmmm_ram();
    uint64_t low = (ram.start + KVMMM_WINDOW_BYTES - 1) & -KVMMM_WINDOW_BYTES;
    uint64_t high = ram.end & -KVMMM_WINDOW_BYTES;

    for (unsigned i = 0; i < sizeof pattern; i++)
        pattern[i] = (uint8_t)(i * 37 + 11) | 1;
    if (high < low + MIN_WINDOWS * KVMMM_WINDOW_BYTES) {
        kprintf("straddle: wants %u windows of 2 MiB of RAM; give it more --memory\n",
                MIN_WINDOWS);
        kvmmm_exit(KVMMM_STATUS_USAGE);
    }
    /* Page edges come from the topmost windows. */
    page_top = high;
    page_floor = high - PAGE_EDGE_WINDOWS * KVMMM_WINDOW_BYTES;
    window_top = page_floor;
    window_floor = low;
}

uint8_t *fresh_page_edge(void)
{
    page_top -= PAGE_EDGE_STEP;
    if (page_top <= page_floor) {
        kprintf("straddle: out of pages\n");
        kvmmm_exit(KVMMM_STATUS_FAILED);
    }
    return (uint8_t *)page_top + KVMMM_PAGE_BYTES;
}

uint8_t *fresh_window_edge(enum fill fill)
{
    uint64_t bytes = fill == ABOVE ? KVMMM_WINDOW_BYTES : 2 * KVMMM_WINDOW_BYTES;

    if (window_top - window_floor < bytes) {
        n_short++;
        return fresh_page_edge();
    }
    window_top -= bytes;
    return (uint8_t *)window_top + KVMMM_WINDOW_BYTES;
}

/* Put bytes on one side of an edge. */
static void fill_sides(uint8_t *edge, enum fill fill)
{
    if (fill == BELOW)
        memcpy(edge - SIDE_BYTES, pattern, SIDE_BYTES);
    if (fill == ABOVE)
        memcpy(edge, pattern, SIDE_BYTES);
}

static uint8_t model[2 * SIDE_BYTES] __attribute__((aligned(64)));
static uint8_t model_out[OUT_BYTES] __attribute__((aligned(64)));
static uint8_t real_out[OUT_BYTES] __attribute__((aligned(64)));

static void run_at(const struct check *check, enum fill fill, uint8_t *edge, uint8_t *out)
{
    memset(out, 0, OUT_BYTES);
    fill_sides(edge, fill);
    check->run(edge + check->offset, out);
}

static bool same(const struct check *check, enum fill fill, uint8_t *edge)
{
    run_at(check, fill, edge, real_out);
    return memcmp(edge - SIDE_BYTES, model, sizeof model) == 0 &&
           memcmp(real_out, model_out, OUT_BYTES) == 0;
}

static void run_one(const struct check *check, enum fill fill)
{
    unsigned distance = (unsigned)(check->offset < 0 ? -check->offset : check->offset);

    memset(model, 0, sizeof model);
    run_at(check, fill, model + SIDE_BYTES, model_out);
    bool windows = same(check, fill, fresh_window_edge(fill));
    bool pages = same(check, fill, fresh_page_edge());

    report(windows && pages, "%s at edge%c%u%s%s%s", check->name, check->offset < 0 ? '-' : '+',
           distance, fill == BELOW ? ", upper part untouched" : "",
           fill == ABOVE ? ", lower part untouched" : "",
           windows && pages ? ""
           : windows        ? ": wrong across pages"
           : pages          ? ": wrong across windows"
                            : ": wrong across both");
}

void run_checks(const struct check *checks, size_t n)
{
    for (; n > 0; n--, checks++)
        for (unsigned fill = NONE; fill <= ABOVE; fill <<= 1)
            if (checks->fills & fill)
                run_one(checks, (enum fill)fill);
}

static int straddle(void *arg)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } groups[] = {{"scalar", check_scalars}, {"string", check_strings}, {"sse", check_vectors},
                  {"avx", check_avx},        {"stack", check_stack},    {"code", check_code}};
    const char *only = kvmmm_option("only", "");

    (void)arg;
    kvmmm_only_options("only splitlock flags");
    if (kvmmm_option_number("flags", 1) == 0)
        flags_mask = 0;
    prepare();
    for (size_t i = 0; i < COUNT(groups); i++)
        if (*only == '\0' || kvmmm_equal(only, groups[i].name)) {
            kprintf("straddle: %s\n", groups[i].name);
            groups[i].run();
        }
    if (n_short > 0)
        kprintf("straddle: %u checks found no untouched window left and took pages\n", n_short);
    return report_summary();
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    return kvmmm_enter_ring3(straddle, NULL);
}
