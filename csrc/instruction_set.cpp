#include "instruction_set.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "operators.h"

#if defined(ALETHEIA_X86_SETS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace aletheia {
namespace {

constexpr InstructionSet kSets[] = {
    InstructionSet::kDefault, InstructionSet::kAvx2, InstructionSet::kAvx512,
    InstructionSet::kAvx512Vnni, InstructionSet::kAvx512Bf16, InstructionSet::kAmxBf16};

// Linux keeps the tile registers' 8 KB of state for a process that asks for it, all its threads included.
bool tile_registers_granted() {
#if defined(ALETHEIA_X86_SETS) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

InstructionSet detect() {
#ifdef ALETHEIA_X86_SETS
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return InstructionSet::kDefault;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return InstructionSet::kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return InstructionSet::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return InstructionSet::kAvx512Vnni;
  const bool tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  return tiles && tile_registers_granted() ? InstructionSet::kAmxBf16 : InstructionSet::kAvx512Bf16;
#else
  return InstructionSet::kDefault;
#endif
}

std::string offered_names() {
  std::string names;
  for (const InstructionSet set : kSets)
    if (set <= offered_instruction_set()) names += (names.empty() ? "" : ", ") + std::string(name_of(set));
  return names;
}

}  // namespace

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx2: return "avx2";
    case InstructionSet::kAvx512: return "avx512";
    case InstructionSet::kAvx512Vnni: return "avx512_vnni";
    case InstructionSet::kAvx512Bf16: return "avx512_bf16";
    case InstructionSet::kAmxBf16: return "amx_bf16";
    default: return "default";
  }
}

InstructionSet offered_instruction_set() {
  static const InstructionSet offered = detect();
  return offered;
}

bool has_vendor_products(at::ScalarType dtype) {
#ifdef ALETHEIA_X86_SETS
  if (dtype == at::kBFloat16) return offered_instruction_set() >= InstructionSet::kAvx512Bf16;
  // AVX512-FP16 comes with AMX; the few processors that offer it alone are widened for nothing.
  if (dtype == at::kHalf) return offered_instruction_set() >= InstructionSet::kAmxBf16;
#endif
  return true;
}

namespace {

// Read once, as the library is loaded: in an operator's thread getenv would walk what setenv in another one moves.
const std::string wish = [] {
  const char* const text = std::getenv("ALETHEIA_CPU_ISA");
  return std::string(text == nullptr ? "" : text);
}();

InstructionSet named(const std::string& name, const char* source) {
  for (const InstructionSet set : kSets)
    if (name == name_of(set)) {
      TORCH_CHECK(set <= offered_instruction_set(), source, name, ": this processor offers ", offered_names());
      return set;
    }
  TORCH_CHECK(false, source, "'", name, "' names no instruction set: this processor offers ", offered_names());
}

std::atomic<InstructionSet>& in_use() {
  static std::atomic<InstructionSet> set{
      wish.empty() ? offered_instruction_set() : named(wish, "ALETHEIA_CPU_ISA=")};
  return set;
}

}  // namespace

InstructionSet instruction_set() { return in_use().load(std::memory_order_relaxed); }

void use_instruction_set(const std::string& name) { in_use() = named(name, ""); }

}  // namespace aletheia
