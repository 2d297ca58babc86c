/* The header stands alone, may be included twice, and is C++ as well as C. */
#include "qwen2.h"
#include "qwen2.h"

int main(void) {
    const char *(*version)(void) = qwen2_version;
    return version()[0] == '\0' || qwen2_abi_version() != QWEN2_ABI_VERSION;
}
