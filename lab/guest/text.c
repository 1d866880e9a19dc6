#include "text.h"

static void put(struct text *text, char byte)
{
    if (text->length < sizeof text->bytes - 1)
        text->bytes[text->length++] = byte;
}

static void put_string(struct text *text, const char *string)
{
    while (*string)
        put(text, *string++);
}

static void put_key(struct text *text, const char *key)
{
    put(text, ' ');
    put_string(text, key);
    put(text, '=');
}

struct text text_new(const char *word)
{
    struct text text;
    text.length = 0;
    put_string(&text, word);
    return text;
}

void text_word(struct text *text, const char *key, const char *value)
{
    put_key(text, key);
    put_string(text, value);
}

void text_decimal(struct text *text, const char *key, u64 value)
{
    char digits[20];
    u32 count = 0;
    do {
        digits[count++] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    put_key(text, key);
    while (count)
        put(text, digits[--count]);
}

void text_hex(struct text *text, const char *key, u64 value)
{
    put_key(text, key);
    put_string(text, "0x");
    int shift = 60;
    while (shift > 0 && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put(text, "0123456789abcdef"[value >> shift & 15]);
}

void text_print(struct text *text)
{
    text->bytes[text->length] = '\n';
    serial_write(text->bytes, text->length + 1);
}

_Noreturn void refuse(const char *reason, const char *detail)
{
    struct text text = text_new("REFUSED");
    text_word(&text, "reason", reason);
    text_word(&text, "detail", detail);
    text_print(&text);
    halt();
}
