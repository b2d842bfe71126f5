/* The guest library's console, text and options on the host, against a fake ring and fake ports.
 *
 * Built and run by test_library.py. The "host" side is deliberately slow and awkward: it drains a
 * few bytes at a doorbell only, and feeds input in small pieces.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvmmm.h"

static struct kvmmm_console console;
static struct kvmmm_report verdicts;
static char out_ring[64], in_ring[16];
static char seen[1 << 20];
static size_t n_seen, n_doorbells, n_inputs;
static const char *input = "";
static unsigned cpl = 3;
static struct kvmmm_boot_info boot_info;

const struct kvmmm_boot_info *kvmmm_boot = &boot_info;

unsigned kvmmm_cpl(void) { return cpl; }

static void drain(size_t most)
{
    for (; most > 0 && console.out_tail < console.out_head; most--, console.out_tail++)
        seen[n_seen++] = out_ring[console.out_tail % sizeof out_ring];
    assert(console.out_head - console.out_tail <= sizeof out_ring);
}

void kvmmm_out8(uint16_t port, uint8_t value)
{
    (void)value;
    switch (port) {
    case KVMMM_PORT_DOORBELL:
        n_doorbells++;
        drain(1 + n_doorbells % 70); /* "drained" may mean little on a bad day */
        break;
    case KVMMM_PORT_INPUT:
        n_inputs++;
        for (size_t n = 0; n < 1 + n_inputs % 20 && *input != '\0'; n++, input++) {
            if (console.in_head - console.in_tail == sizeof in_ring)
                break;
            in_ring[console.in_head++ % sizeof in_ring] = *input;
        }
        console.in_eof = *input == '\0';
        break;
    default:
        abort();
    }
}

void kvmmm_exit(int status)
{
    printf("exit %d\n", status);
    exit(100);
}

static void reset(void)
{
    memset(&console, 0, sizeof console);
    console.out_data = (uint64_t)out_ring;
    console.in_data = (uint64_t)in_ring;
    console.out_bytes = sizeof out_ring;
    console.in_bytes = sizeof in_ring;
    boot_info.console = (uint64_t)&console;
    boot_info.report = (uint64_t)&verdicts;
    n_seen = n_doorbells = n_inputs = 0;
}

static void test_write(void)
{
    static char text[100000];

    for (unsigned sleeps = 0; sleeps < 2; sleeps++)
        for (cpl = 0; cpl <= 3; cpl += 3) {
            size_t n_written = 0;
            reset();
            console.host_sleeps = sleeps;
            srand(7);
            for (size_t i = 0; i < sizeof text; i++)
                text[i] = (char)rand();
            while (n_written < sizeof text) {
                size_t n = (size_t)rand() % 150;
                n = n < sizeof text - n_written ? n : sizeof text - n_written;
                console_write(text + n_written, n);
                n_written += n;
                if (rand() % 3 == 0)
                    drain((size_t)rand() % 40);
            }
            drain(sizeof out_ring);
            assert(n_seen == sizeof text && memcmp(seen, text, n_seen) == 0);
        }
}

static void test_doorbell(void)
{
    reset();
    console_write("awake", 5);
    console_flush();
    assert(n_doorbells == 0 && console.out_head == 5); /* published, and nobody rung out of bed */
    console.host_sleeps = 1;
    console_flush();
    assert(n_doorbells == 1);
    console_write("", 0);
    assert(n_doorbells == 1);
}

static void test_read(void)
{
    static char got[4096];
    const char *all = "a line\nanother line that is longer than the ring\n\nno newline at the end";

    for (size_t most = 1; most < 40; most++) {
        size_t n, n_got = 0;
        reset();
        input = all;
        while ((n = console_read(got + n_got, most)) > 0) {
            assert(n <= most);
            n_got += n;
        }
        assert(n_got == strlen(all) && memcmp(got, all, n_got) == 0);
        assert(console_read(got, most) == 0); /* the end stays the end */
    }
    assert(console_read(got, 0) == 0);
}

static void expect(const char *wanted, const char *format, ...)
{
    char text[200], libc[200];
    va_list args;

    va_start(args, format);
    size_t n = kvmmm_vformat(text, sizeof text, format, args);
    va_end(args);
    va_start(args, format);
    vsnprintf(libc, sizeof libc, format, args);
    va_end(args);
    if (strcmp(text, wanted) != 0 || n != strlen(wanted) || strcmp(wanted, libc) != 0) {
        printf("%s: `%s`, libc `%s`, wanted `%s`\n", format, text, libc, wanted);
        abort();
    }
}

static void test_format(void)
{
    char small[6];

    expect("-2147483648 0 7", "%d %d %i", (int)0x80000000, 0, 7);
    expect("-9223372036854775808", "%ld", INT64_MIN);
    expect("18446744073709551615 ffffffff", "%lu %x", ~0UL, ~0U);
    expect("[  42][42  ][0042][-042]", "[%4d][%-4d][%04d][%04d]", 42, 42, 42, -42);
    expect("[   ab][ab   ][abcdef]", "[%5s][%-5s][%5s]", "ab", "ab", "abcdef");
    expect("0x1f x 100%", "%p %c %d%%", (void *)0x1f, 'x', 100);
    expect("123456789012", "%zu", (size_t)123456789012);
    assert(kvmmm_format(small, sizeof small, "%s", "too long") == 8 && strcmp(small, "too l") == 0);
    assert(kvmmm_format(small, 0, "%d", 12) == 2);
}

static void test_memory(void)
{
    char a[100], b[100];

    for (cpl = 0; cpl <= 3; cpl += 3)
        for (size_t n = 0; n < 40; n++)
            for (size_t to = 0; to < 50; to += 3) {
                for (size_t i = 0; i < sizeof a; i++)
                    a[i] = b[i] = (char)(i * 7);
                (memmove)(a + to, a + 20, n);
                for (size_t i = 0; i < n; i++)
                    b[to + i] = (char)((20 + i) * 7);
                for (size_t i = 0; i < sizeof a; i++)
                    assert(a[i] == b[i]);
                (memset)(a + to, 0x85, n);
                for (size_t i = 0; i < sizeof a; i++)
                    assert(a[i] == (i - to < n ? (char)0x85 : b[i]));
            }
    assert((memcmp)("axc", "axd", 3) < 0 && (memcmp)("\xff", "a", 1) > 0);
    assert((memcmp)("x", "y", 0) == 0);
}

static void test_options(const char *cmdline)
{
    const char *const *words;

    boot_info.cmdline = (uint64_t)cmdline;
    boot_info.cmdline_bytes = (uint32_t)strlen(cmdline);
    assert(kvmmm_args(&words) == 5 && words[5] == NULL);
    assert(strcmp(words[0], "one") == 0 && strcmp(words[4], "x=0x1fK") == 0);
    assert(kvmmm_option_number("bytes", 1) == 48 << 20);
    assert(kvmmm_option_number("byte", 1) == 1);
    assert(kvmmm_option_number("x", 1) == 0x1f << 10);
    assert(strcmp(kvmmm_option("mode", ""), "bulk") == 0);
    assert(strcmp(kvmmm_option("empty", "no"), "") == 0);

    uint64_t number = 5;
    const char *bad[] = {"", "x", "0x", "1Q", "1KK", "-1", "99999999999999999999", "0xffffffffffffffffK"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert(!kvmmm_parse_number(bad[i], &number) && number == 5);
    assert(kvmmm_parse_number("18446744073709551615", &number) && number == UINT64_MAX);
    assert(kvmmm_parse_number("2g", &number) && number == 2UL << 30);
}

static void test_ram(void)
{
    struct kvmmm_region map[] = {
        {0x1000, 0x200000, KVMMM_REGION_RAM, 3},
        {0x200000, 0x300000, KVMMM_REGION_IMAGE, 5},
        {0x300000, 0x4000000, KVMMM_REGION_RAM, 3},
        {0x4000000, 0x8000000, KVMMM_REGION_SYSTEM, 0},
    };
    struct kvmmm_range ram;

    boot_info.regions = (uint64_t)map;
    boot_info.n_regions = 4;
    boot_info.stack_top = 0x4000000;
    ram = kvmmm_ram();
    assert(ram.start == 0x300000 && ram.end == 0x4000000 - KVMMM_STACK_BYTES);
    boot_info.stack_top = 0x400000; /* low in the region: what is above it is larger */
    ram = kvmmm_ram();
    assert(ram.start == 0x400000 && ram.end == 0x4000000);
    boot_info.stack_top = 0x200000;
    ram = kvmmm_ram();
    assert(ram.start == 0x300000 && ram.end == 0x4000000);
}

int main(void)
{
    test_write();
    test_doorbell();
    test_read();
    test_format();
    test_memory();
    test_options("  one bytes=48M  mode=bulk\tempty=\nx=0x1fK ");
    test_ram();
    puts("ok");
    return 0;
}
