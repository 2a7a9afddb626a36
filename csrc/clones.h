// One source, one machine code an instruction set: the loader picks the clone that the processor runs best.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define ALETHEIA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ALETHEIA_CLONES
#endif
