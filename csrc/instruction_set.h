// The instruction set that the operators with code of their own for each run on.
#pragma once

// Wider sets than the compiler's baseline are compiled by GCC's target pragma: elsewhere the baseline stands alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ALETHEIA_X86_SETS 1
#endif

namespace aletheia {

enum class InstructionSet { kDefault, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxBf16 };

const char* name_of(InstructionSet set);

// The widest that this processor offers.
InstructionSet offered_instruction_set();

// The one in use: the widest offered, or the one that the environment variable ALETHEIA_CPU_ISA names. Read at every
// call, so that one process can go through all of them. Throws when the name is unknown or the processor lacks it.
InstructionSet instruction_set();

}  // namespace aletheia
