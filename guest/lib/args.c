/* The command line: words, and `key=value` options with numbers as people write them. */
#include "kvmmm.h"

enum { MAX_WORDS = 64, MAX_BYTES = 2048 };

static const char *words[MAX_WORDS + 1]; /* ends with NULL */
static char text[MAX_BYTES];
static int n_words = -1; /* not split yet */

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static void __attribute__((noreturn, cold)) usage(const char *word, const char *why)
{
    kprintf("command line: `%s` %s\n", word, why);
    kvmmm_exit(KVMMM_STATUS_USAGE);
}

static void split(void)
{
    size_t n = kvmmm_boot->cmdline_bytes;

    if (n >= MAX_BYTES)
        usage((const char *)kvmmm_boot->cmdline, "is too long");
    memcpy(text, (const char *)kvmmm_boot->cmdline, n);
    text[n] = '\0';
    n_words = 0;
    for (char *p = text; *p != '\0';) {
        if (is_space(*p)) {
            *p++ = '\0';
            continue;
        }
        if (n_words == MAX_WORDS)
            usage(p, "is one word too many");
        words[n_words++] = p;
        while (*p != '\0' && !is_space(*p))
            p++;
    }
}

int kvmmm_args(const char *const **first)
{
    if (n_words < 0)
        split();
    *first = words;
    return n_words;
}

/* What follows `key=` in word, or NULL if word is something else. */
static const char *value_of(const char *word, const char *key, size_t n_key)
{
    for (; n_key > 0; n_key--)
        if (*word++ != *key++)
            return NULL;
    return *word == '=' ? word + 1 : NULL;
}

const char *kvmmm_option(const char *key, const char *fallback)
{
    const char *const *word;

    for (kvmmm_args(&word); *word != NULL; word++) {
        const char *value = value_of(*word, key, strlen(key));
        if (value != NULL)
            return value;
    }
    return fallback;
}

bool kvmmm_parse_number(const char *digits, uint64_t *number)
{
    uint64_t base = 10, value = 0;
    unsigned shift = 0;

    if (digits[0] == '0' && (digits[1] | 0x20) == 'x') {
        base = 16;
        digits += 2;
    }
    const char *first = digits;
    for (;; digits++) {
        uint64_t digit = base;
        if (*digits >= '0' && *digits <= '9')
            digit = (uint64_t)(*digits - '0');
        else if (base == 16 && (*digits | 0x20) >= 'a' && (*digits | 0x20) <= 'f')
            digit = (uint64_t)((*digits | 0x20) - 'a') + 10;
        if (digit >= base)
            break;
        if (__builtin_mul_overflow(value, base, &value) ||
            __builtin_add_overflow(value, digit, &value))
            return false;
    }
    if (digits == first)
        return false;
    switch (*digits | 0x20) {
    case 'k': shift = 10; break;
    case 'm': shift = 20; break;
    case 'g': shift = 30; break;
    }
    if (shift > 0)
        digits++;
    if (*digits != '\0' || value > UINT64_MAX >> shift)
        return false;
    *number = value << shift;
    return true;
}

uint64_t kvmmm_option_number(const char *key, uint64_t fallback)
{
    const char *value = kvmmm_option(key, NULL);
    uint64_t number = fallback;

    if (value != NULL && !kvmmm_parse_number(value, &number))
        usage(value, "is no number: write digits or 0x…, then K, M or G if you like");
    return number;
}

void kvmmm_only_options(const char *keys)
{
    const char *const *word;

    for (kvmmm_args(&word); *word != NULL; word++) {
        const char *key = keys;
        bool known = false;
        while (*key != '\0' && !known) {
            size_t n_key = 0;
            while (key[n_key] != '\0' && key[n_key] != ' ')
                n_key++;
            known = value_of(*word, key, n_key) != NULL;
            key += n_key;
            while (*key == ' ')
                key++;
        }
        if (!known) {
            kprintf("command line: `%s` is not understood; this guest knows: %s\n", *word,
                    *keys != '\0' ? keys : "no options");
            kvmmm_exit(KVMMM_STATUS_USAGE);
        }
    }
}
