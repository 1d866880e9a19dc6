#include "options.h"
#include "text.h"

static u32 same(const char *left, const char *right)
{
    while (*left && *left == *right)
        left++, right++;
    return *left == *right;
}

// The value of `token` when its key is `key`, else null.
static const char *value_of(const char *token, const char *key)
{
    while (*key)
        if (*token++ != *key++)
            return 0;
    return *token == '=' ? token + 1 : 0;
}

static u64 number(const char **at, const char *token)
{
    const char *from = *at;
    u64 base = 10, value = 0;
    if (from[0] == '0' && from[1] == 'x') {
        base = 16;
        from += 2;
    }
    const char *first = from;
    for (;; from++) {
        u64 digit;
        if (*from >= '0' && *from <= '9')
            digit = (u64)(*from - '0');
        else if (base == 16 && *from >= 'a' && *from <= 'f')
            digit = (u64)(*from - 'a') + 10;
        else
            break;
        if (value > (~0ull - digit) / base)
            refuse("number_too_large", token);
        value = value * base + digit;
    }
    if (from == first)
        refuse("not_a_number", token);
    *at = from;
    return value;
}

static u64 whole_number(const char *value, const char *token)
{
    u64 parsed = number(&value, token);
    if (*value)
        refuse("not_a_number", token);
    return parsed;
}

static void add_range(struct boot *boot, const char *value, const char *token)
{
    u64 start = number(&value, token);
    if (*value++ != ',')
        refuse("range_wants_start_and_length", token);
    u64 length = whole_number(value, token);
    if (boot->range_count == MAX_RANGES)
        refuse("too_many_ranges", token);
    boot->ranges[boot->range_count++] = (struct range){start, start + length};
}

static void parse_one(struct options *options, struct boot *boot, const char *token)
{
    const struct {
        const char *key;
        u64 *to;
    } numbers[] = {
        {"mib", &options->mib},      {"touch", &options->touch_mib},
        {"rate", &options->rate_mib}, {"verify", &options->verify_rate_mib},
        {"tick", &options->tick_ms}, {"seed", &options->seed},
    };
    const char *value;
    for (u32 i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if ((value = value_of(token, numbers[i].key))) {
            *numbers[i].to = whole_number(value, token);
            return;
        }
    if ((value = value_of(token, "range")))
        add_range(boot, value, token);
    else if (same(token, "fill=random"))
        options->fill = FILL_RANDOM;
    else if (same(token, "fill=stamp"))
        options->fill = FILL_STAMP;
    else if (same(token, "fill=zero"))
        options->fill = FILL_ZERO;
    else if (same(token, "place=spread"))
        options->spread = 1;
    else if (same(token, "place=packed"))
        options->spread = 0;
    else
        refuse("unknown_option", token);
}

struct options options_parse(struct boot *boot)
{
    struct options options = {
        .mib = 64, .rate_mib = 0, .verify_rate_mib = 64, .tick_ms = 50, .fill = FILL_RANDOM, .spread = 1};
    char *at = boot->command_line;
    for (u32 index = 0;; index++) {
        while (*at == ' ')
            at++;
        if (!*at)
            break;
        char *token = at;
        while (*at && *at != ' ')
            at++;
        if (*at)
            *at++ = 0;
        // The first word is the image's file name.
        if (index > 0)
            parse_one(&options, boot, token);
    }
    if (options.tick_ms == 0 || options.mib + options.touch_mib == 0)
        refuse("nothing_to_do", "mib, touch, tick");
    return options;
}
