/* sieve: a real computation in ring 3 is right. Expected: pi(2 000 000) = 148933, status 0.
 *
 * Option: n=2000000. One byte a number, in RAM from the memory map.
 */
#include "kvmmm.h"

static const struct {
    uint64_t n, primes;
} known[] = {
    {10, 4},        {100, 25},        {1000, 168},       {10000, 1229},    {100000, 9592},
    {1000000, 78498}, {2000000, 148933}, {10000000, 664579},
};

static int sieve(void *arg)
{
    struct kvmmm_range ram = kvmmm_ram();
    uint64_t n, primes = 0, largest = 0;

    (void)arg;
    kvmmm_only_options("n");
    n = kvmmm_option_number("n", 2000000);
    if (n < 2 || n >= ram.end - ram.start) {
        kprintf("sieve: n=%lu needs as many bytes of RAM; there are %lu\n", n, ram.end - ram.start);
        return KVMMM_STATUS_USAGE;
    }

    uint8_t *composite = (uint8_t *)ram.start; /* zero, as fresh memory is */
    for (uint64_t p = 2; p * p <= n; p++)
        if (!composite[p])
            for (uint64_t multiple = p * p; multiple <= n; multiple += p)
                composite[multiple] = 1;
    for (uint64_t p = 2; p <= n; p++)
        if (!composite[p]) {
            primes++;
            largest = p;
        }

    kprintf("sieve: %lu primes up to %lu, the largest is %lu\n", primes, n, largest);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].n == n) {
            report(primes == known[i].primes, "pi(%lu) = %lu", n, known[i].primes);
            return report_summary();
        }
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    return kvmmm_enter_ring3(sieve, NULL);
}
