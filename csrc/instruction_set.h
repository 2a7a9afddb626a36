// The instruction set that the operators with code of their own for each run on.
#pragma once

#include <string>

// Wider sets than the compiler's baseline are compiled by GCC's target pragma: elsewhere the baseline stands alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ALETHEIA_X86_SETS 1
#endif

namespace aletheia {

enum class InstructionSet { kDefault, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxBf16 };

const char* name_of(InstructionSet set);

// The widest that this processor offers.
InstructionSet offered_instruction_set();

// The one in use: the widest offered, or the one that the environment variable ALETHEIA_CPU_ISA named when the library
// was loaded, or that use_instruction_set named since. Both throw when a name is unknown or the processor lacks the set.
InstructionSet instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace aletheia
