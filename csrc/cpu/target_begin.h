// Everything from here to target_end.h is built for PELT_TARGET, whatever the flags of the file.
// Include after every other header.
#define PELT_PRAGMA_(text) _Pragma(#text)
#define PELT_PRAGMA(text) PELT_PRAGMA_(text)
#if defined(__clang__)
PELT_PRAGMA(clang attribute push(__attribute__((target(PELT_TARGET))), apply_to = function))
#elif defined(__GNUC__)
#pragma GCC push_options
PELT_PRAGMA(GCC target(PELT_TARGET))
#endif
