/* Runs the vectors of conformance/ through C: one command a line on stdin, one answer a line on
 * stdout. Texts are in hexadecimal. tests/conformance.rs writes the one and compares the other.
 *
 *     load DIR                              -> ok | error CODE MESSAGE HELP
 *     logits DIR TOKEN...                   -> ok N_TOKENS VOCAB_SIZE LOGIT...
 *     greedy DIR N TOKEN...                 -> ok TOKEN...
 *     chat DIR GENERATION (ROLE CONTENT)... -> ok RENDERED TOKEN...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qwen2.h"

enum { MAX_WORDS = 512, MAX_LINE = 1 << 20 };

static char *words[MAX_WORDS];
static size_t n_words;

/* The text of word i, decoded in place; "-" is empty. */
static const char *text(size_t i, size_t *len) {
    char *word = words[i];
    *len = 0;
    if (strcmp(word, "-") == 0) {
        word[0] = '\0';
        return word;
    }
    for (size_t at = 0; word[at] != '\0' && word[at + 1] != '\0'; at += 2) {
        const char digits[3] = {word[at], word[at + 1], '\0'};
        word[(*len)++] = (char)strtoul(digits, NULL, 16);
    }
    return word;
}

static void print_text(const char *bytes, size_t len) {
    if (len == 0)
        fputs(" -", stdout);
    else
        putchar(' ');
    for (size_t i = 0; i < len; i++)
        printf("%02x", (unsigned char)bytes[i]);
}

/* Prints the error, frees it, and says whether there was one. */
static int failed(qwen2_status status, qwen2_error **error) {
    if (status == QWEN2_OK)
        return 0;
    printf("error %d", (int)status);
    const char *message = qwen2_error_message(*error), *help = qwen2_error_help(*error);
    print_text(message, strlen(message));
    print_text(help ? help : "", help ? strlen(help) : 0);
    putchar('\n');
    qwen2_error_free(*error);
    return 1;
}

static qwen2_model *load(void) {
    qwen2_error *error = NULL;
    qwen2_model *model = NULL;
    size_t len;
    const char *directory = text(1, &len);
    /* A cache that rounds nothing, as the references were computed. */
    qwen2_load_options *options = qwen2_load_options_new();
    int wrong = failed(qwen2_load_options_set_kv_cache(options, "f32", 3, &error), &error);
    wrong = wrong || failed(qwen2_model_load(directory, len, options, &model, &error), &error);
    qwen2_load_options_free(options);
    return wrong ? NULL : model;
}

static size_t token_words(size_t from, uint32_t *tokens) {
    for (size_t i = from; i < n_words; i++)
        tokens[i - from] = (uint32_t)strtoul(words[i], NULL, 10);
    return n_words - from;
}

static void run_logits(void) {
    qwen2_model *model = load();
    if (model == NULL)
        return;
    uint32_t tokens[MAX_WORDS];
    const size_t n = token_words(2, tokens);
    qwen2_error *error = NULL;
    qwen2_logits *logits = NULL;
    if (!failed(qwen2_model_logits(model, tokens, n, &logits, &error), &error)) {
        size_t rows, columns;
        const float *data = qwen2_logits_data(logits, &rows, &columns);
        printf("ok %zu %zu", rows, columns);
        for (size_t i = 0; i < rows * columns; i++)
            printf(" %.9g", (double)data[i]);
        putchar('\n');
    }
    qwen2_logits_free(logits);
    qwen2_model_free(model);
}

static void run_greedy(void) {
    qwen2_model *model = load();
    if (model == NULL)
        return;
    uint32_t tokens[MAX_WORDS];
    const size_t n = token_words(3, tokens);
    qwen2_error *error = NULL;
    qwen2_generation *generation = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();
    qwen2_options *options = qwen2_options_new_greedy();
    qwen2_options_set_max_new_tokens(options, (size_t)strtoul(words[2], NULL, 10));
    qwen2_options_set_ignore_eos(options, 1);
    qwen2_status status = qwen2_prompt_set_tokens(prompt, tokens, n, &error);
    if (status == QWEN2_OK)
        status = qwen2_generate(model, prompt, options, &generation, &error);
    if (!failed(status, &error)) {
        size_t made;
        const uint32_t *ids = qwen2_generation_tokens(generation, &made);
        fputs("ok", stdout);
        for (size_t i = 0; i < made; i++)
            printf(" %u", (unsigned)ids[i]);
        putchar('\n');
    }
    qwen2_generation_free(generation);
    qwen2_options_free(options);
    qwen2_prompt_free(prompt);
    qwen2_model_free(model);
}

static void run_chat(void) {
    qwen2_error *error = NULL;
    qwen2_tokenizer *tokenizer = NULL;
    qwen2_prompt *prompt = qwen2_prompt_new();
    qwen2_text *rendered = NULL;
    qwen2_tokens *tokens = NULL;
    size_t len, role_len, content_len, n;
    const char *directory = text(1, &len);
    const int32_t add_generation_prompt = words[2][0] == '1';
    qwen2_status status = qwen2_tokenizer_load(directory, len, &tokenizer, &error);
    for (size_t i = 3; status == QWEN2_OK && i + 1 < n_words; i += 2) {
        const char *role = text(i, &role_len), *content = text(i + 1, &content_len);
        status = qwen2_prompt_add_message(prompt, role, role_len, content, content_len, &error);
    }
    if (status == QWEN2_OK)
        status = qwen2_tokenizer_apply_chat_template(tokenizer, prompt, add_generation_prompt, &rendered, &error);
    if (status == QWEN2_OK)
        status = qwen2_tokenizer_encode_chat(tokenizer, prompt, add_generation_prompt, &tokens, &error);
    if (!failed(status, &error)) {
        fputs("ok", stdout);
        const char *bytes = qwen2_text_data(rendered, &len);
        print_text(bytes, len);
        const uint32_t *ids = qwen2_tokens_data(tokens, &n);
        for (size_t i = 0; i < n; i++)
            printf(" %u", (unsigned)ids[i]);
        putchar('\n');
    }
    qwen2_text_free(rendered);
    qwen2_tokens_free(tokens);
    qwen2_prompt_free(prompt);
    qwen2_tokenizer_free(tokenizer);
}

static void run_load(void) {
    qwen2_model *model = load();
    if (model != NULL)
        puts("ok");
    qwen2_model_free(model);
}

int main(void) {
    static char line[MAX_LINE];
    while (fgets(line, sizeof line, stdin) != NULL) {
        n_words = 0;
        for (char *word = strtok(line, " \n"); word != NULL && n_words < MAX_WORDS; word = strtok(NULL, " \n"))
            words[n_words++] = word;
        if (n_words < 2)
            return 2;
        if (strcmp(words[0], "load") == 0)
            run_load();
        else if (strcmp(words[0], "logits") == 0)
            run_logits();
        else if (strcmp(words[0], "greedy") == 0)
            run_greedy();
        else if (strcmp(words[0], "chat") == 0)
            run_chat();
        else
            return 2;
        fflush(stdout);
    }
    return 0;
}
