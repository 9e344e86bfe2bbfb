// Which sources a library is of: build.py says so, and a library of others is not loaded.
extern "C" __attribute__((visibility("default"))) const char sparseflash_sources[] = SPARSEFLASH_SOURCES;
