/* user_atomic: locked instructions lose no update. Expected: status 0.
 *
 * Counts a word up by lock xadd and lock cmpxchg, and gives tokens for tokens through another by xchg.
 * With at=ADDR, a page with struct shared, the host does the same to the same words meanwhile: neither
 * gets further ahead than `slack` operations, so they are at it together, and each sees the other's.
 * Options: n, how often each; at; slack.
 */
#include "user.h"

struct shared {
    _Alignas(64) uint32_t counter; /* begins at -n, so that it passes zero */
    _Alignas(64) uint32_t token;   /* ours are odd, the host's even; 0 at first */
    _Alignas(64) uint32_t host_is_done;
    _Alignas(64) uint32_t guest_is_done;
};

static struct shared alone;
static volatile struct shared *shared = &alone;
static bool has_host;
static uint32_t n, slack;

static uint32_t fetch_add(volatile uint32_t *word, uint32_t value)
{
    asm volatile("lock xaddl %0, %1" : "+r"(value), "+m"(*word) : : "memory", "cc");
    return value;
}

static uint32_t compare_and_swap(volatile uint32_t *word, uint32_t old, uint32_t new)
{
    asm volatile("lock cmpxchgl %2, %1" : "+a"(old), "+m"(*word) : "r"(new) : "memory", "cc");
    return old;
}

static uint32_t swap(volatile uint32_t *word, uint32_t new)
{
    asm volatile("xchgl %0, %1" : "+r"(new), "+m"(*word) : : "memory");
    return new;
}

static void pause(uint32_t times)
{
    while (times-- > 0)
        asm volatile("pause" : : : "memory");
}

/* The value before. */
static uint32_t increment(bool by_xadd, uint64_t *n_races)
{
    if (by_xadd)
        return fetch_add(&shared->counter, 1);
    uint32_t seen = shared->counter;
    for (;; ++*n_races) {
        uint32_t found = compare_and_swap(&shared->counter, seen, seen + 1);
        if (found == seen)
            return seen;
        seen = found;
    }
}

static void count(void)
{
    uint32_t theirs = 0; /* what the host has added, by what we have seen */
    uint64_t n_seen = 0, n_races = 0, n_backwards = 0;

    for (uint32_t own = 0; own < n; own++) {
        /* The further ahead, the slower; at `slack`, wait. */
        if (has_host && own > theirs)
            pause((own - theirs) / 4);
        while (has_host && own > theirs + slack && own > shared->counter - own + n + slack)
            pause(1);
        uint32_t now = increment(own & 1, &n_races) - own + n;
        n_seen += now != theirs;
        n_backwards += (int32_t)(now - theirs) < 0;
        theirs = now;
    }
    report(n_backwards == 0, "what was added stays");
    report(has_host || (shared->counter == 0 && theirs == 0), "nobody else has added");
    kprintf("atomic: counted %u seen %lu races %lu\n", n, n_seen, n_races);
}

struct sums {
    uint64_t tokens, squares;
};

static void add(struct sums *sums, uint32_t token)
{
    sums->tokens += token;
    sums->squares += (uint64_t)token * token;
}

static void exchange(void)
{
    struct sums given = {0, 0}, taken = {0, 0};
    uint64_t n_seen = 0;

    for (uint32_t i = 0, n_alone = 0; i < n; i++) {
        uint32_t token = 2 * i + 1;
        if (has_host && !shared->host_is_done)
            pause(n_alone * 16);
        while (has_host && n_alone >= slack && (shared->token & 1) && !shared->host_is_done)
            pause(1);
        uint32_t found = swap(&shared->token, token);
        n_alone = !(found & 1) ? 0 : n_alone < slack ? n_alone + 1 : slack;
        n_seen += found != 0 && !(found & 1);
        add(&given, token);
        add(&taken, found);
    }
    shared->guest_is_done = 1;
    if (!has_host) {
        add(&taken, shared->token);
        report(given.tokens == taken.tokens && given.squares == taken.squares, "no token is lost");
    }
    kprintf("atomic: exchanged %u seen %lu given %lu %lu taken %lu %lu\n", n, n_seen, given.tokens,
            given.squares, taken.tokens, taken.squares);
}

int main(void)
{
    kvmmm_only_options("n at slack");
    n = (uint32_t)kvmmm_option_number("n", 1000000);
    slack = (uint32_t)kvmmm_option_number("slack", 256);
    uint64_t at = kvmmm_option_number("at", 0);
    has_host = at != 0;
    if (has_host)
        shared = (volatile struct shared *)at;
    else
        shared->counter = -n;
    count();
    exchange();
    return report_summary();
}
