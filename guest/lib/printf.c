/* A printf for kernels: integers, strings, characters. Bounded, without state. */
#include "kvmmm.h"

struct sink {
    char *text;
    size_t room, length; /* length counts what did not fit, too */
};

struct field {
    unsigned width;
    bool left, zeros;
};

static void put(struct sink *sink, char c)
{
    if (sink->length + 1 < sink->room)
        sink->text[sink->length] = c;
    sink->length++;
}

static void put_field(struct sink *sink, const struct field *field, const char *sign,
                      const char *body, size_t n)
{
    size_t n_sign = strlen(sign);
    size_t pad = field->width > n + n_sign ? field->width - n - n_sign : 0;

    if (!field->left && !field->zeros)
        for (; pad > 0; pad--)
            put(sink, ' ');
    for (; *sign != '\0'; sign++)
        put(sink, *sign);
    if (!field->left)
        for (; pad > 0; pad--)
            put(sink, '0');
    for (; n > 0; n--)
        put(sink, *body++);
    for (; pad > 0; pad--)
        put(sink, ' ');
}

static void put_number(struct sink *sink, const struct field *field, const char *sign,
                       uint64_t number, unsigned base)
{
    char digits[20]; /* 2^64 - 1 in decimal */
    char *first = digits + sizeof digits;

    do {
        *--first = "0123456789abcdef"[number % base];
        number /= base;
    } while (number > 0);
    put_field(sink, field, sign, first, (size_t)(digits + sizeof digits - first));
}

static void put_signed(struct sink *sink, const struct field *field, int64_t number)
{
    uint64_t magnitude = number < 0 ? -(uint64_t)number : (uint64_t)number;

    put_number(sink, field, number < 0 ? "-" : "", magnitude, 10);
}

static void put_string(struct sink *sink, struct field field, const char *text)
{
    if (text == NULL)
        text = "(null)";
    field.zeros = false;
    put_field(sink, &field, "", text, strlen(text));
}

size_t kvmmm_vformat(char *text, size_t room, const char *format, va_list args)
{
    struct sink sink = {text, room, 0};

    for (; *format != '\0'; format++) {
        if (*format != '%') {
            put(&sink, *format);
            continue;
        }
        struct field field = {0, false, false};
        bool wide = false;
        for (format++; *format == '-' || *format == '0'; format++) {
            field.left |= *format == '-';
            field.zeros |= *format == '0';
        }
        field.zeros &= !field.left;
        for (; *format >= '0' && *format <= '9'; format++)
            field.width = field.width * 10 + (unsigned)(*format - '0');
        for (; *format == 'l' || *format == 'z'; format++)
            wide = true;

        char one;
        switch (*format) {
        case 'd':
        case 'i':
            put_signed(&sink, &field, wide ? va_arg(args, int64_t) : va_arg(args, int));
            break;
        case 'u':
            put_number(&sink, &field, "", wide ? va_arg(args, uint64_t) : va_arg(args, unsigned),
                       10);
            break;
        case 'x':
            put_number(&sink, &field, "", wide ? va_arg(args, uint64_t) : va_arg(args, unsigned),
                       16);
            break;
        case 'p':
            put_number(&sink, &field, "0x", (uint64_t)va_arg(args, void *), 16);
            break;
        case 's':
            put_string(&sink, field, va_arg(args, const char *));
            break;
        case 'c':
            one = (char)va_arg(args, int);
            field.zeros = false;
            put_field(&sink, &field, "", &one, 1);
            break;
        case '\0':
            format--; /* a lone % ends the text */
            put(&sink, '%');
            break;
        default: /* %% and what we do not know: as it stands */
            if (*format != '%')
                put(&sink, '%');
            put(&sink, *format);
        }
    }
    if (room > 0)
        text[sink.length < room ? sink.length : room - 1] = '\0';
    return sink.length;
}

size_t kvmmm_format(char *text, size_t room, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    size_t length = kvmmm_vformat(text, room, format, args);
    va_end(args);
    return length;
}

void kprintf(const char *format, ...)
{
    char text[KPRINTF_BYTES];
    va_list args;

    va_start(args, format);
    size_t length = kvmmm_vformat(text, sizeof text, format, args);
    va_end(args);
    console_write(text, length < sizeof text ? length : sizeof text - 1);
}
