// EAR_OPS_TARGET("features") compiles everything that follows for these instruction sets, whatever the command line
// says. So one binary holds several builds of one source.
#pragma once

#define EAR_OPS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EAR_OPS_TARGET(features) \
  EAR_OPS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EAR_OPS_TARGET_END EAR_OPS_PRAGMA(clang attribute pop)
#else
#define EAR_OPS_TARGET(features) EAR_OPS_PRAGMA(GCC target(features))
#define EAR_OPS_TARGET_END
#endif
