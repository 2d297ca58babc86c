/* Loses a handle on purpose. */
#include "qwen2.h"

int main(void) {
    qwen2_prompt *prompt = qwen2_prompt_new();
    prompt = NULL;
    return prompt != NULL;
}
