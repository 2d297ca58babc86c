/* An older header and today's agree: a type, signature or constant that differs does not compile. */
#include "old/qwen2.h"
#undef QWEN2_H
#include "new/qwen2.h"

int main(void) { return 0; }
