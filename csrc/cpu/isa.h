// Which instruction set the kernels run on: the best of the machine, or a lower one that was asked
// for.
#pragma once

#include <string>
#include <vector>

namespace pelt_fast {

// kAmxEmulated: the tiling and layouts of AMX with plain products; slow, for testing that code on
// any machine.
enum class Isa { kDefault, kAvx2, kAvx512, kAmx, kAmxEmulated };

Isa current_isa();
std::string isa_name(Isa isa);
// Every set this machine and this build can run, lowest first.
std::vector<std::string> available_isas();
// Takes an available one or "amx_emulated". Throws when the name is unknown or the machine lacks
// it. Not to be called while an operation runs.
void set_isa(const std::string& name);

} // namespace pelt_fast
