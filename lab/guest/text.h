// One line of output: `WORD key=value key=value`.
#pragma once

#include "machine.h"

struct text {
    char bytes[256];
    u32 length;
};

struct text text_new(const char *word);
void text_word(struct text *text, const char *key, const char *value);
void text_decimal(struct text *text, const char *key, u64 value);
void text_hex(struct text *text, const char *key, u64 value);
void text_print(struct text *text);

// `REFUSED reason=.. detail=..`, and the guest stops.
_Noreturn void refuse(const char *reason, const char *detail);
